"""The classes that Ray Serve runs: each builds a plain object of ours in its replica and passes calls on."""

from __future__ import annotations

import logging
import os
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

from fastapi import FastAPI
from ray import serve

from sentei.monitors.audit import KL_CAP_NATS
from sentei.monitors.records import Missing
from sentei.monitors.store import Store
from sentei.pipeline.home import sentei_home
from sentei.pipeline.integrations.calls import Secrets
from sentei.pipeline.integrations.gatekeeper import GateKeeper
from sentei.pipeline.integrations.notifier import Notifier
from sentei.pipeline.integrations.prometheus import MetricReader
from sentei.pipeline.models import load_tokenizer
from sentei.pipeline.rollout.revisions import PolicyBook
from sentei.serving.front.access import KeyBook, OperatorBook, read_user_key
from sentei.serving.handles import RayAuditDesk, RayVariant, count_running_replicas
from sentei.serving.ingress.api import build_api
from sentei.serving.ingress.gateway import Gateway
from sentei.serving.ingress.router import DENSE, SPARSE
from sentei.serving.ingress.writer import RecordWriter
from sentei.serving.ports import AuditJob, AuditLoad, Variant
from sentei.serving.proxy import is_configured
from sentei.serving.rollout.auditor import Auditor
from sentei.serving.rollout.controller import Controller, Mirror
from sentei.serving.rollout.operations import add_admin_routes
from sentei.serving.rollout.scrape import add_metrics_route
from sentei.serving.settings import AppArgs
from sentei.serving.traces import OFF, Tracer, read_tracer

NO_MIRROR = "off"
CREATED = "model_created_s"

Handle: TypeAlias = Any  # a ray.serve DeploymentHandle; Ray is not typed for us


def set_up_logging() -> None:
    """Let our own messages through at INFO; Serve's file handler takes them."""
    logging.getLogger("sentei").setLevel(os.environ.get("SENTEI_LOG_LEVEL", "INFO"))


