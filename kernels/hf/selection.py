"""What one selection saw and chose: shown to an observer that was switched on, otherwise never made."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sentei.kernels.hf.models import LayerInfo
from sentei.kernels.ops.block_mask import BlockMask


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The scorer's choice in one attention call of one layer, by query block (mask.block_q rows)."""

    layer: LayerInfo
    query: torch.Tensor  # [B, Hq, Tq, D]
    key: torch.Tensor  # [B, Hkv, Tk, D]
    log_shares: torch.Tensor  # [B, Hq, Q, Kb], of the neediest row; -inf: forced, ahead, or no share at all
    log_thresholds: torch.Tensor  # [Hq, Q]: blocks above it are kept
    mask: BlockMask


SelectionObserver = Callable[[Selection], None]
