"""The user's task file: metrics, everything that can be wrong with a line, and the sum beside dense."""

import json
from pathlib import Path
from typing import Any

import pytest

from sentei.pipeline.evaluation.user_tasks import UserAnswer, save_answers, summarise
from sentei.pipeline.tasks.metrics import MetricError, find_metric
from sentei.pipeline.tasks.user import TaskFileError, UserTask, load_user_tasks
from tests.fakes_tokenizer import WordTokenizer

GOOD: dict[str, Any] = {"prompt": "one two three", "reference": "four", "metric": "exact_match"}
METRICS_MODULE = """
def first_letter(answer, reference):
    return answer[:1] == reference[:1]

def too_much(answer, reference):
    return 7

def broken(answer, reference):
    raise KeyError("gone")

def other_names(prediction, target):
    return 1.0
"""


@pytest.fixture(autouse=True)
def metrics_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's on the path."""
    (tmp_path / "mine_of_test.py").write_text(METRICS_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


def write(folder: Path, *lines: object) -> Path:
    """A task file of these lines."""
    path = folder / "tasks.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def load(path: Path, max_tokens: int = 100) -> tuple[UserTask, ...]:
    """Load with a tokenizer of one token a word."""
    return load_user_tasks(path, WordTokenizer(), max_tokens)


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "expected"),
    [
        ("exact_match", " four\n", "four", 1.0),
        ("exact_match", "Four", "four", 0.0),
        ("contains", "it is  four\ntimes", "is four times", 1.0),
        ("contains", "for", "four", 0.0),
        ("f1", "The four, horses", "four HORSES ride", 2 * 2 / 6),
        ("f1", "...", "four", 0.0),
        ("regex", "on 2026-11-26.", r"\d{4}-\d\d", 1.0),
        ("regex", "never", r"^\d", 0.0),
        ("mine_of_test:first_letter", "fish", "four", 1.0),
    ],
)
def test_a_metric_gives_a_number(metric: str, answer: str, reference: str, expected: float) -> None:
    """Each metric scores from 0 to 1 as its description says."""
    assert find_metric(metric)(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("fuzzy", "allowed: exact_match, contains, f1, regex, choice, or a function"),
        ("no_such_module_of_test:f", "cannot be imported .*PYTHONPATH"),
        ("os:system", r"is no function of \(answer, reference\)"),
        ("mine_of_test:other_names", r"is no function of \(answer, reference\)"),
    ],
)
def test_an_unknown_metric_names_the_way_out(metric: str, message: str) -> None:
    """What is no metric is refused by reason; a function that was not made for it is never called."""
    with pytest.raises(MetricError, match=message):
        find_metric(metric)


def test_a_good_file_becomes_tasks(tmp_path: Path) -> None:
    """Defaults come from the file and the reference, what is given stays, blank lines do not matter."""
    path = write(
        tmp_path,
        GOOD,
        "",
        GOOD | {"task": "mine", "max_tokens": 5, "stop": "."},
        {"prompt": "pick", "reference": "b", "metric": "choice", "choices": ["a", "b"]},
    )

    plain, given, choice = load(path)

    assert (plain.task, plain.line, plain.max_tokens, plain.stop) == ("tasks", 1, 1 + 32, ())
    assert (given.task, given.line, given.max_tokens, given.stop) == ("mine", 3, 5, (".",))
    assert choice.is_choice
    assert (choice.score("b"), choice.score("a")) == (1.0, 0.0)


