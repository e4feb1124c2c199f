"""What a request asks of the plugin: SamplingParams.extra_args["sentei"]. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sentei.serving.engine.request import DENSE_RUNG, NEUTRAL, Sampling

KEY = "sentei"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request's wishes; all of them optional.

    `prompt_tokens`: where the user's prompt ends, if tokens that were sent already follow it. `chunk_tokens`:
    the prompt's pieces are no longer. `forced`: the ids to emit, whatever the model says; so an audit replays
    an answer as it was served. `sampling`: how tokens are chosen, by the same code as on the built-in engine.
    """

    rung: str = DENSE_RUNG
    ticket: str = ""
    prompt_tokens: int | None = None
    chunk_tokens: int | None = None
    forced: tuple[int, ...] = ()
    sampling: Sampling = NEUTRAL

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"extra_args {KEY}.{name} is {value}; it must be at least 1")

    @property
    def is_dense(self) -> bool:
        """Whether nothing is thinned."""
        return self.rung == DENSE_RUNG

    @property
    def takes_the_best(self) -> bool:
        """Whether the model's first choice is taken as it is, which vLLM does by itself."""
        plain = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=None, min_p=0.0, seed=0)
        return (
            not self.forced and self.sampling.is_greedy and replace(plain, num_top_logprobs=None) == NEUTRAL
        )

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
        sampling = dict(found.get("sampling", {}))
        bias = tuple((int(i), float(value)) for i, value in sampling.get("logit_bias", ()))
        forced = tuple(int(i) for i in found.get("forced", ()))
        return Asked(**{**found, "forced": forced, "sampling": Sampling(**{**sampling, "logit_bias": bias})})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"extra_args {KEY} is {found!r}: {error}") from error
