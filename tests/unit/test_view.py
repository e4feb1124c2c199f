"""What operators read in a terminal: everything that people wrote comes out as they wrote it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from sentei.pipeline.cli.view import history_table, rollout_panel, rollouts_table

ODD = "[/x] [bold red]not style[/] [link=a]"
FOUND: dict[str, Any] = {
    "rollout_id": "r1",
    "policy_name": ODD,
    "phase": "running",
    "outcome": None,
    "by": ODD,
    "stage_id": "half",
    "rung_id": "mild",
    "created_at_s": 1_790_000_000.0,
    "stage_entered_s": 1_790_003_600.0,
    "reason": ODD,
    "waits_for": "evidence",
    "waits_because": f"long: 3 of 20 units {ODD}",
    "about": {"started_by": "ann"},
    "approvals": [
        {
            "seq": 4,
            "at_s": 1_790_001_800.0,
            "kind": "approve",
            "stage_id": "shadow",
            "reason": "approved by bob",
        }
    ],
    "routes": [
        {
            "slice_id": "long",
            "min_tokens": 0,
            "max_tokens": 9,
            "share": 0.5,
            "rung_id": "mild",
            "audit_share": 0.1,
        }
    ],
    "verdicts": [{"guardrail_id": "agree", "slice_id": "long", "verdict": "safe", "units": 3, "reason": ODD}],
    "events": [{"seq": 5, "at_s": 1_790_003_600.0, "kind": "pause", "stage_id": "half", "reason": ODD}],
}


def printed(picture: Any) -> str:
    """What a wide terminal shows."""
    console = Console(file=io.StringIO(), width=250)
    console.print(picture)
    text = console.file
    assert isinstance(text, io.StringIO)
    return text.getvalue()


@pytest.mark.parametrize("name", ["history", "panel", "list"])
def test_a_reason_with_brackets_is_shown_as_it_is(name: str) -> None:
    """No reason is read as markup: nothing dies, nothing vanishes."""
    make = {"history": history_table, "panel": rollout_panel, "list": lambda found: rollouts_table([found])}

    assert ODD in printed(make[name](FOUND))


def test_status_says_what_it_waits_for_since_when_and_who_approved() -> None:
    """Dates with their days, the wait with its reason, each approval with its stage."""
    text = printed(rollout_panel(FOUND))

    assert "waits for evidence: long: 3 of 20 units" in text
    assert "started 2026-09-2" in text
    assert "stage since 2026-09-2" in text
    assert "started by ann" in text
    assert "approved by bob in stage shadow, 2026-09-2" in text