FAULTS: list[tuple[object, str]] = [
    (
        GOOD | {"metric": "exact_mach"},
        r':1: metric: allowed: exact_match, .*; did you mean "exact_match"\? \(found',
    ),
    ({"prompt": "a", "metric": "f1"}, r":1: reference: is missing"),
    (GOOD | {"promt": "a"}, r':1: promt: no such field; allowed: prompt, .*did you mean "prompt"\?'),
    (GOOD | {"prompt": ""}, r":1: prompt: must be a text that is not empty \(found ''\)"),
    (GOOD | {"reference": 4}, r":1: reference: must be a text that is not empty \(found 4\)"),
    (GOOD | {"max_tokens": 0}, r":1: max_tokens: must be a whole number of at least 1 \(found 0\)"),
    (GOOD | {"max_tokens": True}, r":1: max_tokens: must be a whole number"),
    (GOOD | {"stop": []}, r":1: stop: must be a text or a list of texts"),
    (GOOD | {"task": None}, r":1: task: must be a name, to group lines by \(found 'null'\)"),
    (GOOD | {"choices": ["a", "b"]}, r":1: choices: only goes with metric choice"),
    (GOOD | {"metric": "choice"}, r":1: choices: is missing"),
    (
        GOOD | {"metric": "choice", "choices": ["a", "a"]},
        r":1: choices: must be a list of at least two different",
    ),
    (
        GOOD | {"metric": "choice", "choices": ["a", "b"]},
        r":1: reference: must be one of the choices \['a', 'b'\]",
    ),
    (GOOD | {"metric": "regex", "reference": "("}, r":1: reference: is no regular expression \(missing \)"),
    (GOOD | {"metric": "mine_of_test:too_much"}, r":1: metric: mine_of_test:too_much gave 7; .*from 0 to 1"),
    (
        GOOD | {"metric": "mine_of_test:broken"},
        r":1: metric: mine_of_test:broken failed \(KeyError: 'gone'\)",
    ),
    (GOOD | {"max_tokens": 98}, r":1: prompt: takes 3 tokens and its answer up to 98, but the model has 100"),
    ('{"prompt": "a", "prompt": "b", "reference": "c", "metric": "f1"}', r":1: prompt: is there twice"),
    ("not json", r":1: not JSON \(Expecting value at column 1\); one object a line \(found 'not json'\)"),
    ("[1]", r":1: must be an object with prompt, reference, metric \(found \[1\]\)"),
    ("", r"tasks\.jsonl: holds no task"),
]


@pytest.mark.parametrize(("line", "message"), FAULTS)
def test_a_fault_names_file_line_field_and_value(tmp_path: Path, line: object, message: str) -> None:
    """Each thing that can be wrong has a message with the place, the value and what is allowed."""
    with pytest.raises(TaskFileError, match=message) as caught:
        load(write(tmp_path, line))

    assert str(tmp_path / "tasks.jsonl") in str(caught.value)


def test_all_faults_of_a_file_come_in_one_run(tmp_path: Path) -> None:
    """Faults of several lines, several in one line, are told together in the order of the lines."""
    path = write(tmp_path, GOOD, GOOD | {"metric": "fuzzy"}, "{", {"prompt": 1, "metrik": "f1"}, GOOD)

    with pytest.raises(TaskFileError) as caught:
        load(path)

    places = [(fault.line, fault.field) for fault in caught.value.faults]
    assert places == [(2, "metric"), (3, ""), (4, "metrik"), (4, "reference"), (4, "metric"), (4, "prompt")]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A file that cannot be read says which."""
    with pytest.raises(TaskFileError, match=r"nowhere\.jsonl: cannot be read"):
        load(tmp_path / "nowhere.jsonl")


def answer(line: int, rung: str, score: float, **changes: Any) -> UserAnswer:
    """One answer."""
    given = {"task": "a", "answer": "x", "generated_tokens": 4, "density": 0.5} | changes
    return UserAnswer(line=line, rung=rung, score=score, **given)


def test_the_sum_counts_what_changed_and_names_the_worst(tmp_path: Path) -> None:
    """Means stand beside the task that lost most; lines that changed are counted, with a sign test."""
    path = write(tmp_path, *[GOOD | {"task": name} for name in "aaabb"])
    dense = [
        answer(i, "dense", s, task=t, density=1.0)
        for i, (t, s) in enumerate(zip("aaabb", [1, 1, 0, 1, 1], strict=True))
    ]
    bold = [
        answer(i, "bold", s, task=t, generated_tokens=8, density=d)
        for i, (t, s, d) in enumerate(zip("aaabb", [0, 0, 1, 1, 1], [0.5, 0.5, 0.2, 1.0, 0.8], strict=True))
    ]

    found = summarise(load(path), bold, dense)

    a = found.find("a")
    assert (found.mean, found.dense_mean, found.worst) == (pytest.approx(2 / 3), pytest.approx(5 / 6), "a")
    assert (a.num, a.worse, a.better, a.p_value) == (3, 2, 1, pytest.approx(1.0))
    assert (a.generated_tokens_mean, a.dense_generated_tokens_mean) == (8, 4)
    assert (a.density, a.num_untouched, found.find("b").num_untouched) == (pytest.approx(0.4), 0, 1)


def test_answers_are_saved_line_by_line(tmp_path: Path) -> None:
    """The file holds dense's and the rung's answer to a line one after the other."""
    by_rung = {
        rung: [answer(1, rung, 1.0), answer(2, rung, 0.0, generated_tokens=None)]
        for rung in ("dense", "bold")
    }

    rows = [
        json.loads(row) for row in save_answers(by_rung, tmp_path / "answers.jsonl").read_text().splitlines()
    ]

    assert [(row["line"], row["rung"]) for row in rows] == [
        (1, "dense"),
        (1, "bold"),
        (2, "dense"),
        (2, "bold"),
    ]
    assert rows[2]["generated_tokens"] is None
