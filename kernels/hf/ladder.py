"""The ladder: rungs from mild to aggressive, each with its thresholds and what was verified about it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from sentei.kernels.hf.models import AdapterError
from sentei.kernels.ops.block_mask import DEFAULT_BLOCK
from sentei.kernels.scorer.selection import Thresholds

DENSE = "dense"
NEVER = (1 << 53) - 1  # a break-even length for steps that paid at no length; JSON keeps it exactly

DENSITY_TOLERANCE = 0.1  # relative: a rung of a density keeps its name within it on text it was not made from


@dataclass(frozen=True, slots=True)
class LengthCheck:
    """What a rung kept and dropped in held-out prompts of one length."""

    tokens: int
    density: float
    dropped_mass_mean: float


@dataclass(frozen=True, slots=True)
class Verified:
    """What held-out text said about a rung, against dense on the same text; by length, the longest last."""

    dropped_mass_mean: float
    dropped_mass_p99: float
    nll_delta: float
    nll_delta_ci: tuple[float, float]
    density: float
    by_length: tuple[LengthCheck, ...] = ()
    prefill_speed: float | None = None  # dense's seconds over its own, on the longest text; None: not timed


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the ladder: mass-share thresholds per layer, KV group and length bin.

    It was made for one thing: a bound on the mean dropped mass, a density past the break-even, a most that
    held-out text may lose in nats per token, or a speed. The others are what was verified.
    """

    id: str
    thresholds: Mapping[int, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    bound_dropped_mass: float | None = 0.0
    break_even_tokens: int = 0
    verified: Verified | None = None
    target_density: float | None = None
    target_nll: float | None = None  # the upper end of the difference's 95% interval
    target_speed: float | None = None  # of a prefill, over dense
    verified_tokens: int | None = None  # the longest prompt that it was verified at; None: no limit
    # The same for decode steps, by how many sequences a timed step had, or NEVER; empty: nobody timed any.
    decode_break_even_tokens: Mapping[int, int] = field(default_factory=dict)
    # Rows at a prompt's end that keep everything: they ask, and an answer is read from them (docs/adr/0027).
    dense_last_tokens: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether this is rung 0, which thins nothing."""
        return self.id == DENSE

    def covers(self, tokens: int) -> bool:
        """Whether a context of this length runs sparse; shorter does not pay, longer was never looked at."""
        is_known = self.verified_tokens is None or tokens <= self.verified_tokens
        return not self.is_dense and is_known and tokens >= self.break_even_tokens

    def covers_prompt(self, tokens: int) -> bool:
        """Whether a prompt of this length may run sparse: not where it is longer than was verified."""
        return self.covers(max(self.break_even_tokens, tokens))

    def covers_step(self, tokens: int, batch: int = 1) -> bool:
        """Whether a decode step (a row per sequence) runs sparse in contexts of this length, it included."""
        return self.covers(tokens) and tokens >= self.step_break_even_tokens(batch)

    def step_break_even_tokens(self, batch: int = 1) -> int:
        """The shortest context in which a step of so many sequences runs sparse; at least a prompt's.

        What a layer costs apart from its sequences is shared by them: the more there are, the sooner it pays.
        So the nearest timed number that is not above `batch` tells; a step of fewer than any runs dense.
        """
        timed = self.decode_break_even_tokens
        if not timed:
            return self.break_even_tokens
        nearest = max((size for size in timed if size <= batch), default=None)
        return NEVER if nearest is None else max(self.break_even_tokens, timed[nearest])

    @property
    def is_kept(self) -> bool | None:
        """Whether held-out text kept what the rung was made for, at every length; None where none was run.

        Losses and speed are of the longest length alone.
        """
        if self.verified is None:
            return None
        checks = self.verified.by_length
        if self.target_nll is not None:
            return self.verified.nll_delta_ci[1] <= self.target_nll
        if self.target_speed is not None:
            return (self.verified.prefill_speed or 0.0) >= self.target_speed
        if self.target_density is not None:
            reach = DENSITY_TOLERANCE * self.target_density
            chosen = (self.chosen_density(check) for check in checks)
            return all(abs(found - self.target_density) <= reach for found in chosen if found is not None)
        bound = self.bound_dropped_mass or 0.0
        return self.verified.dropped_mass_mean <= bound and all(
            check.dropped_mass_mean <= bound for check in checks
        )

    def chosen_density(self, check: LengthCheck) -> float | None:
        """Share kept of what rows past the break-even could read; None where a prompt has hardly any of them.

        Rows before it keep everything, (break-even / tokens)^2 of all pairs; a density is for the rest.
        """
        if check.tokens < 1.5 * self.break_even_tokens:
            return None
        early = (self.break_even_tokens / check.tokens) ** 2
        return (check.density - early) / (1 - early)

    def last_from(self, prompt_tokens: int, query_block_tokens: int) -> int:
        """Return the position from which the rows of a prompt keep everything, up to its end.

        Query blocks count from the start of a sequence, so it hangs on the prompt's length alone.
        """
        if not self.dense_last_tokens:
            return prompt_tokens
        return max(0, prompt_tokens - self.dense_last_tokens) // query_block_tokens * query_block_tokens

    def thins(self, layer: int) -> bool:
        """Whether any KV group of a layer may drop blocks at any length."""
        return any(share > 0.0 for group in self.thresholds.get(layer, ()) for share in group)


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rung 0 (`dense`) and the calibrated rungs after it; length bins end before these positions.

    Each query block of `query_block_tokens` rows chooses its key blocks; thresholds hold for that size alone.
    """

    rungs: tuple[Rung, ...]
    bin_edges_tokens: tuple[int, ...]
    query_block_tokens: int = DEFAULT_BLOCK

    def __post_init__(self) -> None:
        ids = [rung.id for rung in self.rungs]
        if not ids or ids[0] != DENSE or len(set(ids)) != len(ids):
            raise AdapterError(f"rungs are {ids}; the first must be {DENSE!r} and no id may repeat")

    def find(self, rung_id: str) -> Rung:
        """Return a rung by id, or raise AdapterError that names the ids there are."""
        for rung in self.rungs:
            if rung.id == rung_id:
                return rung
        known = ", ".join(rung.id for rung in self.rungs)
        raise AdapterError(f"rung {rung_id!r} is not on this ladder; it has {known}")

    def without_limits(self) -> "Ladder":
        """Return the same rungs at lengths that nobody verified: to time them, never to serve them.

        Steps that paid at no length that was timed run sparse past these, too.
        """
        return replace(self, rungs=tuple(_without_limits(rung) for rung in self.rungs))

    def with_speeds(self, speeds: Mapping[str, float]) -> "Ladder":
        """Return the same rungs with how many times as fast as dense each prefills, by id."""
        rungs = [
            replace(rung, verified=replace(rung.verified, prefill_speed=speeds[rung.id]))
            if rung.verified is not None and rung.id in speeds
            else rung
            for rung in self.rungs
        ]
        return replace(self, rungs=tuple(rungs))

    def thresholds(self, rung: Rung, layer: int) -> Thresholds:
        """Return a layer's thresholds on a rung, ready for the selector."""
        if layer not in rung.thresholds:
            raise AdapterError(f"rung {rung.id!r} has no thresholds for layer {layer}; calibrate again")
        shares = torch.tensor(rung.thresholds[layer], dtype=torch.float32)
        return Thresholds(shares.clamp_min(1e-30).log(), self.bin_edges_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "bin_edges_tokens": list(self.bin_edges_tokens),
            "query_block_tokens": self.query_block_tokens,
            "rungs": [asdict(r) for r in self.rungs],
        }


def ladder_from_dict(data: Mapping[str, Any]) -> Ladder:
    """Read back what Ladder.to_dict wrote."""
    try:
        rungs = tuple(_rung_from_dict(item) for item in data["rungs"])
        edges = tuple(int(edge) for edge in data["bin_edges_tokens"])
        return Ladder(rungs, edges, int(data["query_block_tokens"]))
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"the ladder is broken ({error!r}); calibrate again") from error


