"""Recall tasks on a live model: does a rung still find what lies far back, and does it still stop there?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.ladder import DENSE
from sentei.pipeline.measure.answers import answer_greedily
from sentei.pipeline.measure.rungs import by_variant, run_each
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress
from sentei.pipeline.tasks import MAKERS
from sentei.pipeline.tasks.prompt import RecallTask, TaskName, is_correct
from sentei.pipeline.text.corpus import Document

TASK_NAMES: tuple[TaskName, ...] = ("passkey", "key_value", "multi_key", "variable_value")
# How much longer than its answer a text may grow: a model that has found it stops, one that has not goes on.
EXTRA_TOKENS = 16


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """Which recall tasks to run: every kind at every length, the notes spread over the prompt's depth."""

    kinds: tuple[TaskName, ...]
    lengths: tuple[int, ...]
    num_depths: int
    seed: int


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """A task and the length in tokens that it was made for; its prompt may be a little shorter."""

    task: RecallTask
    length: int


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """One task answered on one rung."""

    kind: str
    length: int
    depth: float
    is_right: bool
    generated_tokens: int
    is_cut: bool


@dataclass(frozen=True, slots=True)
class TaskCell:
    """One kind of task at one length: shares of right answers, and how long the answers were."""

    kind: str
    prompt_tokens: int
    num: int
    right: float
    right_by_depth: Mapping[str, float]
    dense_right: float
    generated_tokens_mean: float


@dataclass(frozen=True, slots=True)
class WorstTask:
    """The cell that lost most against dense; among equals one that dense can do, with the fewest right."""

    kind: str
    prompt_tokens: int
    right: float
    dense_right: float


@dataclass(frozen=True, slots=True)
class RecallSummary:
    """All recall tasks on one rung; a mean never stands without its worst cell."""

    mean: float
    dense_mean: float
    worst: WorstTask
    cells: tuple[TaskCell, ...]
    generated_tokens_mean: float
    generated_tokens_ratio: float  # over dense's, on the same prompts
    cut_share: float  # answers that the limit ended
    prompt_density: float  # share of the blocks that dense reads for the prompts; decode steps apart

    def by_kind(self) -> dict[str, float]:
        """Return the share of right answers per kind, over all lengths."""
        kinds = dict.fromkeys(cell.kind for cell in self.cells)
        return {kind: fmean(cell.right for cell in self.cells if cell.kind == kind) for kind in kinds}

    def untold(self) -> list[str]:
        """Name the cells in which dense itself finds nothing: they say nothing about a rung."""
        return [f"{cell.kind} at {cell.prompt_tokens} tokens" for cell in self.cells if not cell.dense_right]


def make_tasks(loaded: LoadedModel, documents: Sequence[Document], plan: TaskPlan) -> list[PlannedTask]:
    """Return the plan's tasks, kind by kind and length by length."""
    return [
        PlannedTask(
            MAKERS[kind](
                loaded.tokenizer,
                prompt_tokens=length,
                depth=(i + 0.5) / plan.num_depths,
                seed=plan.seed + i,
                documents=documents,
            ),
            length,
        )
        for kind in plan.kinds
        for length in plan.lengths
        for i in range(plan.num_depths)
    ]


def recall_by_rung(
    loaded: LoadedModel, adapter: Adapter, tasks: Sequence[PlannedTask], progress: Progress
) -> dict[str, RecallSummary]:
    """Answer every task on every rung (greedy, prefill and decode both on the rung) and sum up."""
    work = partial(_run_task, loaded)
    turns = run_each(loaded, adapter, tasks, work, label="recall tasks", progress=progress)
    runs = by_variant(turns)
    dense = [run.result for run in runs.get(DENSE, [])]
    return {
        rung.id: summarise([run.result for run in found], dense, [run.prompt_density for run in found])
        for rung in adapter.ladder.rungs
        for found in (runs.get(rung.id, []),)
    }


def summarise(
    outcomes: Sequence[TaskOutcome], dense: Sequence[TaskOutcome], densities: Sequence[float]
) -> RecallSummary:
    """Sum up one rung's outcomes and its prompts' densities, beside dense's on the same tasks in order."""
    if not outcomes:
        raise ValueError("no recall task was run; give at least one kind and one length")
    places = dict.fromkeys((outcome.kind, outcome.length) for outcome in outcomes)
    cells = tuple(
        _make_cell(
            [outcome for outcome in outcomes if (outcome.kind, outcome.length) == place],
            [outcome for outcome in dense if (outcome.kind, outcome.length) == place],
        )
        for place in places
    )
    worst = min(cells, key=lambda cell: (cell.right - cell.dense_right, not cell.dense_right, cell.right))
    dense_tokens = fmean(outcome.generated_tokens for outcome in dense)
    own_tokens = fmean(outcome.generated_tokens for outcome in outcomes)
    return RecallSummary(
        mean=fmean(cell.right for cell in cells),
        dense_mean=fmean(cell.dense_right for cell in cells),
        worst=WorstTask(worst.kind, worst.prompt_tokens, worst.right, worst.dense_right),
        cells=cells,
        generated_tokens_mean=own_tokens,
        generated_tokens_ratio=own_tokens / max(dense_tokens, 1.0),
        cut_share=fmean(outcome.is_cut for outcome in outcomes),
        prompt_density=fmean(densities),
    )


def _run_task(loaded: LoadedModel, planned: PlannedTask) -> TaskOutcome:
    task = planned.task
    answer = answer_greedily(loaded, task.prompt, max_tokens=task.answer_tokens + EXTRA_TOKENS)
    return TaskOutcome(
        kind=task.name,
        length=planned.length,
        depth=task.depth,
        is_right=is_correct(task, answer.text),
        generated_tokens=answer.tokens,
        is_cut=answer.is_cut,
    )


def _make_cell(own: Sequence[TaskOutcome], dense: Sequence[TaskOutcome]) -> TaskCell:
    depths = dict.fromkeys(outcome.depth for outcome in own)
    return TaskCell(
        kind=own[0].kind,
        prompt_tokens=own[0].length,
        num=len(own),
        right=fmean(outcome.is_right for outcome in own),
        right_by_depth={
            f"{depth:.2f}": fmean(outcome.is_right for outcome in own if outcome.depth == depth)
            for depth in depths
        },
        dense_right=fmean(outcome.is_right for outcome in dense),
        generated_tokens_mean=fmean(outcome.generated_tokens for outcome in own),
    )
