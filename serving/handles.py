"""Ray Serve handles behind our ports: the only place where Ray's exceptions get their meaning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from sentei.monitors.records import Missing
from sentei.serving.engine.request import EngineRequest, ScoreRequest, ScoreResult, TokenChunk
from sentei.serving.errors import (
    BadLogitsError,
    EngineBusyError,
    EngineRefusedError,
    GrammarError,
    VariantError,
    WrongArtifactError,
)
from sentei.serving.ports import AuditJob, AuditLoad, ModelCard

CONTROL_TIMEOUT_S = 30.0
SUBMIT_TIMEOUT_S = 5.0


def translate(variant: str, error: Exception) -> Exception:
    """Say in our words what went wrong behind a handle."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, EngineBusyError | EngineRefusedError | GrammarError):
        return cause
    if isinstance(cause, BackPressureError):
        return EngineBusyError(f"variant {variant!r} has a full queue; retry later")
    if isinstance(cause, WrongArtifactError):
        return VariantError(variant, "artifact", str(cause))
    if isinstance(cause, BadLogitsError):
        return VariantError(variant, "nan_logits", str(cause))
    reason = "error" if isinstance(error, RayTaskError) else "crash"
    return VariantError(variant, reason, f"{type(cause).__name__}: {str(cause)[:200]}")


class RayVariant:
    """A model server deployment."""

    def __init__(self, name: str, handle: DeploymentHandle[Any]) -> None:
        self.name = name
        self._handle = handle
        self._stream = handle.options(stream=True)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield tokens; closing cancels the request on the replica."""
        chunks = self._stream.generate.remote(request)
        try:
            async for chunk in chunks:
                yield chunk
        except (RayError, RayServeException) as error:
            raise translate(self.name, error) from error
        finally:
            chunks.cancel()

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Replay served tokens."""
        try:
            result: ScoreResult = await self._handle.score.remote(request)
        except (RayError, RayServeException) as error:
            raise translate(self.name, error) from error
        return result

    async def describe(self) -> ModelCard:
        """Ask a replica what runs there."""
        try:
            card: ModelCard = await asyncio.wait_for(self._handle.describe.remote(), CONTROL_TIMEOUT_S)
        except TimeoutError as error:
            raise VariantError(self.name, "timeout", "no replica answered") from error
        except (RayError, RayServeException) as error:
            raise translate(self.name, error) from error
        return card

    async def plant(self, fault: dict[str, Any] | None) -> None:
        """Plant a fault in every replica; a replica that starts later does not have it."""
        responses = self._handle.broadcast("plant", fault)
        try:
            await asyncio.wait_for(responses.results_async(), CONTROL_TIMEOUT_S)
        except TimeoutError as error:
            raise VariantError(self.name, "timeout", "not every replica answered") from error
        except (RayError, RayServeException) as error:
            raise translate(self.name, error) from error


class RayAuditDesk:
    """The auditor deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def submit(self, job: AuditJob) -> Missing | None:
        """Hand over a job; NO_AUDITOR if none answers."""
        try:
            refusal: Missing | None = await asyncio.wait_for(
                self._handle.submit.remote(job), SUBMIT_TIMEOUT_S
            )
        except (TimeoutError, RayError, RayServeException):
            return Missing.NO_AUDITOR
        return refusal

    async def load(self) -> AuditLoad | None:
        """Ask how busy the auditor is; None if it does not answer."""
        try:
            load: AuditLoad = await asyncio.wait_for(self._handle.load.remote(), SUBMIT_TIMEOUT_S)
        except (TimeoutError, RayError, RayServeException):
            return None
        return load


def count_running_replicas(app_name: str) -> dict[str, int]:
    """Ask Serve how many replicas of each variant run; the controller's breaker wants to know."""
    status = serve.status().applications.get(app_name)
    deployments = status.deployments if status is not None else {}
    return {
        variant: int(deployments[name].replica_states.get("RUNNING", 0)) if name in deployments else 0
        for variant, name in (("dense", "Dense"), ("sparse", "Sparse"))
    }
