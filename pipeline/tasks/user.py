"""The user's own tasks: one JSON object a line, checked as a whole before anything runs.

TaskFileError    all that is wrong with a file; each fault names file, line, field, value and what is allowed
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentei.errors import SenteiError
from sentei.pipeline.tasks.metrics import CHOICE, NAMES, MetricError, Score, find_metric
from sentei.pipeline.text.corpus import encode_text
from sentei.pipeline.text.files import FileError, LineError, numbered_lines, parse_line, read_text
from sentei.policies.schema.rules import nearest

REQUIRED = ("prompt", "reference", "metric")
OPTIONAL = ("task", "choices", "max_tokens", "stop")
EXTRA_TOKENS = 32  # room after the reference, where a line does not say how long an answer may be
MAX_FAULTS = 100  # more are counted, not listed
MAX_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class TaskFault:
    """One thing that is wrong in a task file; lines count from 1."""

    file: str
    line: int
    field: str
    message: str
    value: object = None

    def __str__(self) -> str:
        shown = repr(self.value)
        found = shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 1] + "…"
        ending = "" if self.value is None else f" (found {found})"
        place = f"{self.file}:{self.line}" if self.line else self.file
        return (
            f"{place}: {self.field}: {self.message}{ending}"
            if self.field
            else f"{place}: {self.message}{ending}"
        )


class TaskFileError(SenteiError, ValueError):
    """Everything that is wrong with a task file, in the order of its lines."""

    def __init__(self, faults: Sequence[TaskFault]) -> None:
        self.faults = tuple(faults)
        shown = [str(fault) for fault in self.faults[:MAX_FAULTS]]
        if len(self.faults) > MAX_FAULTS:
            shown.append(f"and {len(self.faults) - MAX_FAULTS} more; mend these first")
        super().__init__("\n".join(shown))


@dataclass(frozen=True, slots=True)
class UserTask:
    """One prompt of the user's with its reference; `task` groups lines that are reported together."""

    file: str
    line: int
    task: str
    prompt: str
    reference: str
    metric: str
    choices: tuple[str, ...]
    max_tokens: int
    stop: tuple[str, ...]

    @property
    def is_choice(self) -> bool:
        """Whether the answer is picked from the choices."""
        return self.metric == CHOICE

    def score(self, answer: str) -> float:
        """Score an answer from 0 to 1; a metric that fails on it is a TaskFileError of this line."""
        try:
            return (
                float(answer == self.reference)
                if self.is_choice
                else find_metric(self.metric)(answer, self.reference)
            )
        except MetricError as error:
            raise TaskFileError(
                [TaskFault(self.file, self.line, "metric", str(error), self.metric)]
            ) from error


def load_user_tasks(path: Path, tokenizer: Any, max_tokens: int) -> tuple[UserTask, ...]:
    """Read a file for a model of `max_tokens` positions; raises TaskFileError with all faults at once."""
    reader = _Reader(str(path), path.stem, tokenizer, max_tokens)
    try:
        text = read_text(path)
    except FileError as error:
        message = f"cannot be read as text with one JSON object a line ({error})"
        raise TaskFileError([TaskFault(str(path), 0, "", message)]) from error
    tasks = [task for number, line in numbered_lines(text) if (task := reader.read(number, line)) is not None]
    if not tasks and not reader.faults:
        reader.add(0, "", f"holds no task; each line is one JSON object with {', '.join(REQUIRED)}")
    if reader.faults:
        raise TaskFileError(reader.faults)
    return tuple(tasks)


