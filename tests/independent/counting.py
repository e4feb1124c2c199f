"""How often something happened, with Clopper and Pearson's interval; and what a row of the table is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scipy.stats import beta

Progress = Callable[[int, int], None]  # how many of how many are done


@dataclass(frozen=True, slots=True)
class Count:
    """So many wrong of so many."""

    hits: int
    trials: int
    note: str = ""

    @property
    def limits(self) -> tuple[float, float]:
        """The exact 95 % interval of the share."""
        low = 0.0 if self.hits == 0 else float(beta.ppf(0.025, self.hits, self.trials - self.hits + 1))
        is_all = self.hits == self.trials
        high = 1.0 if is_all else float(beta.ppf(0.975, self.hits + 1, self.trials - self.hits))
        return low, high

    def __str__(self) -> str:
        """The count as the table has it."""
        return f"{self.hits} of {self.trials}" + (f", {self.note}" if self.note else "")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what must not happen, how it is counted, and what was promised."""

    id: str  # of the point, or "H" for what is healthy
    about: str
    promise: str
    measure: Callable[[int, Progress], Count]
    trials: int
    is_live: bool = False  # needs the running app, and minutes
    key: str = ""  # names it in the file of what it was before

    @property
    def name(self) -> str:
        """Its own name, also where a point has several rows."""
        return f"{self.id}-{self.key}" if self.key else self.id


def count(trials: int, progress: Progress, is_wrong: Callable[[int], bool]) -> Count:
    """Try so many times, each with its own seed."""
    hits = 0
    for seed in range(trials):
        hits += is_wrong(seed)
        progress(seed + 1, trials)
    return Count(hits, trials)


def chosen(rows: Iterable[Row], wanted: str, *, live: bool) -> list[Row]:
    """The rows of a list such as "A1,B9"; all that need no app where nothing is wanted."""
    names = {name.strip() for name in wanted.split(",") if name.strip()}
    found = [row for row in rows if not names or {row.id, row.name} & names]
    return [row for row in found if row.is_live == live]
