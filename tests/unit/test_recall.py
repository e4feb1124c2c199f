"""Recall tasks summed up: the worst cell beside every mean, depth by depth, lengths beside dense."""

import pytest

from sentei.pipeline.evaluation.evaluate import EvaluateOptions
from sentei.pipeline.evaluation.recall import TaskOutcome, summarise
from sentei.pipeline.tasks.prompt import TaskError


def outcome(kind: str, length: int, depth: float, is_right: bool, tokens: int = 4) -> TaskOutcome:
    """One answered task."""
    return TaskOutcome(kind, length, depth, is_right, tokens, is_cut=tokens > 16)


DENSE = [
    outcome("passkey", 512, 0.25, True),
    outcome("passkey", 512, 0.75, True),
    outcome("passkey", 2048, 0.25, True),
    outcome("passkey", 2048, 0.75, False),
    outcome("variable_value", 2048, 0.25, False),
    outcome("variable_value", 2048, 0.75, False),
]
BOLD = [
    outcome("passkey", 512, 0.25, True),
    outcome("passkey", 512, 0.75, False, 20),
    outcome("passkey", 2048, 0.25, True),
    outcome("passkey", 2048, 0.75, False),
    outcome("variable_value", 2048, 0.25, False),
    outcome("variable_value", 2048, 0.75, False),
]


def test_the_worst_is_what_lost_most_against_dense() -> None:
    """A task that dense cannot do either is not the worst, whatever its share."""
    found = summarise(BOLD, DENSE, [0.1, 0.3] * 3)

    assert (found.worst.kind, found.worst.prompt_tokens) == ("passkey", 512)
    assert (found.worst.right, found.worst.dense_right) == (0.5, 1.0)
    assert (found.mean, found.dense_mean) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    assert found.by_kind() == {"passkey": 0.5, "variable_value": 0.0}


def test_cells_keep_the_depths_apart() -> None:
    """The grid says where in the prompt a note was missed."""
    cells = summarise(BOLD, DENSE, [0.1, 0.3] * 3).cells

    assert [(cell.kind, cell.prompt_tokens, cell.num) for cell in cells] == [
        ("passkey", 512, 2),
        ("passkey", 2048, 2),
        ("variable_value", 2048, 2),
    ]
    assert cells[0].right_by_depth == {"0.25": 1.0, "0.75": 0.0}


def test_longer_answers_show() -> None:
    """The length of answers stands beside dense's, with the share that the limit ended."""
    found = summarise(BOLD, DENSE, [0.1, 0.3] * 3)

    assert found.generated_tokens_mean == pytest.approx(40 / 6)
    assert found.generated_tokens_ratio == pytest.approx(40 / 24)
    assert found.cut_share == pytest.approx(1 / 6)


def test_what_was_read_stands_beside_what_was_found() -> None:
    """A rung's answers are worth what it read for them: the mean over its prompts."""
    assert summarise(BOLD, DENSE, [0.1, 0.3] * 3).prompt_density == pytest.approx(0.2)


def test_tasks_that_dense_cannot_do_are_named() -> None:
    """What dense never finds says nothing about a rung."""
    assert summarise(DENSE, DENSE, [1.0] * 6).untold() == ["variable_value at 2048 tokens"]


def test_nothing_to_sum_up_is_refused() -> None:
    """No task is no mean of zero."""
    with pytest.raises(ValueError, match="give at least one kind and one length"):
        summarise([], [], [])


def test_lengths_default_to_a_quarter_and_the_window() -> None:
    """The longest prompt leaves room for its answer, and lengths that a model does not have are refused."""
    assert EvaluateOptions().task_plan(2048, 16_384).lengths == (512, 2048)
    assert EvaluateOptions().task_plan(2048, 2048).lengths == (512, 1984)
    with pytest.raises(TaskError, match="length is 4096; this model has 2048 positions, so at most 1984"):
        EvaluateOptions(task_lengths=(4096,)).task_plan(2048, 2048)
