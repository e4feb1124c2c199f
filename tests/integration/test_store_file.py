"""A store whose SQLite file is taken away or exchanged while it is open: noticed at once, by everybody."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sentei.monitors.errors import StoreError
from sentei.monitors.events import EventLog
from sentei.monitors.store import Store
from tests.fakes_records import START_S, make_request
from tests.stories_rollout import begin, serve


def delete(path: Path) -> None:
    """Take the file away."""
    path.unlink()


def replace(path: Path) -> None:
    """Put a copy, such as a backup, in its place."""
    copy = path.with_suffix(".copy")
    shutil.copy(path, copy)
    copy.rename(path)


@pytest.mark.parametrize(("change", "word"), [(delete, "deleted"), (replace, "replaced")])
def test_no_decision_on_a_file_that_is_gone(
    tmp_path: Path, change: Callable[[Path], None], word: str
) -> None:
    """The next tick, the next record and the next read are errors that say the way out."""
    path = tmp_path / "state.db"
    with Store.open(f"sqlite:///{path}") as store:
        runner = begin(store)
        serve(store, 0)
        assert not runner.tick(START_S + 1).error
        num_events = EventLog(store).verify()
        change(path)

        result = runner.tick(START_S + 2)

        assert f"its file was {word} while it was open" in result.error
        assert result.decision is None
        with pytest.raises(StoreError, match="restart Sentei"):
            store.add_request(make_request(99))
        with pytest.raises(StoreError, match="traffic is dense"):
            store.read_routing()
    if path.exists():
        with Store.open(f"sqlite:///{path}") as again:
            assert EventLog(again).verify() == num_events


def test_a_write_that_loses_its_file_does_not_commit(tmp_path: Path) -> None:
    """Also where the file goes between the begin and the end of a write."""
    path = tmp_path / "state.db"
    store = Store.open(f"sqlite:///{path}")

    with store, pytest.raises(StoreError, match="deleted"), store.write("something"):
        path.unlink()


def test_a_file_that_comes_back_is_the_same_store(tmp_path: Path) -> None:
    """Moved away and back, it goes on by itself."""
    path = tmp_path / "state.db"
    with Store.open(f"sqlite:///{path}") as store:
        runner = begin(store)
        assert not runner.tick(START_S).error
        path.rename(tmp_path / "elsewhere.db")
        assert "deleted" in runner.tick(START_S + 1).error
        (tmp_path / "elsewhere.db").rename(path)

        assert not runner.tick(START_S + 2).error
