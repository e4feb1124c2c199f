"""All errors of serving, in one small tree.

ServingError
├── RequestError      the caller asked for something we cannot do: becomes an OpenAI-shaped 4xx answer
├── EngineError       the engine cannot go on with a request
│   ├── EngineBusyError        its queue is full
│   ├── EngineRefusedError     the request can never fit this engine
│   ├── GrammarError           the grammar that the caller sent cannot be followed: the caller's fault
│   ├── WrongArtifactError     another model, adapter, ladder or engine was asked for than runs here
│   └── BadLogitsError         the model gave NaN or infinite logits
├── VariantError     a whole variant failed this request (crash, timeout, bad logits, empty answer)
├── StartError        the app did not come up
└── ConfigError       the app was configured with something that cannot work
"""

from __future__ import annotations

from sentei.errors import SenteiError


class ServingError(SenteiError):
    """Root of the tree; every message names the thing, its value and the way out."""


class RequestError(ServingError):
    """What the caller sent cannot be answered; carries all that an OpenAI error object needs."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers or {}


class EngineError(ServingError):
    """The engine cannot go on with a request."""


class EngineBusyError(EngineError):
    """The engine's queue is full; the caller may come back later."""


class EngineRefusedError(EngineError):
    """The request can never fit this engine."""


class WrongArtifactError(EngineError):
    """What was proven is not what runs here, so nothing of it may be served or counted."""


class GrammarError(EngineError):
    """The caller's grammar cannot be read, or nothing can follow it; no variant could do better."""


class BadLogitsError(EngineError):
    """The model gave logits that are NaN or infinite, so no token can be trusted."""


class VariantError(ServingError):
    """A variant failed one request; `reason` is one word that records and counters use."""

    def __init__(self, variant: str, reason: str, detail: str = "") -> None:
        super().__init__(variant, reason, detail)
        self.variant = variant
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"variant {self.variant!r} failed: {self.reason}{detail}"


class StartError(ServingError):
    """The app did not come up; the message names the part and what it said."""


class ConfigError(ServingError):
    """The app was configured with something that cannot work."""