class _Reader:
    """Lines on their way to tasks, with the faults found so far."""

    def __init__(self, file: str, default_task: str, tokenizer: Any, max_tokens: int) -> None:
        self.faults: list[TaskFault] = []
        self._file, self._default_task = file, default_task
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._metrics: dict[str, Score | MetricError] = {}

    def add(self, line: int, field: str, message: str, value: object = None) -> None:
        self.faults.append(TaskFault(self._file, line, field, message, value))

    def read(self, number: int, line: str) -> UserTask | None:
        """Return the line's task, or None after noting what is wrong with it."""
        known = len(self.faults)
        record = self._parse(number, line)
        if record is None:
            return None
        self._check_keys(number, record)
        self._check_types(number, record)
        if len(self.faults) == known:
            self._check_metric(number, record)
            self._check_length(number, record)
        return None if len(self.faults) > known else self._make(number, record)

    def _parse(self, number: int, line: str) -> dict[str, Any] | None:
        def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
            for key in {key for key, _ in items}:
                if sum(key == other for other, _ in items) > 1:
                    self.add(number, key, "is there twice; a key stands once")
            return dict(items)

        try:
            record = parse_line(line, pairs)
        except LineError as error:
            self.add(number, "", f"{error}; one object a line", line[: 2 * MAX_SHOWN])
            return None
        if not isinstance(record, dict):
            self.add(number, "", f"must be an object with {', '.join(REQUIRED)}", record)
            return None
        return record

    def _check_keys(self, number: int, record: Mapping[str, Any]) -> None:
        allowed = (*REQUIRED, *OPTIONAL)
        for key in record:
            if key not in allowed:
                message = f"no such field; allowed: {', '.join(allowed)}{nearest(key, allowed)}"
                self.add(number, key, message, record[key])
        for key in REQUIRED:
            if key not in record:
                self.add(number, key, "is missing")

    def _check_types(self, number: int, record: Mapping[str, Any]) -> None:
        for key, (is_right, message) in _TYPES.items():
            if key in record and not is_right(record[key]):
                self.add(number, key, message, _shown(record[key]))

    def _check_metric(self, number: int, record: Mapping[str, Any]) -> None:
        metric, reference = record["metric"], record["reference"]
        if metric == CHOICE:
            if "choices" not in record:
                self.add(number, "choices", "is missing; metric choice needs at least two texts")
            elif reference not in record["choices"]:
                self.add(number, "reference", f"must be one of the choices {record['choices']}", reference)
            return
        if "choices" in record:
            self.add(number, "choices", "only goes with metric choice", record["choices"])
        if metric == "regex":
            try:
                re.compile(reference)
            except re.error as error:
                self.add(number, "reference", f"is no regular expression ({error})", reference)
            return
        self._try_metric(number, metric, reference)

    def _try_metric(self, number: int, metric: str, reference: str) -> None:
        if metric not in self._metrics:
            try:
                self._metrics[metric] = find_metric(metric)
            except MetricError as error:
                self._metrics[metric] = error
        found = self._metrics[metric]
        try:
            if isinstance(found, MetricError):
                raise found
            found(
                reference, reference
            )  # a function that cannot score the reference itself fails here, not later
        except MetricError as error:
            self.add(number, "metric", f"{error}{nearest(metric, NAMES)}", metric)

    def _check_length(self, number: int, record: Mapping[str, Any]) -> None:
        prompt = len(self._tokenizer(record["prompt"], verbose=False)["input_ids"])
        answer = self._answer_tokens(record)
        if prompt + answer > self._max_tokens:
            self.add(
                number,
                "prompt",
                f"takes {prompt} tokens and its answer up to {answer}, but the model has {self._max_tokens} "
                "positions; shorten the prompt or give a smaller max_tokens",
                record["prompt"],
            )

    def _answer_tokens(self, record: Mapping[str, Any]) -> int:
        if "max_tokens" in record:
            return int(record["max_tokens"])
        longest = max(record.get("choices", [record["reference"]]), key=len)
        return len(encode_text(self._tokenizer, longest)) + EXTRA_TOKENS

    def _make(self, number: int, record: Mapping[str, Any]) -> UserTask:
        stop = record.get("stop", [])
        return UserTask(
            file=self._file,
            line=number,
            task=record.get("task", self._default_task),
            prompt=record["prompt"],
            reference=record["reference"],
            metric=record["metric"],
            choices=tuple(record.get("choices", ())),
            max_tokens=self._answer_tokens(record),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(_is_text(item) for item in value)


def _are_choices(value: object) -> bool:
    return isinstance(value, list) and _are_texts(value) and len(set(value)) == len(value) >= 2


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _shown(value: object) -> object:
    return "null" if value is None else value


_TYPES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "prompt": (_is_text, "must be a text that is not empty"),
    "reference": (_is_text, "must be a text that is not empty"),
    "metric": (_is_text, f'must be one of {", ".join(NAMES)}, or "package.module:function"'),
    "task": (_is_text, "must be a name, to group lines by"),
    "choices": (_are_choices, "must be a list of at least two different texts"),
    "max_tokens": (_is_count, "must be a whole number of at least 1"),
    "stop": (lambda value: _is_text(value) or _are_texts(value), "must be a text or a list of texts"),
}
