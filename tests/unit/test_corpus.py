"""Text sources: what is read, how it is split, and what the errors say."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sentei.pipeline.text.corpus import (
    Document,
    load_corpora,
    load_corpus,
    split_documents,
    token_windows,
)
from sentei.pipeline.text.files import CorpusError
from sentei.pipeline.text.splits import split_text


class ByteTokenizer:
    """One token per byte, and an end token of 256."""

    eos_token_id = 256

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def make_documents(num: int, text: str = "x" * 50) -> tuple[Document, ...]:
    """Make equal documents under different names."""
    return tuple(Document(path=f"{i}.txt", name=f"{i}.txt", text=text) for i in range(num))


def test_jsonl_gives_one_document_per_line(tmp_path: Path) -> None:
    """Each JSONL line with a text field is one document; blank lines are passed over."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n', encoding="utf-8")

    corpus = load_corpus(str(path))

    assert [d.text for d in corpus.documents] == ["one", "two"]


def test_folder_is_read_in_order_and_digested(tmp_path: Path) -> None:
    """A folder's digest depends on names and text, not on the order of writing."""
    (tmp_path / "b.md").write_text("second", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff")

    corpus = load_corpus(str(tmp_path))
    before = corpus.digest
    (tmp_path / "a.txt").write_text("other", encoding="utf-8")

    assert [d.name for d in corpus.documents] == ["a.txt", "b.md"]
    assert load_corpus(str(tmp_path)).digest != before


def test_long_file_can_be_split(tmp_path: Path) -> None:
    """One long text file becomes documents enough for a train and a held-out part."""
    path = tmp_path / "book.txt"
    path.write_text("A sentence of some length.\n" * 40_000, encoding="utf-8")

    train, held_out = split_documents(load_corpus(str(path)), 0.1)

    assert train
    assert held_out


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"text": 3}\n', ["line 1", "'text'"]), ('{"text": "a"}\nnot json\n', ["line 2", "not JSON"])],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, content: str, words: list[str]) -> None:
    """A bad JSONL line is an error that names file and line."""
    path = tmp_path / "data.jsonl"
    path.write_text(content, encoding="utf-8")

    with pytest.raises(CorpusError) as error:
        load_corpus(str(path))

    assert all(word in str(error.value) for word in [*words, "data.jsonl"])


def test_missing_source_says_what_is_allowed(tmp_path: Path) -> None:
    """A source that does not exist is an error that lists what may be given."""
    with pytest.raises(CorpusError, match=r"no such file or folder.*'stdlib'"):
        load_corpus(str(tmp_path / "nothing"))


def test_split_is_disjoint_and_stable() -> None:
    """The split depends on names alone, covers every document once and keeps tarfile.py out of training."""
    corpus = load_corpus()

    train, held_out = split_documents(corpus, 0.05)

    assert split_documents(corpus, 0.05) == (train, held_out)
    assert not {d.name for d in train} & {d.name for d in held_out}
    assert len(train) + len(held_out) == len(corpus.documents)
    assert "tarfile.py" in {d.name for d in held_out}


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_split_refuses_impossible_shares(share: float) -> None:
    """A share that leaves one side empty by definition is refused by value."""
    with pytest.raises(CorpusError, match="held_out_share is"):
        split_documents(load_corpus(), share)


def test_windows_are_packed_and_seeded() -> None:
    """Windows follow each other without overlap, end tokens between documents, and repeat with the seed."""
    documents = make_documents(10, "abc")

    windows = token_windows(ByteTokenizer(), documents, 4, 5, seed=1)

    assert windows.tolist() == [[97, 98, 99, 256]] * 5
    assert windows.dtype == torch.int64
    assert torch.equal(windows, token_windows(ByteTokenizer(), documents, 4, 5, seed=1))


def test_short_corpus_names_the_numbers() -> None:
    """Too little text is an error with what was asked, what there is and what would work."""
    with pytest.raises(CorpusError, match=r"9 windows of 64 tokens need 576 tokens.*hold 102; .*at most 1 "):
        token_windows(ByteTokenizer(), make_documents(2), 64, 9, seed=0)


def test_several_sources_give_equal_parts_of_each_window_draw(tmp_path: Path) -> None:
    """A small source is not drowned by a large one: windows take as many tokens from each while both last."""
    for name, letter, num in (("large", "l", 200), ("small", "s", 20)):
        (tmp_path / name).mkdir()
        for i in range(num):
            (tmp_path / name / f"{i}.txt").write_text(letter * 99, encoding="utf-8")
    corpus = load_corpora([str(tmp_path / "large"), str(tmp_path / "small")])

    ids = token_windows(ByteTokenizer(), corpus.documents, window_tokens=400, num=5, seed=1).flatten()

    assert corpus.name == "large + small"
    assert len(corpus.documents) == 220
    assert int((ids == ord("s")).sum()) == int((ids == ord("l")).sum()) == 990


def test_each_source_is_split_for_itself(tmp_path: Path) -> None:
    """Every part of the split has text of both sources, and no document that another source trains on."""
    for name, num in (("one", 400), ("two", 40)):
        (tmp_path / name).mkdir()
        for i in range(num):
            (tmp_path / name / f"{name}{i}.txt").write_text(f"text {i}", encoding="utf-8")
    parts = split_text(load_corpora([str(tmp_path / "one"), str(tmp_path / "two")]))

    for part in (parts.early_stop, parts.calibrate, parts.verify, parts.evaluate):
        assert {document.name[:3] for document in part} == {"one", "two"}
        assert not set(part) & set(parts.train)
