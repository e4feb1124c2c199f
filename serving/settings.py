"""Every option of the serving app, with its default and its unit; unknown options are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from sentei.pipeline.home import sentei_home, short_name
from sentei.serving.engine.request import EngineLimits
from sentei.serving.errors import ConfigError


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BodyLimits(_Options):
    """How bodies may come in; each ingress counts its own."""

    pause_s: float = Field(default=5.0, gt=0, description="longest wait for the next bytes of a body")
    total_s: float = Field(default=30.0, gt=0, description="longest time for a whole body")
    young_s: float = Field(default=0.2, ge=0, description="a younger body is not given up for another")
    max_per_client: int = Field(default=64, ge=1, description="bodies of one address that are not whole yet")
    max_reading: int = Field(default=256, ge=1, description="bodies of all that are not whole yet")
    max_bytes: int = Field(default=64 << 20, ge=1024, description="bytes of all bodies together")
    max_client_bytes: int = Field(
        default=16 << 20, ge=1024, description="bytes of one address's bodies that are not whole yet"
    )


class Limits(_Options):
    """What the ingress accepts, and how long it waits."""

    bodies: BodyLimits = BodyLimits()
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    max_concurrent: int = Field(default=64, ge=1, description="answers in flight; more get a 429")
    tokenizer_threads: int = Field(default=1, ge=1, description="prompts that are turned into ids at once")
    default_max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="answer of a request without max_tokens [default: to the context's end]",
    )
    first_token_timeout_s: float = Field(default=60.0, gt=0)
    token_timeout_s: float = Field(default=30.0, gt=0, description="longest pause inside a stream")
    poll_every_s: float = Field(default=0.25, gt=0, description="how often the routing table is read")
    max_unwritten_records: int = Field(default=10_000, ge=1)
    audit_max_tokens: int = Field(default=64, ge=1, description="successive served tokens that are replayed")
    audit_wait_s: float = Field(
        default=10.0, gt=0, description="no audit is drawn that would wait longer for its replay"
    )
    attention_record_bytes: int = Field(
        default=2048, ge=0, description="what a request's attention kept: layers are left out beyond; 0: none"
    )


class VllmOptions(_Options):
    """What a variant on the vLLM engine may be told; everything else of vLLM's goes through `extra_args`."""

    max_running: int = Field(default=16, ge=1, description="requests in one batch")
    step_tokens: int = Field(default=2048, ge=128, description="tokens that one step computes at most")
    kv_cache_mib: int = Field(
        default=1024,
        ge=64,
        description="keys and values; the scorer's features come on top (the guide says how much)",
    )
    prefix_cache: bool = Field(default=True, description="requests of one rung share what they begin with")
    compile: bool = Field(
        default=True, description="let vLLM compile the model: a minute at start, faster after"
    )
    tensor_parallel: int = Field(default=1, ge=1)
    extra_args: dict[str, Any] = Field(default={}, description="arguments of vLLM's engine, as they are")


class EngineOptions(_Options):
    """How a model is run, whatever its variant."""

    model: str = "pocket"
    engine: Literal["builtin", "vllm"] = Field(
        default="builtin", description="builtin: one request at a time, for demo and tests; vllm: an extra"
    )
    vllm: VllmOptions = VllmOptions()
    adapter: str | None = Field(
        default=None, description="folder [default: the one adapter of the model at home]"
    )
    attention: Literal["sdpa", "best"] = "sdpa"
    threads: int = Field(default=1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="cuda: a GPU for each model replica (ROCm's, too); auto: where it has one"
    )
    dtype: Literal["float32", "bfloat16"] | None = None
    max_context_tokens: int | None = Field(default=None, ge=2)
    max_running: int = Field(default=4, ge=1)
    max_queued: int = Field(default=32, ge=1)
    score_patience_steps: int = Field(
        default=5, ge=0, description="engine steps for users before a waiting audit replay gets its turn"
    )
    stall_after_s: float = Field(default=300.0, gt=0, description="a longer step counts as unhealthy")


class VariantOptions(EngineOptions):
    """One model server: dense and sparse differ in these options only."""

    variant: Literal["dense", "sparse"]

    def limits(self, max_context_tokens: int) -> EngineLimits:
        """Return the engine's limits for a model of this context length."""
        return EngineLimits(
            max_running=self.max_running,
            max_queued=self.max_queued,
            max_context_tokens=min(max_context_tokens, self.max_context_tokens or max_context_tokens),
            score_patience_steps=self.score_patience_steps,
        )


