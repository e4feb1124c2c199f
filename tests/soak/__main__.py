"""Is any answer lost while everything that may die dies? The whole app on Ray, for as long as one likes.

    python -m tests.soak --minutes 20

A tiny model answers an open stream of greedy requests. A rollout takes its share from 0 to 95% and an abort
takes it back, again and again, while each replica, the controller, the auditor and one ingress are killed or
stopped in turn. Every answer has to be whole, and its tokens those of an undisturbed run. Progress goes to
stderr, one JSON document to stdout; the exit code is 1 where an answer was lost.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.soak.story import Options, run


def main() -> int:
    """Run the soak in a folder of its own and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second [default: 1]")
    parser.add_argument("--tokens", type=int, default=400, help="of each answer [default: 400]")
    parser.add_argument("--json", type=Path, help="write the document to this file, too")
    parser.add_argument(
        "--folder", type=Path, help="where the app lives; kept [default: one that is removed]"
    )
    given = parser.parse_args()
    options = Options(seconds=given.minutes * 60, rate=given.rate, max_tokens=given.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = run(folder, options, say=lambda text: print(text, file=sys.stderr, flush=True))
    text = json.dumps(found, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")
    return 0 if found["num_wrong"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
