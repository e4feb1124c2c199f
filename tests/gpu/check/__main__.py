"""Run the check: `python tests/gpu/check [--tiny] [--out FOLDER] [--rows PATTERN]`; see docs/kernels.md.

Needs this checkout and a Python with torch and Triton; nothing is installed, and no network is asked.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).resolve().parents[1])]

from check.command import main  # noqa: E402  (the path above comes first)

if __name__ == "__main__":
    sys.exit(main(ROOT))
