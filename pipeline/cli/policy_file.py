"""A policy file as text; what is no text names the file."""

from __future__ import annotations

from pathlib import Path


def read_policy_file(path: Path) -> str:
    """The text of a policy file; ValueError for one that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8 text") from error
