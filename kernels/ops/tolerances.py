"""Every numeric bound of the attention operations, and why it stands."""

from __future__ import annotations

import torch
from torch import Tensor

# A backend may be at most this many times as far from the fp32 definition as plain PyTorch in the same
# precision (flash-attention's rule): the factor allows another order of summation, and nothing else.
ERROR_RATIO_MAX = 2.0

# Floors below which a ratio means nothing: about 16 roundings at the magnitude 1 of a softmax average.
# FlexAttention's CPU program also uses an exponential that is good to 20 ulp in fp32.
ERROR_FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}

# Sums of probabilities in fp32 over up to 32k keys: rounding grows with the square root of their number.
MASS_SUM_ATOL = 1e-4

# Log shares from features of 8 bits against those from fp32, root mean square, in nats: a step of 4 standard
# deviations over 127 moves a score of unit spread by 0.01, and the exponential in steps by 0.06 at most;
# measured 0.003 to 0.011. A threshold, itself fitted on samples, does not notice a share that is off by 2%.
BYTE_SCORE_RMS = 0.02


def allowed_error(plain: Tensor, exact: Tensor) -> float:
    """The largest absolute error allowed, from what plain PyTorch in the same precision (`plain`) commits."""
    own = float((plain.float() - exact.float()).abs().max()) if exact.numel() else 0.0
    return ERROR_RATIO_MAX * own + ERROR_FLOOR[plain.dtype]
