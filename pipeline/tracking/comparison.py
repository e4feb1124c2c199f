"""The figures that runs are compared by: one set of names for dense, every rung and every rollout.

MLflow's compare view draws the metric that was logged first, among those that all chosen runs share, and
the first three params that differ; it lists the rest as tables. So what sparse takes of dense's model time is
logged first, params hold only what a reader would compare runs by, and digests are tags.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sentei.pipeline.reports import first_screen
from sentei.pipeline.reports.figures import ArmFigures, QualityFigures, mean_of_audits, newest_quality
from sentei.pipeline.reports.rollout_report import Report
from sentei.pipeline.reports.wording import outcome_words

# MLflow lists metrics in the order of the alphabet and shows the first seven without scrolling: the names are
# such that these are what it saves, whether that and safety are proven, and what it costs in quality.
MODEL_TIME_RATIO = "gain/model_time_ratio"  # sparse over dense; of a rung over the fastest dense of the run
MONEY = "gain/usd_per_billion_tokens"  # MLflow shows three decimals: of a million too few
GAIN_PROVEN = "proof/gain"  # 1 or 0
SAFETY_PROVEN = "proof/safety"  # 1 or 0
KL = "quality/kl_nats"
PPL_COST = "quality/ppl_cost_pct"
PPL_COST_HIGH = "quality/ppl_cost_pct_high"  # upper end of its 95 % interval
RECALL = "quality/recall"
OTHER_TOKEN = "quality/token_disagreement"
DENSITY = "resources/attention_density"  # kept share of the causal blocks
DROPPED = "resources/dropped_mass_mean"
MEMORY = "resources/peak_mib"
MODEL_TIME = "speed/model_s"  # of an evaluation one prefill; of a rollout one replayed request
TOKENS_PER_S = "speed/tokens_per_s"
TTFT = "speed/ttft_ms_p50"
REQUESTS = "traffic/requests"
SHARE = "traffic/share_peak"

NAME_TAG = "mlflow.runName"
NOTE_TAG = "mlflow.note.content"  # what MLflow shows as the description of a run
Figures = dict[str, float]
RUNG_PARAMS = {"perplexity_cost_pct": PPL_COST, "recall": RECALL}  # beside `rung`: what MLflow's plot shows


def rung_figures(document: Mapping[str, Any], rung: Mapping[str, Any]) -> Figures:
    """One rung of an evaluation's document."""
    fastest = min(rung["prefill_s_by_baseline"].values())
    usd = _usd(document, str(rung["rung"]))
    values = {
        MODEL_TIME_RATIO: rung["prefill_s"] / fastest,
        DENSITY: rung["density"],
        MEMORY: rung["peak_mib"],
        MONEY: None if usd is None else 1000 * usd,
        PPL_COST: rung["ppl_cost_pct"],
        PPL_COST_HIGH: _ppl_high(rung),
        KL: rung["kl_mean"],
        OTHER_TOKEN: 1 - rung["top1_agreement"],
        DROPPED: rung["dropped_mass_mean"],
        RECALL: rung["recall"]["mean"],
        MODEL_TIME: rung["prefill_s"],
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def rung_params(rung: Mapping[str, Any], figures: Mapping[str, float]) -> dict[str, str]:
    """What a rung is compared by; of the figures only those that MLflow's plot would not show as metrics."""
    known = {name: f"{figures[key]:.4g}" for name, key in RUNG_PARAMS.items() if key in figures}
    return {"rung": str(rung["rung"]), **known}


def describe_rung(figures: Mapping[str, float], rung: str, tokens: int) -> str:
    """One rung in a sentence, for its description."""
    text = f"**{rung}**: {figures[MODEL_TIME_RATIO]:.2f} times the model time of the fastest dense "
    text += f"(prefill of {tokens:,} tokens), perplexity {figures[PPL_COST]:+.2f}%"
    if RECALL in figures:
        text += f", {figures[RECALL]:.0%} of the recall tasks right"
    return f"{text}. Measured offline on held-out text; whether it is safe for users only a rollout proves."


def describe_evaluation(document: Mapping[str, Any]) -> str:
    """All rungs beside dense as a table, for the description of the evaluation."""
    head = (
        "rung",
        "blocks kept",
        "model time, of the fastest dense",
        "perplexity",
        "recall",
        "memory",
        "USD per 1G tokens",
    )
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for rung in document["rungs"]:
        found = rung_figures(document, rung)
        cells = (
            rung["rung"],
            f"{found[DENSITY]:.0%}",
            f"{found[MODEL_TIME_RATIO]:.2f}",
            f"{found[PPL_COST]:+.2f}%",
            f"{found[RECALL]:.0%}",
            f"{found[MEMORY]:.0f} MiB" if MEMORY in found else "left out",
            f"{found[MONEY]:.3g}" if MONEY in found else "no price",
        )
        lines.append(" | ".join(cells))
    tokens = f"Prefill of {document['window_tokens']:,} tokens of held-out text, {document['model']}."
    return f"{tokens} Compare the runs below it: dense and each rung.\n\n" + "\n".join(lines)


def decision_figures(report: Report) -> Figures:
    """A rollout by the same names: of all its routed slices, and as variants/<slice>/<variant>/<name>."""
    values: dict[str, float | None] = {}
    saved = {item.key: item for item in report.first_screen.saved}
    time, first, speed, money = (
        saved[key]
        for key in (
            first_screen.MODEL_TIME,
            first_screen.FIRST_TOKEN,
            first_screen.ANSWER_SPEED,
            first_screen.MONEY,
        )
    )
    values |= {MODEL_TIME_RATIO: time.ratio, MODEL_TIME: time.sparse, TTFT: first.sparse}
    values |= {
        TOKENS_PER_S: speed.sparse,
        MONEY: None if money.sparse is None else 1000 * money.sparse,
        SHARE: report.share_peak,
    }
    if (memory := saved.get(first_screen.MEMORY)) is not None:
        values[MEMORY] = memory.sparse
    values[GAIN_PROVEN] = float(report.is_gain_proven)
    asked = [v for v in report.verdicts if v["need"] == "all_safe" and v["is_required"]]
    values[SAFETY_PROVEN] = float(bool(asked) and all(v["verdict"] == "safe" for v in asked))
    values |= _offline(report)
    newest = {item.slice_id: item for item in newest_quality(report.quality)}
    values |= _mean_quality(tuple(newest.values()))
    densities = [item.sparse.density for item in report.slices if item.sparse.density is not None]
    values[DENSITY] = sum(densities) / len(densities) if densities else None
    for item in report.slices:
        for variant, arm in (("dense", item.dense), ("sparse", item.sparse)):
            own = {**_arm(arm), **(_of_variant(newest.get(item.slice_id), variant))}
            values |= {f"variants/{item.slice_id}/{variant}/{name}": value for name, value in own.items()}
    return {name: float(value) for name, value in values.items() if value is not None}


def name_decision(report: Report) -> str:
    """The rollout's id and its verdict, as the name of its run: MLflow shows it wherever it shows runs."""
    return f"{report.rollout.rollout_id}: {outcome_words(report.decided).lower()}"


def describe_decision(report: Report) -> str:
    """The verdict in words, for the description of a rollout's run."""
    screen = report.first_screen
    lines = [f"**{outcome_words(report.decided)}.** {report.headline}", screen.saving_in_words]
    lines += [screen.safety_in_words, f"Why: {report.reason}."]
    if report.outcome == "replaced":
        lines.append("A newer rollout has taken its place since.")
    table = ["what | dense | sparse | rests on", "--- | --- | --- | ---"]
    for item in screen.saved:
        if item.dense is not None and item.sparse is not None:
            table.append(f"{item.name}, {item.unit} | {item.dense:.4g} | {item.sparse:.4g} | {item.words}")
    for cost in screen.spent:
        bound = "no bound" if cost.bound is None else f"allowed {cost.bound:.3g}"
        name = f"{cost.name}, {cost.where}" if cost.where else cost.name
        if cost.measured is not None:
            table.append(f"{name}, {cost.unit} | {bound} | {cost.measured:.3g} | {cost.words}")
    return "\n\n".join(lines) + "\n\n" + "\n".join(table)


def _offline(report: Report) -> dict[str, float | None]:
    """What the evaluation has measured of the rung that it reached."""
    rung = report.evaluated_rung
    if rung is None or "ppl_cost_pct" not in rung:
        return {}
    return {PPL_COST: rung["ppl_cost_pct"], RECALL: (rung.get("recall") or {}).get("mean")}


def _mean_quality(items: tuple[QualityFigures, ...]) -> dict[str, float | None]:
    return {
        KL: mean_of_audits(items, lambda item: item.kl),
        OTHER_TOKEN: mean_of_audits(items, lambda item: item.token_disagreement),
        DROPPED: mean_of_audits(items, lambda item: item.dropped_mass_mean),
    }


def _arm(arm: ArmFigures) -> dict[str, float | None]:
    if not arm.requests:
        return {}
    rate = 1000 / arm.tpot_ms_p50 if arm.tpot_ms_p50 else None
    return {REQUESTS: arm.requests, TTFT: arm.ttft_ms_p50, TOKENS_PER_S: rate, DENSITY: arm.density}


def _of_variant(found: QualityFigures | None, variant: str) -> dict[str, float | None]:
    """What the audits of a slice say of a variant; dense's own quality is its noise against itself."""
    if found is None:
        return {}
    if variant == "dense":
        own = {KL: found.kl_floor, OTHER_TOKEN: found.token_disagreement_floor}
        return {MODEL_TIME: found.dense_compute_s_mean, MODEL_TIME_RATIO: 1.0, **own}
    return {
        MODEL_TIME: found.sparse_compute_s_mean,
        MODEL_TIME_RATIO: found.compute_ratio,
        KL: found.kl,
        OTHER_TOKEN: found.token_disagreement,
        DROPPED: found.dropped_mass_mean,
    }


def _ppl_high(rung: Mapping[str, Any]) -> float | None:
    interval = rung.get("nll_delta_ci")
    return None if not interval else 100 * math.expm1(interval[1])


def _usd(document: Mapping[str, Any], rung: str) -> float | None:
    """The price on the first machine of the same size as the one that was measured, else on the first."""
    rows = [row for row in document["costs"]["rows"] if row["rung"] == rung]
    return min(rows, key=lambda row: not row["is_same_size"])["usd_per_million_tokens"] if rows else None
