"""Corpora and tasks as people have them: read, or one line that names file and line; nothing else."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from sentei.pipeline.tasks.user import TaskFileError, load_user_tasks
from sentei.pipeline.text.corpus import load_corpus
from sentei.pipeline.text.files import FileError, read_text
from tests.fakes_tokenizer import WordTokenizer

TASK = {"prompt": "one two", "reference": "three", "metric": "exact_match"}
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000
GERMAN = "Die Größe der Straße ist für alle gleich, schöne Grüße übermitteln wir später. " * 20


def texts(path: Path) -> list[str]:
    """The texts of a corpus."""
    return [document.text for document in load_corpus(str(path)).documents]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"\\ud83d alone"', "surrogate"),
        (DEEP, "nested too deeply"),
        (DIGITS, "too many digits"),
        ("nothing", "not JSON"),
    ],
)
def test_what_json_or_tokenizers_cannot_take_names_file_and_line(
    tmp_path: Path, value: str, message: str
) -> None:
    """Lone surrogates, deep nesting and numbers of 5,000 digits: one line, for corpus and tasks alike."""
    corpus, tasks = tmp_path / "corpus.jsonl", tmp_path / "tasks.jsonl"
    corpus.write_text(f'{{"text": "fine"}}\n{{"text": "x", "more": {value}}}\n')
    tasks.write_text(f'{json.dumps(TASK)}\n{json.dumps(TASK)[:-1]}, "task": {value}}}\n')

    with pytest.raises(FileError) as of_corpus:
        load_corpus(str(corpus))
    with pytest.raises(TaskFileError) as of_tasks:
        load_user_tasks(tasks, WordTokenizer(), 100)

    assert str(of_corpus.value).startswith(f"{corpus}, line 2: ")
    assert str(of_tasks.value).startswith(f"{tasks}:2: ")
    for error in (of_corpus, of_tasks):
        assert message in str(error.value)
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)


def test_a_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    """JSON writes what lies beyond 16 bits as two halves; together they are text."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n')

    assert texts(path) == ["😀"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le-mark", "utf-32"])
def test_a_byte_order_mark_is_obeyed(tmp_path: Path, encoding: str) -> None:
    """Files of Windows tools: the mark says how to read, and is no part of the text or of the JSON."""
    lines = json.dumps({"text": "schön"}, ensure_ascii=False) + "\r\n"
    task = json.dumps(TASK) + "\r\n"
    raw = (
        (lambda text: b"\xff\xfe" + text.encode("utf-16-le"))
        if encoding == "utf-16-le-mark"
        else lambda text: text.encode(encoding)
    )
    (tmp_path / "a.jsonl").write_bytes(raw(lines))
    (tmp_path / "a.txt").write_bytes(raw("schön"))
    (tmp_path / "tasks.jsonl").write_bytes(raw(task))

    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "a.txt") == ["schön"]
    assert len(load_user_tasks(tmp_path / "tasks.jsonl", WordTokenizer(), 100)) == 1


def test_latin_1_is_detected_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Text that is not UTF-8 is read as what it is, and a warning names the file."""
    path = tmp_path / "letter.txt"
    path.write_bytes(GERMAN.encode("latin-1"))

    assert read_text(path) == GERMAN
    assert str(path) in caplog.text


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    """An image called .txt is an error with its name, not a corpus."""
    path = tmp_path / "image.txt"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40)

    with pytest.raises(FileError, match=r"image\.txt.*convert the file to UTF-8"):
        load_corpus(str(path))


def test_a_folder_reads_what_it_can_and_names_the_rest(tmp_path: Path) -> None:
    """Endings in capitals, JSON lines, packed or not, and Parquet are read; what is passed over is said."""
    (tmp_path / "a.TXT").write_text("capital")
    (tmp_path / "b.MD").write_text("mark")
    (tmp_path / "c.jsonl").write_text('{"text": "line"}\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    (tmp_path / "e.ndjson").write_text('{"text": "new line"}\n')
    parquet.write_table(pa.table({"text": ["cell", None], "id": [1, 2]}), tmp_path / "f.parquet")
    for name in ("g.pdf", "h.pdf", "i.csv", "README"):
        (tmp_path / name).write_bytes(b"\xff")

    corpus = load_corpus(str(tmp_path))

    found = [document.text for document in corpus.documents]
    assert found == ["capital", "mark", "line", "packed", "new line", "cell"]
    assert corpus.passed_over == "1 .csv, 2 .pdf, 1 without an ending"


@pytest.mark.parametrize("name", ["a.ndjson", "a.JSONL", "a.jsonl.gz", "a.parquet"])
def test_a_single_file_is_read_by_its_ending(tmp_path: Path, name: str) -> None:
    """No table and no JSON line is trained on as if its syntax were text."""
    path, line = tmp_path / name, b'{"text": "one"}\n'
    if name.endswith("parquet"):
        parquet.write_table(pa.table({"text": ["one"]}), path)
    else:
        path.write_bytes(gzip.compress(line) if name.endswith("gz") else line)

    assert texts(path) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"no table", "cannot be read as Parquet"),
        ("a.jsonl.gz", b"not packed", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 99)[:20], "cannot be read"),
    ],
)
def test_broken_containers_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Half a download is an error with the file's name."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(FileError, match=message) as refused:
        load_corpus(str(tmp_path / name))

    assert name in str(refused.value)


def test_a_table_without_text_names_its_columns(tmp_path: Path) -> None:
    """The column must be called `text` and hold text."""
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")

    with pytest.raises(FileError, match=r"a\.parquet: no column 'text'; it has body"):
        load_corpus(str(tmp_path / "a.parquet"))
    with pytest.raises(FileError, match=r"b\.parquet, row 1: 'text' is 1, not a text"):
        load_corpus(str(tmp_path / "b.parquet"))
