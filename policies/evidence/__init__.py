"""Evidence that may be looked at after every unit: e-processes, in log space, one frozen state each.

The base fact (Ville): if E >= 0 starts at 1 and does not grow on average under the null hypothesis, then it
ever reaches 1/a with probability at most a. So each state keeps its running maximum, and a null once
rejected stays rejected. The statistical unit is the session: one value per session, never one per request,
or correlation inside sessions breaks every guarantee (docs/statistics.md F11: 63 % false "safe").

Each state has a constant size, `update` returns a new one, feeding units one by one or in any batches gives
the same bytes, and `log_e_max >= ln(1/a)` is the decision. The functions over blocks do the same for many
simulated streams at once. docs/statistics.md has the formulas F1 to F17, each with its source, its guarantee
and its test. The error budget over guardrails, slices and fresh starts (F10) is `policies.schema.budget`.
"""

from __future__ import annotations

from sentei.policies.evidence.base import BETTING_CUT, Direction, Floats, log_threshold
from sentei.policies.evidence.betting import (
    PAIRED_CUT,
    Betting,
    paired_bound,
    paired_excess,
    units_to_notice,
    units_to_prove,
)
from sentei.policies.evidence.counts import (
    RATIO_TILTS,
    SRM_TILTS,
    BetaBinomial,
    Split,
    beta_binomial_boundary,
)
from sentei.policies.evidence.interval import INTERVAL_ALPHA, Interval
from sentei.policies.evidence.notice import GROSS, events_to_notice, hits_to_notice
from sentei.policies.evidence.watch import DETECTOR_BETS, Detector

__all__ = [
    "BETTING_CUT",
    "DETECTOR_BETS",
    "GROSS",
    "INTERVAL_ALPHA",
    "PAIRED_CUT",
    "RATIO_TILTS",
    "SRM_TILTS",
    "BetaBinomial",
    "Betting",
    "Detector",
    "Direction",
    "Evidence",
    "Floats",
    "Interval",
    "Split",
    "beta_binomial_boundary",
    "events_to_notice",
    "hits_to_notice",
    "log_threshold",
    "paired_bound",
    "paired_excess",
    "units_to_notice",
    "units_to_prove",
]

Evidence = Betting | BetaBinomial | Split  # what a verdict rests on, in one direction
