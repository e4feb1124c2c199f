"""Recall tasks: long real text with notes in it and one question at the end, made offline from a seed."""

from collections.abc import Callable, Mapping

from sentei.pipeline.tasks.chains import make_variable_names, make_variable_value
from sentei.pipeline.tasks.notes import make_copy, make_key_value, make_multi_key, make_passkey
from sentei.pipeline.tasks.prompt import RecallTask, TaskName

MAKERS: Mapping[TaskName, Callable[..., RecallTask]] = {
    "passkey": make_passkey,
    "key_value": make_key_value,
    "copy": make_copy,
    "multi_key": make_multi_key,
    "variable_value": make_variable_value,
    "variable_names": make_variable_names,
}
