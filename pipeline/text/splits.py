"""Held-out text, divided so that no step is judged on what it was tuned on."""

from dataclasses import dataclass, fields, replace

from sentei.pipeline.text.corpus import ALWAYS_HELD_OUT, Corpus, Document, by_source, split_documents

Documents = tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class TextParts:
    """Training text, and four parts of the held-out text."""

    train: Documents
    early_stop: Documents
    calibrate: Documents
    verify: Documents
    evaluate: Documents


def split_text(corpus: Corpus) -> TextParts:
    """Divide a corpus, each of its sources for itself."""
    parts = [
        _split_source(replace(corpus, documents=tuple(documents)))
        for documents in by_source(corpus.documents).values()
    ]
    return TextParts(
        *(
            tuple(document for part in parts for document in getattr(part, field.name))
            for field in fields(TextParts)
        )
    )


def _split_source(corpus: Corpus) -> TextParts:
    """Divide one source; with fewer than eight held-out documents all four parts share them."""
    train, held_out = split_documents(corpus)
    if len(held_out) < 8:
        return TextParts(train, held_out, held_out, held_out, held_out)
    reserved = tuple(document for document in held_out if document.name in ALWAYS_HELD_OUT)
    # Largest first in turn, so that each part gets its share of the long documents.
    rest = sorted(
        (document for document in held_out if document not in reserved), key=lambda d: (-len(d.text), d.name)
    )
    evaluate = reserved if reserved else tuple(rest[3::4])
    parts = 3 if reserved else 4
    return TextParts(train, tuple(rest[0::parts]), tuple(rest[1::parts]), tuple(rest[2::parts]), evaluate)
