"""Which extras of the package a command needs: looked up before it begins, and said in one line."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution, requires
from typing import ParamSpec, TypeVar

from sentei.errors import SenteiError

PACKAGE = "sentei"
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(\[(?P<extras>[^\]]*)\])?")
_EXTRA = re.compile(r"extra == [\"'](?P<extra>[\w.-]+)[\"']")

P = ParamSpec("P")
R = TypeVar("R")


class MissingExtraError(SenteiError):
    """An extra of the package is not installed; the message says which, and the command that installs it."""

    is_absent = True


def needs(*extras: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a command begin only where these extras are installed; its `--help` needs none."""

    def guard(command: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            check_extras(*extras)
            return command(*args, **kwargs)

        return run

    return guard


def check_extras(*extras: str, requirements: Sequence[str] | None = None) -> None:
    """Raise MissingExtraError where a package of these extras is not installed.

    The requirements are those of the installed Sentei where none are given. What is wanted on some platforms
    only is not looked for; where Sentei runs from its source folder, never installed, nothing is missing.
    """
    lines = _own_requirements() if requirements is None else requirements
    wanted = dict.fromkeys(name for extra in extras for name in packages_of(lines, extra))
    lacking = [name for name in wanted if not _is_installed(name)]
    if lacking:
        rest = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise MissingExtraError(
            f"this command needs {lacking[0]}{rest}, not installed here: "
            f"pip install '{PACKAGE}[{','.join(extras)}]'"
        )


def _own_requirements() -> Sequence[str]:
    try:
        return requires(PACKAGE) or []
    except PackageNotFoundError:
        return []


def packages_of(lines: Sequence[str], extra: str) -> Iterator[str]:
    """The packages of an extra, and of extras inside it, out of the `Requires-Dist` lines of metadata."""
    for line in lines:
        requirement, _, marker = line.partition(";")
        wanted, found = _EXTRA.search(marker), _REQUIREMENT.match(requirement)
        if wanted is None or found is None or wanted["extra"] != extra or "platform_" in marker:
            continue
        if found["name"] != PACKAGE:
            yield found["name"]
        for inner in (found["extras"] or "").split(",") if found["name"] == PACKAGE else ():
            yield from packages_of(lines, inner.strip())


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
