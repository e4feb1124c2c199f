"""Recall tasks: long real text with notes in it and one question at the end, made offline from a seed."""

from collections.abc import Callable, Mapping

from sentei.pipeline.tasks.chains import make_variable_names, make_variable_value
from sentei.pipeline.tasks.notes import (
    KEY_NOTE,
    KEY_QUESTION,
    LIST_NOTE,
    LIST_QUESTION,
    PAIR_NOTE,
    PAIR_QUESTION,
    PASSKEY_NOTE,
    PASSKEY_QUESTION,
    make_copy,
    make_key_value,
    make_multi_key,
    make_passkey,
)
from sentei.pipeline.tasks.prompt import (
    LIST_WORDS,
    WORDS,
    RecallTask,
    TaskError,
    TaskName,
    is_correct,
    split_lines,
    usable_words,
)

MAKERS: Mapping[TaskName, Callable[..., RecallTask]] = {
    "passkey": make_passkey,
    "key_value": make_key_value,
    "copy": make_copy,
    "multi_key": make_multi_key,
    "variable_value": make_variable_value,
    "variable_names": make_variable_names,
}

__all__ = [
    "KEY_NOTE",
    "KEY_QUESTION",
    "LIST_NOTE",
    "LIST_QUESTION",
    "LIST_WORDS",
    "MAKERS",
    "PAIR_NOTE",
    "PAIR_QUESTION",
    "PASSKEY_NOTE",
    "PASSKEY_QUESTION",
    "WORDS",
    "RecallTask",
    "TaskError",
    "TaskName",
    "is_correct",
    "make_copy",
    "make_key_value",
    "make_multi_key",
    "make_passkey",
    "make_variable_names",
    "make_variable_value",
    "split_lines",
    "usable_words",
]
