"""What is run, in which order and time, and what a row says. Plain values: nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal

TOTAL_S = 350.0  # of the six minutes that a run may take; the rest is for its start and the report
Status = Literal["passed", "failed", "measured", "skipped"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The shapes of the timed rows, and what the rows of answers are drawn from."""

    is_tiny: bool
    prompts: tuple[int, ...]
    densities: tuple[float, ...]
    heads: int
    kv_heads: int
    head_dim: int
    block: int
    forms: tuple[str, ...]  # of scorers, as `tensors.FORMS` names them; the first is what most rows time
    batch: int
    decode_tokens: int
    mass: tuple[tuple[int, int | None], ...]  # (tokens, sampled rows; None: all)
    model_tokens: int
    matrix: int
    copy_mib: int
    answer_tokens: int
    seconds: float  # of timing per row, warm-up not counted


FULL = Sizes(
    is_tiny=False,
    prompts=(32768, 131072, 8192),
    densities=(0.1, 0.05, 0.2, 0.5),
    heads=32,
    kv_heads=8,
    head_dim=128,
    block=64,
    forms=(
        "rank 32, 4 as one",
        "rank 32, 1 of 4",
        "rank 32",
        "rank 16, 4 as one",
        "means of 16",
        "means of 4",
    ),
    batch=16,
    decode_tokens=32768,
    mass=((8192, None), (32768, None), (131072, 1024)),
    model_tokens=8192,
    matrix=8192,
    copy_mib=2048,
    answer_tokens=1040,  # a ragged last block; strides of 16 as in the timed rows: one compilation for both
    seconds=1.5,
)
TINY = Sizes(
    is_tiny=True,
    prompts=(128, 176),
    densities=(0.5, 0.7),
    heads=4,
    kv_heads=2,
    head_dim=32,
    block=32,
    forms=("rank 32, 4 as one", "means of 16"),
    batch=2,
    decode_tokens=128,
    mass=((64, None), (96, 20)),
    model_tokens=128,
    matrix=64,
    copy_mib=1,
    answer_tokens=112,
    seconds=0.0,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One thing to do: `run` names "module:function"; a row of figures waits for the answers it stands on.

    It is begun only where `need_s` seconds are left, and stopped after `limit_s`.
    """

    id: str
    run: str
    arguments: dict[str, Any] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    need_s: float = 3.0
    limit_s: float = 40.0

    @property
    def is_answer(self) -> bool:
        """Whether it says right or wrong, rather than how fast."""
        return self.run.startswith("answers")


def plan(sizes: Sizes) -> list[Row]:
    """All rows in order: what is asked first is what a short lease should not end without."""
    return [*_answers(), *_times(sizes), *_models()]


def choose(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows that a pattern names, and those they stand on: the answers, and the peaks under every time."""
    named = [row for row in rows if any(fnmatch(row.id, pattern) for pattern in patterns)]
    needed = {name for row in named for name in row.answers}
    if any(not row.is_answer for row in named):
        needed.add("peaks")
    return [row for row in rows if row in named or row.id in needed]


def _answers() -> Iterator[Row]:
    for kernel, cases in ANSWERS.items():
        for case in cases:
            yield Row(f"answer/{kernel}/{case}", f"{MODULES[kernel]}:{kernel}", {"case": case}, limit_s=60.0)
    for case in ("decode", "prefill"):
        yield Row(f"answer/graph/{case}", "answers_lists:graph", {"case": case})
    for case in ("scored_step", "scored_prompt"):
        yield Row(f"answer/graph/{case}", "answers_scores:graph", {"case": case})


MODULES = {
    "prefill": "answers_attention",
    "decode": "answers_attention",
    "mass": "answers_lists",
    "select": "answers_lists",
    "scores": "answers_scores",
    "step": "answers_scores",
}
ANSWERS = {
    "prefill": ("groups", "heads", "options", "fp32", "last_row", "empty", "packed"),
    "decode": ("groups", "heads", "options", "fp32"),
    "mass": ("all_rows", "sampled", "fp32"),
    "select": ("threshold", "top_p", "top_k"),
    "scores": ("tokens", "single_queries", "means", "chunk", "last_row", "fp32"),
    "step": ("tokens", "means"),
}
PREFILL = ("answer/prefill/groups", "answer/prefill/heads")
SELECT = ("answer/select/threshold",)
SCORES = ("answer/scores/tokens", "answer/scores/means", *SELECT)
STEP = ("answer/step/tokens", "answer/step/means")


def _times(sizes: Sizes) -> Iterator[Row]:
    yield Row("peaks", "speed:peaks", need_s=2.0)
    yield Row("host_syncs", "speed:host_syncs", answers=(*SCORES, *STEP))
    first, *others = sizes.prompts
    yield from _prefills(first, sizes, 12.0)
    yield from (
        Row(
            f"decode/{sizes.decode_tokens}/{density}",
            "speed:decode",
            {"density": density},
            ("answer/decode/groups", *SELECT, *STEP),
            need_s=4.0,
        )
        for density in sizes.densities
    )
    for tokens in others:
        yield from _prefills(tokens, sizes, 20.0 if tokens > first else 6.0)
    for tokens, rows in sizes.mass:
        yield Row(
            f"mass/{tokens}",
            "speed:mass",
            {"tokens": tokens, "num_rows": rows},
            ("answer/mass/all_rows", "answer/mass/sampled"),
        )
    for tokens in sizes.prompts[:2]:
        yield Row(f"select/{tokens}", "speed:select", {"tokens": tokens}, SELECT)


def _prefills(tokens: int, sizes: Sizes, need_s: float) -> Iterator[Row]:
    """The dense alternatives once, then each density beside the fastest of SDPA."""
    yield Row(f"dense/{tokens}", "speed:dense", {"tokens": tokens}, need_s=need_s, limit_s=60.0)
    yield Row(f"score/{tokens}", "scoring:score", {"tokens": tokens}, SCORES, need_s=need_s, limit_s=45.0)
    for density in sizes.densities:
        yield Row(
            f"prefill/{tokens}/{density}",
            "speed:prefill",
            {"tokens": tokens, "density": density},
            (*PREFILL, *SCORES),
            need_s=need_s,
            limit_s=45.0,
        )


def _models() -> Iterator[Row]:
    for name in ("pocket", "gemma-3-270m"):
        yield Row(
            f"model/{name}", "model:prefill", {"name": name}, (*PREFILL, *SCORES), need_s=10.0, limit_s=60.0
        )


class SkipRowError(Exception):
    """This row has nothing to run on here; the message says what is missing."""


class WrongAnswerError(Exception):
    """A kernel's answer is outside its bound; the message gives both numbers."""


@dataclass(frozen=True, slots=True)
class Line:
    """One figure. Times are medians on the device's own clock; `ratio` is how often it fits into `against`.

    `peak` names the measured peak (matmul or copy) that `share` of it was achieved; `extra_mib` is the rise
    of allocated memory over the inputs, the output included.
    """

    what: str
    ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    against: str = ""
    ratio: float | None = None
    peak: str = ""
    share: float | None = None
    extra_mib: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"[:300]
