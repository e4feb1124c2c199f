"""The user's own tasks on every rung, line by line beside dense."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from scipy import stats

from sentei.kernels.hf.adapter import Adapter
from sentei.pipeline.measure.answers import answer_greedily, choose
from sentei.pipeline.measure.rungs import by_variant, run_each
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress
from sentei.pipeline.tasks.user import UserTask


@dataclass(frozen=True, slots=True)
class UserAnswer:
    """One line answered on one rung; `density` is 1 where the prompt was too short for the sparse path."""

    task: str
    line: int
    rung: str
    score: float
    answer: str
    generated_tokens: int | None  # None where a choice was made
    density: float


@dataclass(frozen=True, slots=True)
class UserTaskScore:
    """One group of lines on one rung; better and worse count lines against dense."""

    task: str
    metrics: tuple[str, ...]
    num: int
    score: float
    dense_score: float
    better: int
    worse: int
    p_value: float  # of an exact sign test over the lines that changed
    generated_tokens_mean: float | None
    dense_generated_tokens_mean: float | None
    density: float
    num_untouched: int  # lines on which nothing was dropped: they say nothing about the rung


@dataclass(frozen=True, slots=True)
class UserSummary:
    """All of the user's tasks on one rung; the worst lost most against dense, or scored least."""

    mean: float
    dense_mean: float
    worst: str
    tasks: tuple[UserTaskScore, ...]

    def find(self, task: str) -> UserTaskScore:
        """Return one task's score by name."""
        return next(score for score in self.tasks if score.task == task)


def answers_by_rung(
    loaded: LoadedModel, adapter: Adapter, tasks: Sequence[UserTask], progress: Progress
) -> dict[str, list[UserAnswer]]:
    """Answer every line on every rung (greedy, or by log-likelihood over choices) and score it."""
    work = partial(_answer, loaded)
    turns = run_each(loaded, adapter, tasks, work, label="your tasks", progress=progress)
    return {
        rung_id: [
            UserAnswer(
                task=task.task,
                line=task.line,
                rung=rung_id,
                score=task.score(run.result[0]),
                answer=run.result[0],
                generated_tokens=run.result[1],
                density=run.density,
            )
            for task, run in zip(tasks, found, strict=True)
        ]
        for rung_id, found in by_variant(turns).items()
    }


def summarise(
    tasks: Sequence[UserTask], answers: Sequence[UserAnswer], dense: Sequence[UserAnswer]
) -> UserSummary:
    """Sum up one rung's answers beside dense's to the same lines in the same order."""
    scores = []
    for name in dict.fromkeys(task.task for task in tasks):
        places = [i for i, task in enumerate(tasks) if task.task == name]
        metrics = tuple(dict.fromkeys(tasks[i].metric for i in places))
        scores.append(_score_task(metrics, [answers[i] for i in places], [dense[i] for i in places]))
    worst = min(
        scores, key=lambda found: (found.score - found.dense_score, not found.dense_score, found.score)
    )
    return UserSummary(
        mean=fmean(score.score for score in scores),
        dense_mean=fmean(score.dense_score for score in scores),
        worst=worst.task,
        tasks=tuple(scores),
    )


def save_answers(answers: Mapping[str, Sequence[UserAnswer]], path: Path) -> Path:
    """Write every answer of every rung, one JSON object a line, line by line of the task file."""
    rows = [asdict(answer) for line in zip(*answers.values(), strict=True) for answer in line]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _answer(loaded: LoadedModel, task: UserTask) -> tuple[str, int | None]:
    """Return the answer, and its tokens unless it was chosen."""
    if task.is_choice:
        return task.choices[choose(loaded, task.prompt, task.choices)], None
    answer = answer_greedily(loaded, task.prompt, max_tokens=task.max_tokens, stop=task.stop)
    return answer.text, answer.tokens


def _score_task(
    metrics: tuple[str, ...], own: Sequence[UserAnswer], dense: Sequence[UserAnswer]
) -> UserTaskScore:
    changes = [a.score - b.score for a, b in zip(own, dense, strict=True)]
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    return UserTaskScore(
        task=own[0].task,
        metrics=metrics,
        num=len(own),
        score=fmean(answer.score for answer in own),
        dense_score=fmean(answer.score for answer in dense),
        better=better,
        worse=worse,
        p_value=float(stats.binomtest(worse, better + worse).pvalue) if better + worse else 1.0,
        generated_tokens_mean=_mean_tokens(own),
        dense_generated_tokens_mean=_mean_tokens(dense),
        density=fmean(answer.density for answer in own),
        num_untouched=sum(answer.density >= 1.0 for answer in own),
    )


def _mean_tokens(answers: Sequence[UserAnswer]) -> float | None:
    known = [answer.generated_tokens for answer in answers if answer.generated_tokens is not None]
    return fmean(known) if known else None
