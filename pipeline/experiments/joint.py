"""Joint: a short low-rank fine-tune with the sparse mask on, taught by the dense model's own logits.

The question it answers: of what thinning costs, how much does training under the mask win back, compared with
thinning the frozen model after the fact? One rung's thresholds choose the blocks anew at each step; the
choice is taken as constant, so gradients flow through the attention over what was kept, not the choosing.
The fast kernels give no gradient, so training runs SDPA under the same mask spelled out token by token, which
wants windows of a few thousand tokens. Everything that is reported runs on the serving path.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from sentei.kernels.hf.adapter import Adapter, save_adapter
from sentei.kernels.hf.ladder import DENSE
from sentei.kernels.hf.low_rank import LowRank, new_low_rank
from sentei.kernels.hf.models import AdapterError
from sentei.kernels.hf.retrofit import Retrofit, retrofit
from sentei.pipeline.ladder.learn import Course, learn
from sentei.pipeline.measure.rungs import Losses, Variant, losses_by_variant
from sentei.pipeline.measure.scores import paired_delta, pick_positions
from sentei.pipeline.measure.texts import make_texts, make_windows
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, counted, silent
from sentei.pipeline.text.corpus import Corpus
from sentei.pipeline.text.splits import split_text

PART_POSITIONS = 128  # logits are made for so many positions at a time: a large vocabulary fits, too
POST_HOC, JOINT, JOINT_DENSE = "post-hoc sparse", "joint sparse", "joint weights, dense"


@dataclass(frozen=True, slots=True)
class JointOptions:
    """How much to learn, under which rung, and how much untouched text to compare on."""

    rung: str = "bold"
    rank: int = 8
    window_tokens: int = 2048
    num_windows: int = 48
    num_held_out: int = 6
    positions_per_step: int = 1024
    learning_rate: float = 2e-3
    max_epochs: int = 4
    patience: int = 1
    compared_windows: int = 8
    compared_positions: int = 1024
    seed: int = 0


@dataclass(frozen=True, slots=True)
class JointRow:
    """One variant on held-out text; differences are against dense on the same tokens."""

    variant: str
    density: float
    nll: float
    nll_delta: float
    nll_delta_ci: tuple[float, float]


@dataclass(frozen=True, slots=True)
class JointReport:
    """What training under the mask won back, and what it cost."""

    model: str
    rung: str
    window_tokens: int
    num_positions: int
    rows: tuple[JointRow, ...]
    joint_minus_post_hoc: float
    joint_minus_post_hoc_ci: tuple[float, float]
    kl_held_out_before: float
    kl_held_out_after: float
    train_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def figures(self) -> dict[str, float]:
        """Return the numbers for the manifest and the tracker."""
        figures = {
            "kl_held_out_before": self.kl_held_out_before,
            "kl_held_out_after": self.kl_held_out_after,
            "joint_minus_post_hoc": self.joint_minus_post_hoc,
            "train_s": self.train_s,
        }
        for row in self.rows:
            name = row.variant.replace(",", "").replace(" ", "_")
            figures |= {f"{name}/nll_delta": row.nll_delta, f"{name}/density": row.density}
        return figures


@dataclass(frozen=True, slots=True)
class Lesson:
    """A text and what the dense model's last layer said of it: tokens [T], states [T, hidden], on the CPU."""

    ids: torch.Tensor
    states: torch.Tensor


def joint(
    loaded: LoadedModel,
    adapter: Adapter,
    corpus: Corpus,
    options: JointOptions | None = None,
    progress: Progress = silent,
) -> tuple[Adapter, JointReport]:
    """Train low-rank weights under one rung's mask, save them with the adapter, compare on untouched text."""
    options = options if options is not None else JointOptions()
    window = min(options.window_tokens, loaded.max_tokens)
    _check_rung(adapter, options.rung, window)
    parts = split_text(corpus)
    low_rank = new_low_rank(loaded.model, rank=options.rank, rung=options.rung, seed=options.seed)
    adapter = adapter.with_low_rank(low_rank)
    texts = [
        [text.ids for text in make_texts(loaded, documents, window_tokens=window, num=num, seed=options.seed)]
        for documents, num in (
            (parts.train, options.num_windows),
            (parts.early_stop, options.num_held_out),
        )
    ]
    started_s = time.monotonic()
    with retrofit(loaded.model, adapter, DENSE) as handle:
        train = _ask_teacher(loaded, texts[0], progress, "ask the dense model")
        held_out = _ask_teacher(loaded, texts[1], progress, "ask it about held-out text")
        handle.set_rung(options.rung)
        handle.set_low_rank(True)
        before, after = _train(loaded, handle, low_rank, (train, held_out), options, progress)
    train_s = time.monotonic() - started_s
    windows = make_windows(
        loaded, parts.evaluate, window_tokens=window, num=options.compared_windows, seed=options.seed
    )
    losses = _compare(loaded, adapter, windows, options, progress)
    gap = paired_delta(losses[JOINT].loss, losses[POST_HOC].loss)
    report = JointReport(
        model=loaded.name,
        rung=options.rung,
        window_tokens=window,
        num_positions=losses[DENSE].loss.numel(),
        rows=tuple(_row(name, own, losses[DENSE]) for name, own in losses.items()),
        joint_minus_post_hoc=gap.mean,
        joint_minus_post_hoc_ci=gap.ci,
        kl_held_out_before=before,
        kl_held_out_after=after,
        train_s=train_s,
    )
    adapter = adapter.with_low_rank(low_rank.with_figures(report.figures()))
    if adapter.folder is not None:
        adapter = save_adapter(adapter, adapter.folder)
    return adapter, report


