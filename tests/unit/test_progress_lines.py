"""Progress where stderr is a file: a line when a step begins, now and then, and when it ends."""

from __future__ import annotations

import pytest

from sentei.pipeline.cli import output
from sentei.pipeline.cli.output import Output


def test_long_steps_tell_where_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every half minute, and not at each of a thousand quick ones."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(output.time, "monotonic", lambda: float(next(clock)))

    with Output(as_json=True).progress() as progress:
        for done in range(9):
            progress("recall tasks", done, 8)

    told = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert told[0] == "recall tasks: 0 of 8"
    assert told[-1] == "recall tasks: 8 of 8"
    assert 3 <= len(told) <= 6
