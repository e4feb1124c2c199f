"""Ladders that nobody calibrated, for tests that need a sparse rung."""

from collections.abc import Mapping

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE, Ladder, Rung


def uncalibrated_ladder(adapter: Adapter, shares: Mapping[str, float]) -> Ladder:
    """Return rungs with one mass-share threshold everywhere."""
    shapes = adapter.manifest.shapes
    rungs = [Rung(DENSE)]
    for rung_id, share in shares.items():
        thresholds = {index: ((share,),) * shape.kv_heads for index, shape in shapes.items()}
        rungs.append(Rung(rung_id, thresholds, bound_dropped_mass=1.0))
    return Ladder(tuple(rungs), (), max(shape.block_tokens for shape in shapes.values()))
