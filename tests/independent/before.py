"""What the rows of the table were: the same code, run on the last version before evidence was reworked.

    python -m tests.independent.before [--rows A1,B9]

Checks that version out beside this one for as long as it takes, and keeps what was counted in `before.json`.
Rows of the running app are not run on it; of them stands what the issue that asked for the rework says.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.independent.counting import Count
from tests.independent.table import BEFORE

COMMIT = "e4b6c64"
AS_THE_ISSUE_STATES_IT = {
    "B10-rate": "not caught in 75 s, as the issue states it",
    "B10-overload": "not stated",
    "B13-alive": "not stated",
    "B13-dead": "119 s, as the issue states it",
    "B13-stopped": "not stated",
}


def main() -> None:
    """Count, and keep what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="")
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as parent:
        tree = Path(parent) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), COMMIT], cwd=root, check=True)
        try:
            command = [sys.executable, "-m", "tests.independent.table", "--json", "--rows", options.rows]
            environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
            out = subprocess.run(
                command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE
            ).stdout
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=root, check=True)
    known = json.loads(BEFORE.read_text(encoding="utf-8")) if BEFORE.is_file() else {}
    found = {name: str(Count(**counts)) for name, counts in json.loads(out).items()}
    kept = {**known, **found, **AS_THE_ISSUE_STATES_IT}
    BEFORE.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
