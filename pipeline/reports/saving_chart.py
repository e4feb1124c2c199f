"""The first screen's picture as inline SVG: what sparse takes of dense's, and of each bound on quality."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from sentei.pipeline.reports.first_screen import AGAINST, MEASURED, MONEY, OPEN, PROVEN, FirstScreen, Spent

WIDTH, HALF, GAP = 960, 470, 20
LABEL, ROW, TOP = 168, 30, 44
MOST = 1.6  # longer bars are cut, and say so by their number
_COLOR = {PROVEN: "safe", AGAINST: "harm", OPEN: "hold", MEASURED: "plain"}
_SHORT = {  # by metric
    "audit.token_disagreement": "other token",
    "audit.kl": "KL",
    "audit.dropped_mass_mean": "dropped mass",
    "audit.dropped_mass_p99": "dropped mass, p99",
    "serve.failed": "failures",
    "serve.ttft_ms": "slow first token",
    "serve.tpot_ms": "slow tokens",
    "serve.total_ms": "slow answers",
}
Bar = tuple[str, float, str, str]  # name, part of the line at 100 %, proof, number


def draw_saving(screen: FirstScreen) -> Markup:
    """Return the picture: left shorter is cheaper, right shorter is nearer to dense; lines are at 100 %."""
    saved = [
        (item.name, item.ratio, item.proof, f"{item.ratio:.0%}")
        for item in screen.saved
        if item.ratio is not None and item.key != MONEY  # the same as model time, by construction
    ]
    spent = [
        (_label(item), item.used, item.proof, f"{item.used:.0%}")
        for item in screen.spent
        if item.used is not None
    ]
    height = TOP + ROW * max(len(saved), len(spent), 1) + 8
    left = _panel(0, "What sparse takes, dense = 100%", saved)
    right = _panel(HALF + GAP, "Quality given up, of what the bound allows", spent)
    label = "what sparse takes of dense's, and the quality that it gives up"
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>').format(
        WIDTH, height, label, left, right
    )


def _panel(x: float, title: str, bars: Sequence[Bar]) -> Markup:
    begin, scale = x + LABEL, (HALF - LABEL - 46) / MOST
    line_x = begin + scale
    parts = [Markup('<text class="name" x="{:.0f}" y="14">{}</text>').format(x, title)]
    if not bars:
        parts.append(Markup('<text x="{:.0f}" y="{}">nothing measured yet</text>').format(x, TOP + 14))
        return Markup("").join(parts)
    for row, (name, value, proof, number) in enumerate(bars):
        y = TOP + ROW * row
        length = scale * min(value, MOST)
        parts.append(
            Markup(
                '<text x="{:.0f}" y="{}">{}</text>'
                '<rect class="{}" x="{:.1f}" y="{}" width="{:.1f}" height="18" rx="2"/>'
                '<text class="value" x="{:.1f}" y="{}">{}</text>'
            ).format(
                x, y + 14, name, _COLOR[proof], begin, y, max(length, 1.0), begin + length + 5, y + 14, number
            )
        )
    bottom = TOP + ROW * len(bars) - 6
    parts.append(
        Markup(
            '<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
            '<text x="{0:.1f}" y="{3}" text-anchor="middle">100%</text>'
        ).format(line_x, TOP - 6, bottom, TOP - 10)
    )
    return Markup("").join(parts)


def _label(item: Spent) -> str:
    """A label that fits: the metric in two words, and its slice."""
    return f"{_SHORT.get(item.key, item.name)}, {item.where}"
