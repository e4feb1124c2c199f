"""One broken rule of a policy, and how its place and its words are written."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """One broken rule; the path starts at `spec`."""

    path: Path
    value: object
    message: str

    @property
    def dotted(self) -> str:
        """The path as people write it: spec.stages[1].share."""
        return dotted_path(("spec", *self.path))


def dotted_path(path: Iterable[str | int]) -> str:
    """A path as people write it, such as spec.stages[1].share."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' for the known name nearest to the word, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{found[0]}"?' if found else ""