def _check_rung(adapter: Adapter, rung_id: str, window: int) -> None:
    rung = adapter.ladder.find(rung_id)
    if not any(rung.thins(layer) for layer in adapter.scorers):
        raise AdapterError(
            f"rung {rung_id!r} thins no layer, so there is no mask to train under; choose a bolder rung, "
            "or calibrate first: sentei calibrate"
        )
    if window < rung.break_even_tokens:
        raise AdapterError(
            f"rung {rung_id!r} runs dense on windows of {window} tokens: its break-even length is "
            f"{rung.break_even_tokens}; pass longer windows: --tokens {rung.break_even_tokens}"
        )


@torch.no_grad()
def _ask_teacher(
    loaded: LoadedModel, texts: Sequence[torch.Tensor], progress: Progress, label: str
) -> list[Lesson]:
    return [Lesson(ids, loaded.last_states(ids).cpu()) for ids in counted(texts, label, progress)]


def _train(
    loaded: LoadedModel,
    handle: Retrofit,
    low_rank: LowRank,
    lessons: tuple[Sequence[Lesson], Sequence[Lesson]],
    options: JointOptions,
    progress: Progress,
) -> tuple[float, float]:
    """Train in place on the first lessons, judged by the others; return their KL before and after."""
    course = Course(
        learning_rate=options.learning_rate,
        weight_decay=0.0,
        max_epochs=options.max_epochs,
        patience=options.patience,
        seed=options.seed,
    )
    parameters = low_rank.parameters()
    return learn(
        parameters,
        partial(divergence, loaded, positions_per_step=options.positions_per_step),
        *lessons,
        course,
        epoch=partial(_gradients, handle, parameters),
        on_step=partial(progress, "train low-rank weights"),
    )


@contextmanager
def _gradients(handle: Retrofit, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let gradients flow to the low-rank weights while the block runs, and to nothing else."""
    handle.set_differentiable(True)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        handle.set_differentiable(False)
        for parameter in parameters:
            parameter.requires_grad_(False)


def divergence(loaded: LoadedModel, lesson: Lesson, positions_per_step: int) -> torch.Tensor:
    """KL from the dense model's next tokens to the running one's, in nats, mean over positions."""
    states = loaded.last_states(lesson.ids)
    step = max(1, math.ceil(len(lesson.ids) / positions_per_step))
    judged = slice(step - 1, None, step)
    teacher, student = lesson.states[judged].to(loaded.device), states[judged]
    total = torch.zeros((), device=loaded.device)
    parts = (torch.split(side, PART_POSITIONS) for side in (teacher, student))
    for told, found in zip(*parts, strict=True):
        total = total + checkpoint(_part_divergence, loaded.model.lm_head, told, found, use_reentrant=False)
    return total / len(student)


def _part_divergence(head: Any, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    target = head(teacher).float().log_softmax(dim=-1)
    found = head(student).float().log_softmax(dim=-1)
    return torch.nn.functional.kl_div(found, target, reduction="sum", log_target=True)


def _compare(
    loaded: LoadedModel,
    adapter: Adapter,
    windows: Sequence[torch.Tensor],
    options: JointOptions,
    progress: Progress,
) -> dict[str, Losses]:
    """Run the four variants over the same held-out tokens on the serving path: their losses."""
    length = len(windows[0])
    positions = pick_positions(length, first=length // 8, most=options.compared_positions)
    variants = (
        Variant(DENSE, DENSE),
        Variant(POST_HOC, options.rung),
        Variant(JOINT, options.rung, has_low_rank=True),
        Variant(JOINT_DENSE, DENSE, has_low_rank=True),
    )
    label = "compare on held-out text"
    return losses_by_variant(
        loaded, adapter, windows, positions, variants=variants, label=label, progress=progress
    )


def _row(variant: str, own: Losses, dense: Losses) -> JointRow:
    delta = paired_delta(own.loss, dense.loss)
    return JointRow(variant, own.density, float(own.loss.mean()), delta.mean, delta.ci)
