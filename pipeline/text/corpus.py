"""Where text comes from: the standard library's own source and docs, or the user's files."""

import hashlib
import random
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from sentei.pipeline.text.files import TEXT_SUFFIXES, CorpusError, ending, find_reader, read_text

# Long, varied modules that nobody may train on, so that figures on them can be compared across runs.
ALWAYS_HELD_OUT = frozenset({"tarfile.py", "argparse.py", "statistics.py"})
STDLIB = "stdlib"
# Foreign packages, and what reads as tables rather than text; some systems ship the tests apart, too.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "encodings", "lib-dynload"})


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text with a name that is stable across machines."""

    path: str
    name: str
    text: str
    source: str = ""  # the corpus that it came from


@dataclass(frozen=True, slots=True)
class Corpus:
    """Named documents in a fixed order; the digest identifies names and text."""

    name: str
    documents: tuple[Document, ...]
    digest: str
    passed_over: str = ""  # files of a folder that are not read, by their endings


def load_corpora(sources: Sequence[str] | None = None) -> Corpus:
    """Load one or several sources as one corpus; windows then take as much text from each of them."""
    corpora = [load_corpus(source) for source in sources or (STDLIB,)]
    if len(corpora) == 1:
        return corpora[0]
    documents = [
        replace(document, source=f"{i} {corpus.name}")
        for i, corpus in enumerate(corpora)
        for document in corpus.documents
    ]
    whole = _make_corpus(" + ".join(corpus.name for corpus in corpora), documents)
    passed_over = "; ".join(corpus.passed_over for corpus in corpora if corpus.passed_over)
    return replace(whole, passed_over=passed_over)


def load_corpus(source: str | None = None) -> Corpus:
    """Load `stdlib` (the default), a file of text, JSON lines or Parquet (`text`), or a folder of them."""
    if source is None or source == STDLIB:
        return _load_stdlib()
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise CorpusError(
            f"corpus {source!r}: no such file or folder; "
            f"give a text file, a .jsonl file, a folder or {STDLIB!r}"
        )
    documents = _read_book(path) if find_reader(path) is None else _read_file(path, path.name)
    return _make_corpus(path.name, documents)


def split_documents(
    corpus: Corpus, held_out_share: float = 0.05, salt: str = "sentei"
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Return (train, held out), by a hash of each document's name: disjoint, the same everywhere."""
    if not 0.0 < held_out_share < 1.0:
        raise CorpusError(
            f"held_out_share is {held_out_share}; it must lie between 0 and 1, for example 0.05"
        )
    held_out = [d for d in corpus.documents if _is_held_out(d.name, held_out_share, salt)]
    names = {d.name for d in held_out}
    train = [d for d in corpus.documents if d.name not in names]
    if not train or not held_out:
        raise CorpusError(
            f"corpus {corpus.name!r}: {len(corpus.documents)} document(s) split into {len(train)} for "
            f"training and {len(held_out)} held out; add documents or change held_out_share {held_out_share}"
        )
    return tuple(train), tuple(held_out)


def token_windows(
    tokenizer: Any, documents: Sequence[Document], window_tokens: int, num: int, seed: int
) -> torch.Tensor:
    """Return `num` windows of packed documents, int64 [num, window_tokens], without overlap."""
    if window_tokens < 1 or num < 1:
        raise CorpusError(f"window_tokens is {window_tokens} and num is {num}; both must be at least 1")
    needed = window_tokens * num
    ids: list[int] = []
    waiting = {source: _shuffle(part, seed) for source, part in by_source(documents).items()}
    taken = dict.fromkeys(waiting, 0)
    while waiting:
        source = min(waiting, key=lambda name: taken[name])  # the same share of each source
        document = next(waiting[source], None)
        if document is None:
            del waiting[source]
            continue
        before = len(ids)
        ids.extend(encode_text(tokenizer, document.text))
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        taken[source] += len(ids) - before
        if len(ids) >= needed:
            return torch.tensor(ids[:needed], dtype=torch.int64).view(num, window_tokens)
    raise CorpusError(
        f"{num} windows of {window_tokens} tokens need {needed} tokens, but the {len(documents)} document(s) "
        f"hold {len(ids)}; ask for at most {len(ids) // window_tokens} windows, shorten them or add text"
    )


def by_source(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Return the documents of each source, in their order."""
    parts: dict[str, list[Document]] = {}
    for document in documents:
        parts.setdefault(document.source, []).append(document)
    return parts


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of plain text, without special tokens and without a warning about its length."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _shuffle(documents: Sequence[Document], seed: int) -> Iterator[Document]:
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return (documents[i] for i in order)


def _is_held_out(name: str, share: float, salt: str) -> bool:
    if name in ALWAYS_HELD_OUT:
        return True
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


@lru_cache(maxsize=1)
def _load_stdlib() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    documents = list(_read_library(root))
    if not documents:
        raise CorpusError(f"corpus {STDLIB!r}: no Python source below {root}; name a file or folder")
    return _make_corpus(STDLIB, [*documents, *_read_topics()])


def _read_library(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts) or name == "pydoc_data/topics.py":
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield Document(path=name, name=name, text=text)


def _read_topics() -> Iterator[Document]:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        yield Document(path="pydoc_data/topics.py", name=f"pydoc_data/topics/{topic}", text=topics[topic])


def _load_folder(folder: Path) -> Corpus:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    is_read = {path: path.suffix.lower() in TEXT_SUFFIXES or find_reader(path) is not None for path in paths}
    others = Counter(ending(path) or "without an ending" for path in paths if not is_read[path])
    passed_over = ", ".join(f"{num} {what}" for what, num in sorted(others.items()))
    documents = (
        document
        for path in paths
        if is_read[path]
        for document in _read_file(path, path.relative_to(folder).as_posix())
    )
    return _make_corpus(folder.name, documents, passed_over)


def _read_file(path: Path, name: str) -> Iterator[Document]:
    """Yield a text file as one document, other files as one for each of their texts."""
    reader = find_reader(path)
    if reader is None:
        yield Document(path=name, name=name, text=read_text(path))
        return
    for number, text in reader(path):
        yield Document(path=name, name=f"{name}#{number}", text=text)


def _read_book(path: Path) -> Iterator[Document]:
    # One long file becomes many documents, so that it can be split into train and held out.
    text = read_text(path)
    size = max(4000, -(-len(text) // 200))
    for i, start in enumerate(range(0, len(text), size)):
        yield Document(path=path.name, name=f"{path.name}#{i}", text=text[start : start + size])


def _make_corpus(name: str, documents: Iterable[Document], passed_over: str = "") -> Corpus:
    kept = tuple(d for d in documents if d.text.strip())
    if not kept:
        found = f" (passed over: {passed_over})" if passed_over else ""
        raise CorpusError(
            f"corpus {name!r}: no text found{found}; read are {', '.join(sorted(TEXT_SUFFIXES))}, "
            ".jsonl and .ndjson, also as .gz, and .parquet"
        )
    digest = hashlib.sha256()
    for document in kept:
        digest.update(f"{document.name}\0{len(document.text)}\0".encode())
        digest.update(document.text.encode("utf-8", "surrogatepass"))
    return Corpus(name=name, documents=kept, digest=digest.hexdigest(), passed_over=passed_over)