class IngressServer:
    """The HTTP front; wrapped by `serve.ingress()`, which asks it for its ASGI app after construction."""

    def __init__(
        self,
        args: AppArgs,
        dense: Handle,
        sparse: Handle | None,
        auditor: Handle | None,
        controller: Handle | None,
        note: str,
    ) -> None:
        set_up_logging()
        variants: dict[str, Variant] = {DENSE: RayVariant(DENSE, dense)}
        if sparse is not None:
            variants[SPARSE] = RayVariant(SPARSE, sparse)
        self._args = args
        self._workers = {
            name: handle.status.remote
            for name, handle in (("auditor", auditor), ("controller", controller))
            if handle is not None
        }
        self._store = Store.open(args.resolved_store_url())
        self._gateway = Gateway(
            variants,
            self._store,
            tokenizer=load_tokenizer(args.model),
            model_name=args.logical_name(),
            limits=args.limits,
            desk=RayAuditDesk(auditor) if auditor is not None else None,
            note=note,
            created_s=_created_s(self._store),
            user_key=read_user_key(sentei_home().create().root),
            now_s=self._store.clock(),
            tracer=read_tracer("ingress"),
        )
        if note:
            logging.getLogger(__name__).warning("dense only: %s", note)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app; Serve calls this once, after the constructor."""
        args = self._args
        api = build_api(
            self._gateway,
            keys=KeyBook.read(args.api_keys_file),
            cors_origins=args.cors_origins,
            has_keeper=is_configured(),
        )
        about = {"model": args.model, "adapter": str(args.adapter_folder())}
        operators = OperatorBook.read(args.operators_file)
        add_metrics_route(
            api,
            self._gateway,
            self._store,
            operators=operators,
            is_open=args.open_metrics,
            workers=self._workers,
            now_s=self._gateway.now_s,
        )
        add_admin_routes(
            api,
            self._gateway,
            self._store,
            operators=operators,
            allow_faults=args.allow_faults,
            about=about,
            workers=self._workers,
            now_s=self._gateway.now_s,
        )
        return api


class AuditorServer:
    """The auditor in a replica of its own."""

    _tracer: Tracer = OFF

    def __init__(self, args: AppArgs, dense: Handle, sparse: Handle) -> None:
        set_up_logging()
        variants = {DENSE: RayVariant(DENSE, dense), SPARSE: RayVariant(SPARSE, sparse)}
        store = Store.open(args.resolved_store_url())
        self._writer = RecordWriter(store)
        self._tracer = read_tracer("auditor")
        self._auditor = Auditor(
            variants,
            self._writer,
            max_queued=args.audit_queue,
            concurrency=args.audit_concurrency,
            kl_cap_nats=lru_cache(maxsize=64)(partial(_kl_cap_nats, store)),
            clock=store.clock(),
            tracer=self._tracer,
        )
        self._has_started = False

    def __del__(self) -> None:
        """Send the last spans; Serve calls this when it ends the replica."""
        self._tracer.stop()

    async def submit(self, job: AuditJob) -> Missing | None:
        """Queue a job; the workers start with the first one, on the loop that Serve runs."""
        if not self._has_started:
            self._has_started = True
            self._writer.start()
            self._auditor.start()
        return await self._auditor.submit(job)

    async def load(self) -> AuditLoad:
        """Say how busy it is."""
        return await self._auditor.load()

    async def status(self) -> dict[str, Any]:
        """Say how much waits."""
        return {
            "pid": os.getpid(),
            "waiting": (await self._auditor.load()).waiting,
            "written": self._writer.written,
            "dropped": self._writer.dropped,
            "records_waiting": self._writer.waiting,
            "num_errors": self._writer.num_errors,
        }


class ControllerServer:
    """The controller in a replica of its own; Serve starts it again when it dies."""

    # Async, so that it runs on the loop that the scheduler needs.
    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]
        set_up_logging()
        home = sentei_home().create()
        store = Store.open(args.resolved_store_url())
        secrets = Secrets(args.resolved_secrets_folder(), os.environ)
        self._controller = Controller(
            store,
            mirror=_mirror(args, store),
            reports=Path(home.reports),
            replicas=_replicas,
            monotonic=time.monotonic,
            notifier=Notifier(store, secrets),
            gatekeeper=GateKeeper(store, secrets),
            metric_reader=MetricReader(store, secrets),
        )
        self._controller.start(
            tick_every_s=args.tick_every_s,
            drift_every_s=args.drift_every_s,
            mirror_every_s=args.mirror_every_s,
            notify_every_s=args.notify_every_s,
            ask_every_s=args.ask_every_s,
        )

    async def status(self) -> dict[str, Any]:
        """Say how the controller fares."""
        return self._controller.status()


def _created_s(store: Store) -> int:
    """Return when this store first served the model: all ingresses say the same of it."""
    if store.read_value(CREATED) is None:
        store.save_value(CREATED, str(int(time.time())))
    return int(store.read_value(CREATED) or 0)


def _kl_cap_nats(store: Store, rollout_id: str) -> float:
    rollout = store.read_rollout(rollout_id)
    return KL_CAP_NATS if rollout is None else PolicyBook(store).first(rollout).spec.audit.values.kl.cap


def _replicas() -> dict[str, int]:
    return count_running_replicas(serve.get_replica_context().app_name)


def _mirror(args: AppArgs, store: Store) -> Mirror | None:
    if args.mlflow_uri == NO_MIRROR:
        return None
    from sentei.pipeline.tracking.mirror import Mirror as MlflowMirror
    from sentei.pipeline.tracking.tracker import MlflowTracker

    home = sentei_home()
    tracker = MlflowTracker(args.mlflow_uri or home.mlflow_uri, home.mlflow_artifacts)
    return MlflowMirror(store, tracker)
