"""What a request asks of the plugin: SamplingParams.extra_args["sentei"]. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sentei.serving.engine.request import DENSE_RUNG

KEY = "sentei"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request's wishes; all of them optional.

    `prompt_tokens`: where the user's prompt ends, if tokens that were sent already follow it. `chunk_tokens`:
    the prompt's pieces are no longer. `forced`: the ids to emit, whatever the model says; so an audit replays
    an answer as it was served. `temperature` above 0: token i is drawn from (seed, i) alone, counted from
    `prompt_tokens`, so that a stream that moves goes on as if nothing had happened.
    """

    rung: str = DENSE_RUNG
    ticket: str = ""
    prompt_tokens: int | None = None
    chunk_tokens: int | None = None
    forced: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"extra_args {KEY}.{name} is {value}; it must be at least 1")
        if self.forced and self.temperature:
            raise ValueError(f"extra_args {KEY} has forced ids and a temperature; give one of them")

    @property
    def is_dense(self) -> bool:
        """Whether nothing is thinned."""
        return self.rung == DENSE_RUNG

    def to_extra_args(self) -> dict[str, Any]:
        """Return what goes into SamplingParams."""
        return {KEY: asdict(self)}


def read_asked(extra_args: Mapping[str, Any] | None) -> Asked:
    """Read a request's wishes, or a rung's name alone; without any it is dense. ValueError names a misfit."""
    found = (extra_args or {}).get(KEY)
    if found is None:
        return Asked()
    if isinstance(found, str):  # all that vLLM's own HTTP server lets through
        return Asked(rung=found)
    try:
        return Asked(**{**found, "forced": tuple(found.get("forced", ()))})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"extra_args {KEY} is {found!r}: {error}") from error
