"""Files as people have them: text in whatever encoding, JSON by the line, packed or not, and tables.

CorpusError        a text source that cannot serve
└── FileError      a file of it that cannot be read; the message names the line or row
LineError          a line that is no JSON of ours
"""

import gzip
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sentei.errors import SenteiError

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = frozenset(
    {".txt", ".md", ".rst", ".py", ".text", ".html", ".c", ".h", ".js", ".ts", ".rs", ".go"}
)
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TABLE_SUFFIX, PACKED_SUFFIX = ".parquet", ".gz"
TEXT_FIELD = "text"
_DETECT_BYTES = 1 << 18  # what an encoding is detected from; a whole book would take minutes
_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # in JSON; half of a pair, or both halves of one
_MAX_SHOWN = 60


class CorpusError(SenteiError, ValueError):
    """A text source that cannot serve; the message names the value, the place and the way out."""


class FileError(CorpusError):
    """A file that cannot be read; the message names the place and the way out."""


class LineError(SenteiError, ValueError):
    """A line that is no JSON of ours; whoever reads the file names file and line."""


def ending(path: Path) -> str:
    """Return what says how a file is read: its last suffix in small letters, or the one below `.gz`."""
    suffix = path.suffix.lower()
    return f"{Path(path.stem).suffix.lower()}{suffix}" if suffix == PACKED_SUFFIX else suffix


def find_reader(path: Path) -> Callable[[Path], Iterator[tuple[int, str]]] | None:
    """Return what reads texts out of a file by its ending, or None where no such ending is known."""
    known = ending(path).removesuffix(PACKED_SUFFIX)
    if known in JSONL_SUFFIXES:
        return read_jsonl
    return read_table if ending(path) == TABLE_SUFFIX else None


def read_text(path: Path) -> str:
    """Return a file's text: UTF-8 or what its byte order mark says, else the encoding that is detected."""
    data = _read_bytes(path)
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _decode(path, data, encoding)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        detected = _detect(data)
        if detected is None:
            raise FileError(
                f"{path}: byte {error.start} is not UTF-8, and no other encoding was recognised; "
                "convert the file to UTF-8"
            ) from error
    logger.warning("%s is not UTF-8; it is read as %s, which was detected", path, detected)
    return _decode(path, data, detected)


def read_jsonl(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every JSON object of a file; lines count from 1."""
    for number, line in numbered_lines(read_text(path)):
        try:
            record = parse_line(line)
        except LineError as error:
            raise FileError(f"{path}, line {number}: {error}; one object a line") from error
        text = record.get(TEXT_FIELD) if isinstance(record, dict) else None
        if not isinstance(text, str):
            shown = line[:_MAX_SHOWN]
            raise FileError(f"{path}, line {number}: no field {TEXT_FIELD!r} with a string; found {shown!r}")
        yield number, text


def read_table(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (row, text) of a Parquet file's column `text`; rows count from 1, empty ones are passed over."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(path) as table:
            names = table.schema_arrow.names
            if TEXT_FIELD not in names:
                raise FileError(f"{path}: no column {TEXT_FIELD!r}; it has {', '.join(names) or 'none'}")
            for batch in table.iter_batches(columns=[TEXT_FIELD]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(value, str | None):
                        raise FileError(f"{path}, row {row}: {TEXT_FIELD!r} is {value!r}, not a text")
                    if value is not None:
                        yield row, value
    except (ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileError(f"{path}: cannot be read as Parquet ({reason}); write it again") from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of the lines that hold something; they count from 1."""
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def parse_line(line: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the JSON value of a line; raises LineError for all that Python or a tokenizer cannot take."""
    try:
        value = json.loads(line, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise LineError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise LineError("not JSON that can be read (nested too deeply)") from error
    except ValueError as error:  # Python's limit on the digits of a whole number
        raise LineError("not JSON that can be read (a number has too many digits)") from error
    if _LONE_SURROGATE.search(line):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise LineError(
                "half of a surrogate pair (such as \\ud83d) stands alone, which is no text"
            ) from error
    return value


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix.lower() != PACKED_SUFFIX:
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path}: cannot be read ({error})") from error


def _decode(path: Path, data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise FileError(f"{path}: is no {encoding} text ({error}); convert the file to UTF-8") from error


def _detect(data: bytes) -> str | None:
    """Return the likeliest encoding of bytes that are not UTF-8, or None for what is no text."""
    from charset_normalizer import from_bytes

    best = from_bytes(data[:_DETECT_BYTES]).best()
    return None if best is None else best.encoding
