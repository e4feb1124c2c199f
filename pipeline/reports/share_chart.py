"""The candidate's share over time as inline SVG: a step line, with a mark where something was decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from markupsafe import Markup

WIDTH, HEIGHT = 920, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 34
_GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
_MARKS = {
    "rollback": "harm",
    "to_dense": "harm",
    "rung_down": "harm",
    "shelter": "harm",
    "promote": "safe",
    "pause": "hold",
    "held": "hold",
}


class Mark(Protocol):
    """An entry of the timeline."""

    @property
    def at_s(self) -> float:
        """When."""

    @property
    def kind(self) -> str:
        """What."""

    @property
    def share(self) -> float:
        """The share after it."""

    @property
    def stage_id(self) -> str:
        """The stage after it."""


def draw_share(shares: Sequence[tuple[float, float]], marks: Sequence[Mark]) -> Markup:
    """Return the chart; times are seconds since the first event."""
    begin, end = shares[0][0], max(shares[-1][0], shares[0][0] + 1.0)

    def x(at_s: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (at_s - begin) / (end - begin)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [_grid(y), _step_line(shares, x, y, end)]
    parts += [_label_time(x, begin, begin + (end - begin) * i / 4) for i in range(5)]
    parts += [_stage_names(marks, x, end)]
    parts += [_mark(mark, x(mark.at_s), y(mark.share)) for mark in marks if mark.kind in _MARKS]
    body = Markup("").join(parts)
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="candidate share over time">{}</svg>'
    ).format(WIDTH, HEIGHT, body)


class _Axis(Protocol):
    def __call__(self, value: float, /) -> float: ...


def _grid(y: _Axis) -> Markup:
    line = Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text x="{}" y="{:.1f}">{}</text>'
    )
    return Markup("").join(
        line.format(LEFT, WIDTH - RIGHT, y(level), y(level), 4, y(level) + 4, f"{level:.0%}")
        for level in _GRID
    )


def _step_line(shares: Sequence[tuple[float, float]], x: _Axis, y: _Axis, end: float) -> Markup:
    corners: list[tuple[float, float]] = []
    for at_s, share in shares:
        if corners and corners[-1][1] != share:
            corners.append((at_s, corners[-1][1]))
        if not corners or corners[-1][1] != share:
            corners.append((at_s, share))
    corners.append((end, corners[-1][1]))
    points = " ".join(f"{x(at_s):.1f},{y(share):.1f}" for at_s, share in corners)
    base = f"{x(end):.1f},{y(0):.1f} {x(corners[0][0]):.1f},{y(0):.1f}"
    return Markup('<polygon class="area" points="{} {}"/><polyline class="line" points="{}"/>').format(
        points, base, points
    )


def _label_time(x: _Axis, begin: float, at_s: float) -> Markup:
    seconds = at_s - begin
    text = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    if seconds >= 36_000:
        text = f"{seconds / 3600:.1f} h"
    anchor = "start" if seconds == 0 else "end" if x(at_s) > WIDTH - 60 else "middle"
    return Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
        x(at_s), HEIGHT - 14, anchor, text
    )


def _stage_names(marks: Sequence[Mark], x: _Axis, end: float) -> Markup:
    starts: list[tuple[str, float]] = []
    for mark in marks:
        if not starts or starts[-1][0] != mark.stage_id:
            starts.append((mark.stage_id, mark.at_s))
    names = []
    for i, (stage_id, at_s) in enumerate(starts):
        until = starts[i + 1][1] if i + 1 < len(starts) else end
        width = x(until) - x(at_s)
        names.append(
            Markup('<line class="stage" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(
                x(at_s), TOP - 10, HEIGHT - BOTTOM
            )
        )
        if width > 7 * len(stage_id) + 8:
            names.append(
                Markup('<text class="name" x="{:.1f}" y="{}">{}</text>').format(
                    x(at_s) + 4, TOP - 8, stage_id
                )
            )
    return Markup("").join(names)


def _mark(mark: Mark, x: float, y: float) -> Markup:
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="5"><title>{}</title></circle>').format(
        _MARKS[mark.kind], x, y, mark.kind
    )