class AppArgs(EngineOptions):
    """Arguments of `sentei.serving.app:build`; also what a file for `sentei.serving.local` may hold."""

    base_folder: str | None = Field(
        default=None,
        description="where a relative `model` or `adapter` is [default: the config file's folder, or PWD]",
    )
    model_name: str | None = Field(default=None, description="the users' model name [default: the model]")
    ingress_replicas: int = Field(
        default=1, ge=1, description="with two, the end of one cuts only the answers that pass through it"
    )
    dense_replicas: int = Field(default=1, ge=1)
    sparse_replicas: int = Field(default=1, ge=1)
    replica_cpus: float = Field(default=0.4, gt=0)
    replica_gpus: float | None = Field(
        default=None,
        ge=0,
        description="GPUs that Ray gives each model replica, 0.5: two share one [default: 1 on cuda, else 0]",
    )
    audit_queue: int = Field(default=256, ge=1)
    audit_concurrency: int = Field(default=1, ge=1)
    store_url: str | None = Field(default=None, description="SQLAlchemy URL [default: home's SQLite]")
    mlflow_uri: str | None = Field(default=None, description="tracking URI [default: home's]; 'off': none")
    tick_every_s: float = Field(
        default=1.0, gt=0, description="between looks for orders; when to check says the policy"
    )
    drift_every_s: float = Field(default=10.0, gt=0)
    mirror_every_s: float = Field(default=5.0, gt=0)
    notify_every_s: float = Field(default=2.0, gt=0, description="between looks for what `notify` tells")
    ask_every_s: float = Field(
        default=1.0, gt=0, description="between looks whether a gate or a metric must be asked"
    )
    secrets_folder: str | None = Field(
        default=None, description="absolute; the files that a policy's secrets name [default: home's secrets]"
    )
    controller: bool = True
    allow_faults: bool = Field(default=False, description="let the admin API plant faults, for drills")
    api_keys_file: str | None = Field(default=None, description="YAML list of keys for /v1 [default: open]")
    operators_file: str | None = Field(default=None, description="YAML list of operators' tokens and roles")
    open_metrics: bool = Field(default=False, description="/metrics needs no operator's token")
    cors_origins: tuple[str, ...] = Field(default=(), description="pages of these origins may call /v1")
    limits: Limits = Limits()

    def at(self, *folders: Path) -> Self:
        """Return the arguments with absolute folders; raises ConfigError that says where was looked.

        Ray's processes run in folders of their own, so a relative one is made absolute before they begin.
        """
        if self.base_folder is not None:
            folders = (folders[0] / Path(self.base_folder).expanduser(),)
        found: dict[str, Any] = {"model": _find_model(self.model, folders)}
        if self.adapter is not None:
            found["adapter"] = str(_find_below(self.adapter, folders) or folders[0] / self.adapter)
        return self.model_copy(update=found)

    def gpus_per_replica(self) -> float:
        """Return the GPUs that Ray is asked for; ConfigError where they do not fit device or engine."""
        gpus = (1.0 if self.device == "cuda" else 0.0) if self.replica_gpus is None else self.replica_gpus
        if bool(gpus) != (self.device == "cuda") and self.device != "auto":
            raise ConfigError(
                f"device is {self.device!r} and replica_gpus {gpus:g}: Ray hides GPUs that it did not give; "
                "leave replica_gpus out, or set device to 'auto'"
            )
        if gpus > 1 and self.engine == "builtin":
            raise ConfigError(
                f"replica_gpus is {gpus:g}; engine 'builtin' keeps its model on one GPU: for more set "
                "dense_replicas and sparse_replicas, or take engine 'vllm' with tensor_parallel"
            )
        return gpus

    def logical_name(self) -> str:
        """Return the model name that users send."""
        return self.model_name or short_name(self.model)

    def resolved_store_url(self) -> str:
        """Return the store's URL."""
        return self.store_url or sentei_home().create().store_url

    def resolved_secrets_folder(self) -> Path:
        """Return where the files of secrets are."""
        return Path(self.secrets_folder) if self.secrets_folder else sentei_home().secrets

    def adapter_folder(self) -> Path:
        """Return where the adapter is looked for."""
        return Path(self.adapter) if self.adapter else sentei_home().find_adapter(self.model)

    def variant_options(self, variant: Literal["dense", "sparse"]) -> VariantOptions:
        """Return one model server's options."""
        shared = {name: getattr(self, name) for name in EngineOptions.model_fields}
        shared["adapter"] = str(self.adapter_folder()) if variant == "sparse" else None
        # A GPU that Ray did not give may be another replica's: `auto` looks at what was asked for alone.
        shared["device"] = "cuda" if self.gpus_per_replica() else "cpu"
        return VariantOptions(**shared, variant=variant)


def launch_folder() -> Path:
    """Return the folder that Ray was started from: its processes keep the variable, not the folder."""
    return Path(os.environ.get("PWD") or Path.cwd())


def _find_model(model: str, folders: tuple[Path, ...]) -> str:
    """Return a model's folder made absolute; a name or a hub id stays what it is."""
    found = _find_below(model, folders)
    if found is not None:
        return model if len(Path(model).parts) == 1 and _is_packaged(model) else str(found)
    path = Path(model)
    if path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2:
        looked = " nor ".join(dict.fromkeys(str(folder / path.expanduser()) for folder in folders))
        raise ConfigError(
            f"model is {model!r}, but {looked} is no folder; give an absolute path, or set base_folder"
        )
    return model


def _find_below(name: str, folders: tuple[Path, ...]) -> Path | None:
    paths = (folder / Path(name).expanduser() for folder in folders)
    return next((path.resolve() for path in paths if path.is_dir()), None)


def _is_packaged(model: str) -> bool:
    from sentei.pipeline.models import is_packaged  # torch comes with it, and few have such a folder

    return is_packaged(model)
