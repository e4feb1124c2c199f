"""The report's first screen: what it saved, what it cost in quality, and whether either is proven.

Everything here is taken from figures and verdicts that the rest of the report shows in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sentei.pipeline.evaluation.prices import Price, load_prices
from sentei.pipeline.reports.figures import (
    QualityFigures,
    Savings,
    SliceFigures,
    find_rung,
    mean_of_arms,
    mean_of_audits,
    paired_quality,
)

Verdict = Mapping[str, Any]
PROVEN, MEASURED, OPEN, AGAINST = "proven", "measured", "open", "against"
MODEL_TIME, FIRST_TOKEN, ANSWER_SPEED = "model_time", "first_token", "answer_speed"
MONEY, MEMORY = "money", "memory"
PERPLEXITY, RECALL = "perplexity", "recall"


@dataclass(frozen=True, slots=True)
class Saved:
    """One line of what was saved: dense beside sparse; of `ratio`, sparse over dense, less is better.

    Of a rate it is the ratio of the times behind it.
    """

    key: str  # MODEL_TIME, FIRST_TOKEN, ANSWER_SPEED, MONEY or MEMORY
    name: str  # for readers
    about: str
    unit: str  # "s", "ms", "tokens/s", "usd", "mib"
    dense: float | None
    sparse: float | None
    ratio: float | None
    proof: str  # PROVEN, MEASURED, OPEN or AGAINST
    words: str  # what it rests on, or why there is no figure


@dataclass(frozen=True, slots=True)
class Spent:
    """One line of what it cost in quality; `used` is the part of its bound, None where it has none."""

    key: str  # of a guardrail its metric, such as "audit.kl"; else PERPLEXITY or RECALL
    name: str  # for readers
    where: str
    measured: float | None
    low: float | None
    high: float | None
    bound: float | None
    used: float | None
    unit: str  # "share", "nats", "percent"
    proof: str
    words: str


@dataclass(frozen=True, slots=True)
class FirstScreen:
    """The answers to the three questions, in words and as lines."""

    saved: tuple[Saved, ...]
    spent: tuple[Spent, ...]
    saving_in_words: str
    safety_in_words: str


def first_screen(
    *,
    slices: Sequence[SliceFigures],
    newest: Sequence[QualityFigures],
    rung_id: str,
    savings: Savings,
    verdicts: Sequence[Verdict],
    gains: Sequence[Verdict],
    evaluation: Mapping[str, Any] | None,
) -> FirstScreen:
    """Gather the first screen; `evaluation` is the document of `sentei evaluate`, if there is one.

    `newest` is that of newest_quality(), and `rung_id` the rung that the rollout reached, "" before an audit.
    """
    known = find_rung(evaluation, rung_id)
    return FirstScreen(
        saved=(
            _model_time(newest, savings, _gain_proof(verdicts, gains)),
            *_latency(slices, savings),
            _money(newest, evaluation),
            *_memory(evaluation, known, rung_id),
        ),
        spent=(*_guardrails(verdicts), *_offline(known, rung_id)),
        saving_in_words=_saving_in_words(gains) if verdicts else "Whether it saves was not judged yet.",
        safety_in_words=_safety_in_words(verdicts) if verdicts else "Whether it is safe was not judged yet.",
    )


def _model_time(newest: Sequence[QualityFigures], saved: Savings, proven: tuple[str, str]) -> Saved:
    paired = paired_quality(newest)
    num = sum(item.scored for item in paired)
    dense = mean_of_audits(paired, lambda item: item.dense_compute_s_mean)
    sparse = mean_of_audits(paired, lambda item: item.sparse_compute_s_mean)
    change = saved.paired_compute_change
    proof, words = proven
    if change is None:
        words = "no request was replayed through both yet"
    return Saved(
        MODEL_TIME,
        "Model time",
        f"per request, the same {num:,} through both" if num else "per request",
        "s",
        dense,
        sparse,
        None if change is None else 1 + change,
        proof,
        words,
    )


def _gain_proof(verdicts: Sequence[Verdict], gains: Sequence[Verdict]) -> tuple[str, str]:
    if not verdicts:
        return OPEN, "not judged yet"
    if not gains:
        return MEASURED, "the policy asks for no gain"
    proofs = [({"gain": PROVEN, "no_gain": AGAINST}.get(item["verdict"], OPEN), item) for item in gains]
    proof, weakest = min(proofs, key=lambda pair: (AGAINST, OPEN, PROVEN).index(pair[0]))
    return proof, _range_words(weakest)


def _range_words(gain: Verdict) -> str:
    if gain.get("mean") is None:
        return f"no model time compared yet; at most {gain['bound']:.3g} times dense is asked"
    text = f"{gain['mean']:.3g} times dense per session"
    if gain.get("low") is not None:
        text += f" ({gain['low']:.3g} to {gain['high']:.3g} with 95%)"
    asked = {
        "gain": f"proven below {gain['bound']:.3g}",
        "no_gain": f"proven above {gain['bound']:.3g}",
    }.get(gain["verdict"], f"at most {gain['bound']:.3g} is asked and not proven")
    return f"{text}, {asked}"


def _latency(slices: Sequence[SliceFigures], saved: Savings) -> Iterator[Saved]:
    compared = [item for item in slices if item.dense.answered and item.sparse.answered]
    dense, sparse = (sum(getattr(item, arm).answered for item in compared) for arm in ("dense", "sparse"))
    few = "; few, so this may be chance" if saved.is_few else ""
    words = f"medians of {dense:,} dense and {sparse:,} sparse answers{few}"
    if not compared:
        served = sum(item.sparse.answered for item in slices)
        words = (
            "dense answered nobody in the slices that sparse served" if served else "sparse served nobody yet"
        )
    first = mean_of_arms(compared, lambda arm: arm.ttft_ms_p50)
    yield Saved(
        FIRST_TOKEN,
        "First token",
        "median wait",
        "ms",
        None if first is None else first[0],
        None if first is None else first[1],
        _ratio(saved.ttft_p50_change),
        MEASURED,
        words,
    )
    dense_ms, sparse_ms = mean_of_arms(compared, lambda arm: arm.tpot_ms_p50) or (None, None)
    if compared and saved.tpot_p50_change is None:
        words = "every answer was a single token"
    change = _ratio(saved.tpot_p50_change)
    yield Saved(
        ANSWER_SPEED,
        "Answer speed",
        "after the first token, median",
        "tokens/s",
        1000 / dense_ms if dense_ms else None,
        1000 / sparse_ms if sparse_ms else None,
        change,
        MEASURED,
        words,
    )


def _money(newest: Sequence[QualityFigures], evaluation: Mapping[str, Any] | None) -> Saved:
    name, about = "Money", "per million tokens"
    paired = paired_quality(newest)
    tokens = sum(item.tokens for item in paired)
    if evaluation is None or not evaluation.get("costs"):
        return Saved(MONEY, name, about, "usd", None, None, None, OPEN, "no price: no evaluation is at hand")
    price = _price(evaluation["costs"])
    if price is None or not tokens:
        why = "no price for this kind of machine" if price is None else "no request was replayed yet"
        return Saved(MONEY, name, about, "usd", None, None, None, OPEN, why)
    about += f", the same {sum(item.scored for item in paired):,} requests through both"
    dense = sum(item.scored * (item.dense_compute_s_mean or 0.0) for item in paired)
    sparse = sum(item.scored * (item.sparse_compute_s_mean or 0.0) for item in paired)
    usd_per_s = price.usd_per_hour / (price.cpus or 1) / 3600 / tokens * 1e6
    words = (
        f"{price.label} at {price.usd_per_hour:g} USD an hour, list price of {price.as_of}; without audits"
    )
    ratio = sparse / dense if dense else None
    return Saved(MONEY, name, about, "usd", usd_per_s * dense, usd_per_s * sparse, ratio, MEASURED, words)


def _price(costs: Mapping[str, Any]) -> Price | None:
    """The first machine of the kind that was measured, one of the same size first."""
    device = costs["machine"]["device"]
    fitting = [price for price in load_prices().prices if price.device == device]
    return min(fitting, key=lambda price: price.cpus != costs["machine"]["cpus"], default=None)


def _memory(
    evaluation: Mapping[str, Any] | None, known: Mapping[str, Any] | None, rung: str
) -> Iterator[Saved]:
    dense = find_rung(evaluation, "dense")
    peaks = [item.get("peak_mib") if item else None for item in (dense, known)]
    if evaluation is None or None in peaks or not peaks[0]:
        return
    about = f"beyond the model, prefill of {evaluation['window_tokens']:,} tokens"
    words = f"offline, rung {rung}"
    ratio = peaks[1] / peaks[0]
    yield Saved(MEMORY, "Memory at peak", about, "mib", peaks[0], peaks[1], ratio, MEASURED, words)


def _guardrails(verdicts: Sequence[Verdict]) -> Iterator[Spent]:
    for item in verdicts:
        if item.get("bound_kind") not in ("max", "excess_over_floor") or item.get("mean") is None:
            continue
        proof = {"safe": PROVEN, "harm": AGAINST}.get(item["verdict"], OPEN)
        words = {
            "safe": "proven to stay within its bound",
            "harm": "proven to break its bound",
            "undecided": "no harm seen, not proven",
        }.get(item["verdict"], item["verdict"].replace("_", " "))
        is_asked = item.get("need") != "no_harm"
        yield Spent(
            key=item["value"],
            name=item["about"],
            where="all slices" if item["slice_id"] == "*" else item["slice_id"],
            measured=item["mean"],
            low=item.get("low"),
            high=item.get("high"),
            bound=item["bound"],
            used=max(0.0, item["mean"]) / item["bound"],
            unit=item["unit"],
            proof=proof if is_asked or proof != OPEN else MEASURED,
            words=words if is_asked or proof != OPEN else "no harm seen; no more is asked here",
        )


def _offline(known: Mapping[str, Any] | None, rung: str) -> Iterator[Spent]:
    if known is None or rung == "dense":
        return
    if known.get("ppl_cost_pct") is not None:
        words = f"offline, on held-out text, rung {rung}"
        yield Spent(
            PERPLEXITY,
            "perplexity",
            "",
            known["ppl_cost_pct"],
            None,
            None,
            None,
            None,
            "percent",
            MEASURED,
            words,
        )
    if (recall := known.get("recall")) is not None:
        words = f"offline recall tasks; dense {recall['dense_mean']:.0%}"
        yield Spent(
            RECALL, "right answers", "", recall["mean"], None, None, None, None, "share", MEASURED, words
        )


def _saving_in_words(gains: Sequence[Verdict]) -> str:
    if not gains:
        return "Whether it saves is not proven: the policy asks for no gain."
    parts = [f"{item['slice_id']}: {_range_words(item)}" for item in gains]
    verdicts = {item["verdict"] for item in gains}
    head = "The saving is proven" if verdicts == {"gain"} else "The saving is not proven"
    head = "There is no saving" if "no_gain" in verdicts else head
    return f"{head} ({'; '.join(parts)})."


def _safety_in_words(verdicts: Sequence[Verdict]) -> str:
    asked = [v for v in verdicts if v.get("need") == "all_safe" and v.get("is_required", True)]
    broken = [item["id"] for item in verdicts if item["verdict"] == "harm"]
    safe = [item["id"] for item in asked if item["verdict"] == "safe"]
    if broken:
        return f"It is not safe: harm is proven ({', '.join(dict.fromkeys(broken))})."
    if not asked:
        return "Safety was not asked to be proven; no harm was seen."
    if len(safe) == len(asked):
        names = list(dict.fromkeys(safe))
        proven = "is proven within its bound" if len(names) == 1 else "are proven within their bounds"
        return f"It is safe: {', '.join(names)} {proven}."
    missing = dict.fromkeys(item["id"] for item in asked if item["verdict"] != "safe")
    return f"Safety is not proven yet: {', '.join(missing)} still open; no harm was seen."


def _ratio(change: float | None) -> float | None:
    return None if change is None else 1 + change
