"""How every command speaks: one JSON document with `--json`, else readable text; progress on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 30.0  # of a step's progress where stderr is a file


class ExitCode(IntEnum):
    """Exit codes of every command; documented in README.md."""

    OK = 0
    FAILED = 1  # the work was done and its answer is no (a rollout that should have been promoted was not)
    BAD_INPUT = 2  # a file, an option or a name is wrong: nothing was done
    UNREACHABLE = 3  # a server, a database, a model or an extra is not there
    INTERRUPTED = 130  # Ctrl-C


WIDTH_IN_FILES = 160  # a pipe or a log has no edge at which a table would have to be cut


class Output:
    """Print for people or for machines; people's lines go to stderr when stdout belongs to a machine."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.console = _console(stderr=as_json)
        self.errors = _console(stderr=True)

    def say(self, *lines: RenderableType) -> None:
        """Print for people."""
        for line in lines:
            self.console.print(line)

    def emit(self, document: Any) -> None:
        """Print the command's one JSON document, if it was asked for."""
        if self.as_json:
            json.dump(document, sys.stdout, indent=2, sort_keys=False, default=str)
            sys.stdout.write("\n")

    def fail(self, message: str) -> None:
        """Print an error for people, without markup of its own being read as style."""
        self.errors.print("error:", style="bold red", end=" ")
        self.errors.print(message, markup=False, highlight=False)

    @contextmanager
    def progress(self) -> Iterator[ProgressBars]:
        """Show progress bars with remaining time on stderr while the block runs."""
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.errors, disable=not self.errors.is_terminal) as bars:
            yield ProgressBars(bars)


def check_choice(option: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse values of an option that are not among the allowed ones, by name."""
    known = list(allowed)
    if unknown := sorted(set(given) - set(known)):
        raise typer.BadParameter(
            f"{', '.join(map(repr, unknown))}; choose from {', '.join(known)}", param_hint=option
        )


class ProgressBars:
    """One bar per step name: the `progress(step, done, total)` callable that pipeline steps take.

    Where stderr is a file, each step gets a line when it begins, one each half minute, and one when it ends.
    """

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}
        self._told_s = 0.0

    def __call__(self, step: str, done: int, total: int) -> None:
        """Move the bar of `step` to `done` of `total`."""
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(step, total=total)
        self._bars.update(self._tasks[step], completed=done, total=total)
        is_due = done in (0, total) or time.monotonic() - self._told_s >= LINE_EVERY_S
        if self._bars.disable and is_due:
            self._told_s = time.monotonic()
            clock = time.strftime("%H:%M:%S")
            self._bars.console.print(f"{clock} {step}: {done} of {total}", highlight=False)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_IN_FILES
    return console
