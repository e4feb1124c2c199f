"""What all bodies share: strict fields, null as absent, and errors that name field, value and way out."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, from_json

from sentei.serving.errors import RequestError


class Fields(BaseModel):
    """Refuses unknown fields by name, unless they are null: replies that come back are full of those."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {key: value for key, value in data.items() if value is not None or key in known}


Parsed = TypeVar("Parsed", bound=BaseModel)


def parse_request(kind: type[Parsed], body: bytes) -> Parsed:
    """Parse a request body; raises RequestError that names the field, its value and what is allowed."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise request_error(error, body) from error


_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
    "too_short": "empty_array",
    "greater_than": "decimal_below_min_value",
    "greater_than_equal": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
}


def request_error(error: ValidationError, body: bytes) -> RequestError:
    """Turn pydantic's most exact complaint into an OpenAI-shaped error."""
    complaints = error.errors(include_url=False)
    data = {} if complaints[0]["type"] == "json_invalid" else from_json(body)
    # Of a union's branches the one that got furthest into the value knows best what is wrong with it, and one
    # that is of another kind altogether ("not a string") knows least.
    first, path = max(
        ((item, _path(item, data)) for item in complaints),
        key=lambda found: (len(found[1]), not found[0]["type"].endswith("_type")),
    )
    param, kind = ".".join(path) or None, first["type"]
    code = _CODES.get(kind, "invalid_value")
    if kind == "missing":
        return RequestError(f"{param} is missing; send it in the JSON body", code=code, param=param)
    if kind == "extra_forbidden":
        text = f"{param} is not a parameter of this API; leave it out"
        return RequestError(text, code=code, param=param)
    if kind == "union_tag_invalid":
        context = first["ctx"]
        name = f"{param}.{str(context['discriminator']).strip(chr(39))}"
        text = f"{name} is {context['tag']!r:.80}; this server takes {context['expected_tags']}"
        return RequestError(text, code=code, param=name)
    message = first["msg"][:1].lower() + first["msg"][1:]
    text = f"{param or 'the body'} is {_shorten(first['input'])}: {message}"
    return RequestError(text, code=code, param=param)


def _path(item: ErrorDetails, data: Any) -> list[str]:
    """Return the place in the caller's words: pydantic's also names the branches of unions."""
    path: list[str] = []
    for i, part in enumerate(item["loc"]):
        is_key = isinstance(data, dict) and part in data
        if is_key or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            data = data[part]
        elif item["type"] != "missing" or i < len(item["loc"]) - 1:
            continue
        path.append(str(part))
    return path


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def error_body(error: RequestError) -> dict[str, Any]:
    """Return the JSON body that OpenAI clients turn into their exceptions."""
    kind = "invalid_request_error" if error.status < 500 and error.status != 429 else "server_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
