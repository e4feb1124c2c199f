"""What rungs are made for, and what they are named after it."""

from collections.abc import Sequence
from dataclasses import dataclass

# Densities among which a rung of a loss or of a speed is looked for: each keeps a sixth to a quarter less.
CANDIDATES = (0.5, 0.4, 0.3, 0.25, 0.2, 0.16, 0.13, 0.1, 0.08, 0.065, 0.05)


@dataclass(frozen=True, slots=True)
class RungTarget:
    """What a rung may cost in any KV group, missed needles (a share) and mean dropped mass; or one other aim.

    That is its density, the most that it may lose on held-out text in nats per token (the upper end of the
    95% interval), or its speed: how many times as fast as dense it prefills. With one of these
    `missed_needles` is asked of questions about notes alone, and the mass is not bounded.
    """

    id: str
    missed_needles: float = 1.0
    bound_dropped_mass: float = 1.0
    density: float | None = None  # of the causal blocks
    nll: float | None = None
    speed: float | None = None

    @property
    def is_searched(self) -> bool:
        """Whether only running it tells at which density it is to be made."""
        return self.nll is not None or self.speed is not None


def density_targets(densities: Sequence[float], missed_needles: float = 1.0) -> tuple[RungTarget, ...]:
    """Return one rung per density, the densest first, named after it: d50, d20, d10."""
    for density in densities:
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density {density:g} is no share of the blocks; give one above 0, at most 1")
    ordered = sorted(set(densities), reverse=True)
    return tuple(RungTarget(f"d{100 * density:g}", missed_needles, density=density) for density in ordered)


def nll_targets(losses: Sequence[float], missed_needles: float = 1.0) -> tuple[RungTarget, ...]:
    """Return one rung per loss in nats per token, the smallest first, named after it: nll0.001, nll0.01."""
    for nll in losses:
        if not 0.0 < nll < float("inf"):
            raise ValueError(f"nll {nll:g} is no loss to allow; give nats per token above 0")
    return tuple(RungTarget(f"nll{nll:g}", missed_needles, nll=nll) for nll in sorted(set(losses)))


def speed_targets(speeds: Sequence[float], missed_needles: float = 1.0) -> tuple[RungTarget, ...]:
    """Return one rung per speed over dense, the slowest first, named after it: x1.2, x1.5."""
    for speed in speeds:
        if not 1.0 < speed < float("inf"):
            raise ValueError(f"speed {speed:g} is no gain over dense; give a ratio above 1")
    return tuple(RungTarget(f"x{speed:g}", missed_needles, speed=speed) for speed in sorted(set(speeds)))


def candidates_for(targets: Sequence[RungTarget]) -> tuple[RungTarget, ...]:
    """Return the rungs among which those of a loss or a speed are looked for, the densest first."""
    missed = dict.fromkeys(target.missed_needles for target in targets if target.is_searched)
    return tuple(
        RungTarget(candidate_id(density, share), share, density=density)
        for share in missed
        for density in CANDIDATES
    )


def candidate_id(density: float, missed_needles: float) -> str:
    """Name a candidate; no rung that is kept has such a name."""
    return f"{density:g} of the blocks, {missed_needles:g} missed"
