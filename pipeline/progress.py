"""How long work reports its progress."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Progress = Callable[[str, int, int], None]
"""(what is being done, how many parts are done, how many there are)."""


def silent(_label: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


def counted(items: Sequence[Item], label: str, progress: Progress) -> Iterator[Item]:
    """Yield the items, reporting before each of them and after the last."""
    for done, item in enumerate(items):
        progress(label, done, len(items))
        yield item
    progress(label, len(items), len(items))