def dense_ladder() -> Ladder:
    """Return the ladder before calibration: dense alone."""
    return Ladder((Rung(DENSE),), ())


def _without_limits(rung: Rung) -> Rung:
    past = 0 if rung.verified_tokens is None else rung.verified_tokens + 1
    steps = {
        batch: past if tokens == NEVER else tokens for batch, tokens in rung.decode_break_even_tokens.items()
    }
    return replace(rung, verified_tokens=None, decode_break_even_tokens=steps)


def _rung_from_dict(item: Mapping[str, Any]) -> Rung:
    verified = item["verified"]
    if verified is not None:
        low, high = verified["nll_delta_ci"]
        checks = tuple(LengthCheck(**check) for check in verified.get("by_length", ()))
        verified = Verified(**{**verified, "nll_delta_ci": (low, high), "by_length": checks})
    thresholds = {
        int(layer): tuple(tuple(float(x) for x in group) for group in groups)
        for layer, groups in item["thresholds"].items()
    }
    return Rung(
        id=item["id"],
        thresholds=thresholds,
        bound_dropped_mass=item["bound_dropped_mass"],
        break_even_tokens=item["break_even_tokens"],
        verified=verified,
        # Ladders of before 2026-11-27 name none of these.
        target_density=item.get("target_density"),
        target_nll=item.get("target_nll"),
        target_speed=item.get("target_speed"),
        verified_tokens=item.get("verified_tokens"),
        decode_break_even_tokens=_step_lengths(item.get("decode_break_even_tokens")),
        dense_last_tokens=item.get("dense_last_tokens", 0),
    )


def _step_lengths(found: Any) -> dict[int, int]:
    """Read break-even lengths of steps by batch; ladders of before had one, of one sequence, or none."""
    if isinstance(found, Mapping):
        return {int(batch): int(tokens) for batch, tokens in found.items()}
    return {} if found is None else {1: int(found)}
