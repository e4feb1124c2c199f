"""YAML text to a Policy, or one PolicyError with everything that is wrong.

Each fault names file, line, path, value and what is allowed.
Whatever the text is, nothing but PolicyError comes out of `load_policy`.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from sentei.errors import SenteiError
from sentei.policies.schema.nodes import LimitedLoader, is_misread
from sentei.policies.schema.policy import Policy, Spec
from sentei.policies.schema.rules import Path, dotted_path, find_faults, nearest

# A policy has some 3,000 characters and 400 values. The limits keep the worst text below half a second.
MAX_CHARACTERS = 50_000
MAX_DEPTH = 30
MAX_VALUES = 5_000  # also with aliases expanded
MAX_FAULTS = 100  # more are counted, not listed
_OTHERS = {"argoproj.io": "Argo Rollouts", "flagger.app": "Flagger"}
_OTHERS_GUIDE = "docs/guides/from-argo-and-flagger.md"
MAX_PATH, MAX_MESSAGE = 200, 600  # characters of one printed fault: a key may be a whole page


@dataclass(frozen=True, slots=True)
class PolicyFault:
    """One thing that is wrong in a policy file; lines count from 1."""

    file: str
    line: int
    path: str
    value: object
    message: str

    def __str__(self) -> str:
        found = "" if self.value is None else f" (found {_short(self.value)})"
        place = _clip(self.path, MAX_PATH) or "the document"
        return f"{self.file}:{self.line}: {place}: {_clip(self.message, MAX_MESSAGE)}{found}"


class PolicyError(SenteiError, ValueError):
    """Everything that is wrong with a policy text, in the order of its lines."""

    def __init__(self, errors: list[PolicyFault]) -> None:
        self.errors = sorted(errors, key=lambda item: (item.line, not item.path, item.path, item.message))
        super().__init__("\n".join(str(item) for item in self.errors))


def load_policy(text: str, source: str = "<policy>") -> Policy:
    """The policy in that text; PolicyError with all errors at once otherwise."""
    reader = _Reader(source)
    document = reader.read(text)
    reader.give_up_if_faulty()
    reader.check(document)
    reader.give_up_if_faulty()
    return Policy.model_validate(document)


def read_document(text: str, source: str = "<policy>") -> dict[str, Any]:
    """The plain values of a policy text, whatever they say; PolicyError where it is no mapping of YAML."""
    reader = _Reader(source)
    document: dict[str, Any] = reader.read(text)
    reader.give_up_if_faulty()
    return document


def find_line(text: str, path: Path) -> int:
    """The line of a path in a policy text, or of the nearest part of it that is there."""
    reader = _Reader("<policy>")
    reader.read(text)
    return reader.line(path)


def policy_json_schema() -> dict[str, Any]:
    """The JSON Schema of a policy file, for editors."""
    return Policy.model_json_schema(by_alias=True)


class _Loader(LimitedLoader):
    """The limits of a policy."""

    max_depth = MAX_DEPTH
    max_nodes = 2 * MAX_VALUES  # keys are nodes too
    too_many = f"a policy has at most {MAX_VALUES} values"


class _Reader:
    """One text on its way to plain values, with the line of every path."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.faults: list[PolicyFault] = []
        self.lines: dict[Path, int] = {(): 1}
        self._num_values = 0
        self._num_more = 0

    def add(self, path: Path, value: object, message: str, line: int | None = None) -> None:
        if len(self.faults) >= MAX_FAULTS:
            self._num_more += 1
            return
        self.faults.append(
            PolicyFault(self.source, line or self.line(path), dotted_path(path), value, message)
        )

    def give_up_if_faulty(self) -> None:
        """Raise what was found so far, if anything was."""
        if self._num_more:
            last = max(item.line for item in self.faults)
            message = f"and {self._num_more} more faults; mend these first"
            self.faults.append(PolicyFault(self.source, last, "", None, message))
        if self.faults:
            raise PolicyError(self.faults)

    def line(self, path: Path) -> int:
        """The line of the path, or of the nearest part of it that is in the text."""
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]

    def read(self, text: str) -> Any:
        """Plain values of the text; what is no YAML, or says a thing twice, becomes faults."""
        if len(text) > MAX_CHARACTERS:
            self.add((), len(text), f"a policy has at most {MAX_CHARACTERS} characters")
            return None
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.add((), None, f"not YAML: {error.problem or error.context}", (mark.line + 1) if mark else 1)
            return None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self.add((), None, f"not YAML: {str(error).splitlines()[0]}")
            return None
        if not isinstance(node, yaml.MappingNode):
            self.add((), None, "a policy is a mapping that starts with apiVersion: sentei/v1")
            return None
        return self._plain(node, (), frozenset())

    def _plain(self, node: yaml.Node, path: Path, above: frozenset[int]) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        self._num_values += 1
        if id(node) in above or self._num_values > MAX_VALUES:
            if self._num_values <= MAX_VALUES + 1:
                self.add(path, None, f"an alias that contains itself, or more than {MAX_VALUES} values")
            return None
        above |= {id(node)}
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, above)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*path, index), above) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path, above: frozenset[int]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag == "tag:yaml.org,2002:merge":
                self.add(path, None, "a key must be plain text; merge keys (<<) are not supported", line)
            elif key in found:
                first = self.lines[(*path, key)]
                self.add((*path, key), None, f'key "{key}" is given twice; first in line {first}', line)
            else:
                self.lines[(*path, key)] = line
                found[key] = self._plain(value_node, (*path, key), above)
        return found

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        is_plain = node.style is None
        if is_misread(node):
            self.add(path, node.value, "YAML reads this as another number; write it plainly, such as 250")
            return None
        if is_plain and node.tag.endswith(":bool") and node.value.lower() not in ("true", "false"):
            self.add(path, node.value, "YAML reads this as true or false; a word stands in quotes")
            return None
        try:
            value = yaml.SafeLoader("").construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            self.add(path, node.value, f"cannot be read: {str(error).splitlines()[0]}")
            return None
        if value is None or isinstance(value, str | int | float):
            return value
        self.add(path, node.value, "dates, binary and tagged values are not allowed; write it as quoted text")
        return None

    def check(self, document: dict[str, Any]) -> None:
        """Structure section by section, then the rules over the sections that are well formed."""
        origin = str(document.get("apiVersion", "")).split("/")[0]
        if origin in _OTHERS:
            self.add(
                ("apiVersion",),
                document["apiVersion"],
                f"this is a file of {_OTHERS[origin]}; {_OTHERS_GUIDE} says its words in ours",
            )
            return
        top = {name: field.alias or name for name, field in Policy.model_fields.items()}
        for key in document:
            if key not in top.values():
                self._unknown_key((key,), Policy)
        for name, alias in top.items():
            if name != "spec":
                self._section((alias,), Policy, name, document.get(alias), is_given=alias in document)
        spec = document.get("spec")
        if not isinstance(spec, dict):
            self.add(("spec",), spec, "is required: a mapping of sections")
            return
        for key in spec:
            if key not in Spec.model_fields:
                self._unknown_key(("spec", key), Spec)
        sections = {
            name: self._section(("spec", name), Spec, name, spec.get(name), is_given=name in spec)
            for name in Spec.model_fields
        }
        for fault in find_faults(sections):
            self.add(("spec", *fault.path), fault.value, fault.message)

    def _section(self, path: Path, owner: type[BaseModel], name: str, value: Any, *, is_given: bool) -> Any:
        field = owner.model_fields[name]
        if not is_given:
            if field.is_required():
                self.add(path, None, f'"{path[-1]}" is required')
                return None
            return field.get_default(call_default_factory=True)
        annotation, adapter = _adapter(owner, name)
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            unknown = [item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"]
            for item in error.errors(include_url=False):
                self._structure_fault(path, annotation, dict(item))
            if unknown and len(unknown) == error.error_count():
                return adapter.validate_python(_without(value, unknown))  # so that a typo hides no rule
        return None

    def _structure_fault(self, path: Path, annotation: Any, item: dict[str, Any]) -> None:
        loc = tuple(part for part in item["loc"])
        full, kind = (*path, *loc), item["type"]
        if kind == "extra_forbidden":
            self._unknown_key(full, _model_at(annotation, loc[:-1]))
            return
        if kind == "missing":
            self.add(full, None, f'"{full[-1]}" is required')
        else:
            self.add(full, item["input"], _readable(item))

    def _unknown_key(self, path: Path, model: type[BaseModel] | None) -> None:
        if len(self.faults) >= MAX_FAULTS:
            self.add(path, None, "unknown key")
            return
        fields = model.model_fields if model is not None else {}
        known = [field.alias or name for name, field in fields.items()]
        self.add(
            path,
            None,
            f'unknown key "{path[-1]}"; allowed: {", ".join(known)}{nearest(str(path[-1]), known)}',
        )


@lru_cache
def _adapter(owner: type[BaseModel], name: str) -> tuple[Any, TypeAdapter[Any]]:
    """The annotation of one field with its limits, and what validates it."""
    field = owner.model_fields[name]
    annotation: Any = field.annotation
    if field.metadata:
        annotation = Annotated[annotation, *field.metadata]
    return annotation, TypeAdapter(annotation)


def _readable(item: dict[str, Any]) -> str:
    message: str = item["msg"]
    return message.removeprefix("Value error, ").replace("Input should be", "must be")


def _without(value: Any, paths: list[tuple[str | int, ...]]) -> Any:
    """The same values without the keys at those paths."""
    if isinstance(value, dict):
        gone = {path[0] for path in paths if len(path) == 1}
        return {
            key: _without(inner, [path[1:] for path in paths if path and path[0] == key])
            for key, inner in value.items()
            if key not in gone
        }
    if isinstance(value, list):
        return [
            _without(v, [path[1:] for path in paths if path and path[0] == i]) for i, v in enumerate(value)
        ]
    return value


def _model_at(annotation: Any, loc: tuple[str | int, ...]) -> type[BaseModel] | None:
    """The model that stands at that place of an annotation."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _model_at(get_args(annotation)[0], loc)
    if origin in (Union, types.UnionType):
        found = (_model_at(option, loc) for option in get_args(annotation))
        return next((model for model in found if model is not None), None)
    if origin is tuple:
        return _model_at(get_args(annotation)[0], loc[1:]) if loc else None
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return None
    if not loc:
        return annotation
    for name, field in annotation.model_fields.items():
        if loc[0] in (name, field.alias):
            return _model_at(field.annotation, loc[1:])
    return None


def _short(value: object) -> str:
    return _clip(repr(value), 60)


def _clip(text: str, size: int) -> str:
    """The text on one line, at most so long, without signs that a terminal would obey."""
    plain = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text[: size + 1])
    return plain if len(plain) <= size else f"{plain[: size - 3]}..."
