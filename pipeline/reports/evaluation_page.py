"""The evaluation as one page: every rung beside dense, the recall grid, the user's tasks, the money."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentei.pipeline.reports.pages import render_template


def save_evaluation_page(document: Mapping[str, Any], path: Path, *, trade_off: str = "") -> Path:
    """Write the page of an evaluation's document; `trade_off` names the plot that lies beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_evaluation(document, trade_off=trade_off), encoding="utf-8")
    return path


def render_evaluation(document: Mapping[str, Any], *, trade_off: str = "") -> str:
    """Return the page, without scripts, fonts or pictures from elsewhere."""
    return render_template("evaluation.html", e=document, trade_off=trade_off)
