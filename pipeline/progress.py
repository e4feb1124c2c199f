"""How long work reports its progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(what is being done, how many parts are done, how many there are)."""
