"""How often is harm promoted, and health stopped? The table of docs/statistics.md, by one command.

    python -m tests.independent.table                    # all that needs no running app; prints progress
    python -m tests.independent.table --rows A1,B9       # some of it
    python -m tests.independent.table --live             # B10 and B13: the app itself, alone on the machine
    python -m tests.independent.before                   # the same rows on the code of before, kept here

Rows are counted by code that is written anew in this folder, from streams that know nothing of
`policies/simulation`; only what is under judgement is the product's (`product.py`). Intervals are Clopper and
Pearson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
from pathlib import Path

from tests.independent import rows_artifact, rows_live, rows_rules, rows_store, rows_streams
from tests.independent.counting import Count, Row, chosen

BEFORE = Path(__file__).with_name("before.json")
SHOW_S = 10.0  # between two lines of progress


def all_rows() -> tuple[Row, ...]:
    """Every line of the table, in the order of the issue."""
    parts = (rows_streams, rows_rules, rows_artifact, rows_store, rows_live)
    found = [row for part in parts for row in part.rows()]
    return tuple(sorted(found, key=lambda row: (row.id[0], int(row.id[1:] or 0))))


def measure(row: Row, trials: int) -> Count:
    """Count one row; how far it is goes to stderr."""
    shown_s = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown_s
        if time.monotonic() - shown_s >= SHOW_S:
            shown_s = time.monotonic()
            print(f"  {row.name}: {done} of {total}", file=sys.stderr, flush=True)

    return row.measure(trials, progress)


def _noted(then: str, now: str) -> str:
    """What goes with the counts of before and of now, said once where it is the same."""
    if then == now:
        return now
    return "; ".join(f"{when}: {note}" for when, note in (("before", then), ("now", now)) if note)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="", help="such as A1,B9: points of the issue, or names of rows")
    parser.add_argument("--trials", type=int, help="at most so many of each; default: as the row says")
    parser.add_argument("--live", action="store_true", help="the rows of the running app instead")
    parser.add_argument("--json", action="store_true", help="one JSON document of counts instead of a table")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # what the product says of stepping clocks is no part of the table
    before = json.loads(BEFORE.read_text(encoding="utf-8")) if BEFORE.is_file() else {}
    counts: dict[str, dict[str, object]] = {}
    if not options.json:
        cores = os.cpu_count()
        print(f"<!-- {platform.machine()}, {cores} cores, Python {platform.python_version()} -->")
        print(
            "| | what must not happen | before | now | exact 95% | asked | noted |\n" + "|---" * 7 + "|",
            flush=True,
        )
    for row in chosen(all_rows(), options.rows, live=options.live):
        trials = row.trials if options.trials is None else min(options.trials, row.trials)
        row_s = time.process_time()
        found = measure(row, trials)
        low, high = found.limits
        counts[row.name] = {"hits": found.hits, "trials": found.trials, "note": found.note}
        print(
            f"{row.name}: {found} in {time.process_time() - row_s:.0f} s of one core",
            file=sys.stderr,
            flush=True,
        )
        if not options.json:
            was, _, then = before.get(row.name, "").partition(", ")
            now = f"{found.hits} of {found.trials}"
            cells = (row.id, row.about, was, now, f"{low:.1%} to {high:.1%}", row.promise)
            print(f"| {' | '.join(cells)} | {_noted(then, found.note)} |", flush=True)
    if options.json:
        print(json.dumps(counts, indent=1))
    print(f"{time.process_time():.0f} s of one core in all", file=sys.stderr)


if __name__ == "__main__":
    main()
