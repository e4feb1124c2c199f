"""How many units `no_harm` must have seen of what was served, before silence of its evidence says anything.

Served values cannot be asked for proof in a healthy service, and twice their bound shows late: at 5 % it
takes a fast stage twice as many sessions as all else. So what must have had the time to show is *gross* harm,
in 95 % of the candidates that do it: GROSS times the bound, and of failures what the breaker calls failing
where that is more (so less than that may pass unseen, F10 says how often); of a ratio while dense does not
fail at all.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.special import betainc

from sentei.policies.evidence.base import log_mean_exp, log_threshold
from sentei.policies.evidence.betting import NOTICED
from sentei.policies.evidence.counts import RATIO_TILTS, Split, beta_binomial_boundary

GROSS = 4.0
_LIMIT = 16_384  # units; a bound so tight is beyond what no_harm can watch


@lru_cache(maxsize=256)
def hits_to_notice(bound: float, chance: float, alpha: float) -> int:
    """After how many units F5 has called 95 % of the candidates with that chance of a hit harmful; exact.

    The number of hits walks up its binomial tree, and what reaches the boundary is taken out.
    """
    size = 128
    while size <= _LIMIT:
        boundary = beta_binomial_boundary(
            bound=bound, direction="harm", threshold=log_threshold(alpha), max_units=size
        )
        alive, found = np.zeros(size + 1), 0.0
        alive[0] = 1.0
        for units in range(1, size + 1):
            alive[1:] = alive[1:] * (1 - chance) + alive[:-1] * chance
            alive[0] *= 1 - chance
            limit = int(boundary[units])
            if limit <= units:
                found += float(alive[limit:].sum())
                alive[limit:] = 0.0
            if found >= NOTICED:
                return units
        size *= 2
    return _LIMIT


@lru_cache(maxsize=256)
def events_to_notice(ratio: float, share: float, alpha: float, failure_share: float) -> int:
    """After how many units of sparse F6 has called 95 % of the candidates that fail so often harmful.

    Dense does not fail, so each failure moves the evidence alike, and so many in a row prove harm; that they
    have come is a binomial tail.
    """
    if not 0 < share < 1:
        return 1  # there is no second arm, so nothing is ever proven
    weight = share * ratio
    one = Split.start(RATIO_TILTS).update(1, 1, weight / (weight + 1 - share))
    failures = 1
    while log_mean_exp(tuple(failures * log for log in one.logs)) < log_threshold(alpha):
        failures += 1
        if failures >= _LIMIT:
            return _LIMIT
    units = failures
    while units < _LIMIT and betainc(failures, units - failures + 1, min(failure_share, 0.999)) < NOTICED:
        units += max(1, units // 50)
    return min(units, _LIMIT)
