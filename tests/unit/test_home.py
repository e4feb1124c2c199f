"""Names of adapters and of what is tracked: one place, safe as a part of a path, bound to the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sentei.pipeline.home import MAX_NAME_CHARS, Home, HomeError, safe_name, short_name

ONE, OTHER = "a" * 64, "b" * 64


def put_adapter(folder: Path, weights: str) -> Path:
    """Just enough of an adapter to be found."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"base": {"weights_sha256": weights}}))
    return folder


@pytest.mark.parametrize("model", [".", "..", "/", "../..", "~", "org/model", "pocket", "a'b/", "x/../.."])
def test_an_adapter_lies_in_a_folder_of_its_own_below_adapters(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a model is called by, its adapter is one folder deep in the home's adapters."""
    monkeypatch.chdir(tmp_path)
    home = Home(tmp_path / "home")

    folder = home.adapter_dir(model, ONE)

    assert folder.resolve().parent == home.adapters.resolve()


def test_two_folders_of_the_same_name_have_adapters_of_their_own(tmp_path: Path) -> None:
    """Other weights, another folder; the same weights from elsewhere, the same one."""
    home = Home(tmp_path)

    assert home.adapter_dir("x/model", ONE) != home.adapter_dir("y/model", OTHER)
    assert home.adapter_dir("x/model", ONE) == home.adapter_dir("y/model", ONE)


def test_a_folder_is_called_as_it_is_called_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--model .` inside a folder is the folder's own name."""
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path / "checkpoint")

    assert short_name(".") == short_name(str(tmp_path / "checkpoint")) == "checkpoint"


def test_an_adapter_of_an_older_version_is_found_where_it_is(tmp_path: Path) -> None:
    """A folder with the bare name counts if its manifest names the same weights, and only then."""
    home = Home(tmp_path)
    older = put_adapter(home.adapters / "pocket", ONE)

    assert home.adapter_dir("pocket", ONE) == older
    assert home.adapter_dir("pocket", OTHER) != older


def test_without_weights_the_only_adapter_of_a_name_is_found(tmp_path: Path) -> None:
    """A server finds it by name; a longer name is not the same name."""
    home = Home(tmp_path)
    found = put_adapter(home.adapter_dir("model", ONE), ONE)
    put_adapter(home.adapter_dir("model-large", ONE), ONE)

    assert home.find_adapter("x/model") == found


def test_two_adapters_of_a_name_are_not_guessed_between(tmp_path: Path) -> None:
    """The message lists both folders."""
    home = Home(tmp_path)
    both = [put_adapter(home.adapter_dir("model", weights), weights) for weights in (ONE, OTHER)]

    with pytest.raises(HomeError) as refused:
        home.find_adapter("model")

    assert all(str(folder) in str(refused.value) for folder in both)


def test_safe_names_are_distinct_and_readable() -> None:
    """What is safe stays; the rest keeps its letters and gets a hash, so that no two become one."""
    given = [
        "legal",
        "legal/",
        "a//b",
        "a/b",
        "it's",
        "its",
        "../../outside",
        "é",
        "ü",
        "",
        ".",
        "..",
        "x" * 300,
    ]

    names = [safe_name(text) for text in given]

    assert names[0] == "legal"
    assert names[1].startswith("legal-")
    assert "outside" in names[6]
    assert len(set(names)) == len(given)
    assert all(0 < len(name) <= MAX_NAME_CHARS and "/" not in name and name.strip(".") for name in names)
