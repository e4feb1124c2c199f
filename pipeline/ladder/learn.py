"""How weights learn here: epochs over lessons along a cosine, kept where held-out divergence was least."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

Lesson = TypeVar("Lesson")


@dataclass(frozen=True, slots=True)
class Course:
    """How fast and how long; an epoch is a gain if it leaves less than `worthwhile` of the best KL."""

    learning_rate: float
    weight_decay: float
    max_epochs: int
    patience: int
    seed: int
    worthwhile: float = 1.0


def learn(
    parameters: Sequence[torch.Tensor],
    divergence: Callable[[Lesson], torch.Tensor],
    train: Sequence[Lesson],
    held_out: Sequence[Lesson],
    course: Course,
    *,
    epoch: Callable[[], AbstractContextManager[None]] = nullcontext,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[float, float]:
    """Train in place and leave the best weights; return the mean held-out divergence before and after.

    Each epoch runs inside `epoch()`; `on_step` hears (steps done, steps at most).
    """
    optimizer = torch.optim.AdamW(parameters, lr=course.learning_rate, weight_decay=course.weight_decay)
    num_steps = max(1, course.max_epochs * len(train))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))
    )
    generator = torch.Generator().manual_seed(course.seed)
    before = best = mean_divergence(divergence, held_out)
    best_weights = _copy(parameters)
    epochs_since_best = step = 0
    for _ in range(course.max_epochs):
        with epoch():
            for i in torch.randperm(len(train), generator=generator).tolist():
                on_step(step, num_steps)
                optimizer.zero_grad()
                divergence(train[i]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                step += 1
        current = mean_divergence(divergence, held_out)
        epochs_since_best = 0 if current < best * course.worthwhile else epochs_since_best + 1
        if current < best:
            best, best_weights = current, _copy(parameters)
        if epochs_since_best >= course.patience:
            break
    on_step(num_steps, num_steps)
    with torch.no_grad():
        for parameter, weights in zip(parameters, best_weights, strict=True):
            parameter.copy_(weights)
    return before, best


@torch.no_grad()
def mean_divergence(divergence: Callable[[Lesson], torch.Tensor], lessons: Sequence[Lesson]) -> float:
    """Mean over lessons, in nats."""
    return sum(float(divergence(lesson)) for lesson in lessons) / len(lessons)


def _copy(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
