"""What every kind of evidence shares: the level that rejects, a stable mean of exponentials, type names."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Direction = Literal["harm", "safe"]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

BETTING_CUT = 0.5  # F1: how much of the capital a bet may risk
FAR = 700.0  # log evidence of what cannot happen under the null; exp(700) is still a float


def log_threshold(alpha: float) -> float:
    """The log evidence that rejects at level alpha: ln(1/alpha)."""
    return -math.log(alpha)


def log_mean_exp(logs: tuple[float, ...]) -> float:
    """log of the mean of exp(logs)."""
    top = max(logs)
    return top + math.log(sum(math.exp(log - top) for log in logs) / len(logs))


def log_mean_exp_paths(logs: Floats) -> Floats:
    """The same over the last axis."""
    top = logs.max(axis=-1)
    return np.asarray(top + np.log(np.exp(logs - top[..., None]).mean(axis=-1)))
