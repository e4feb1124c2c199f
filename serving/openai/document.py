"""`/openapi.json`: bodies are parsed by hand, so FastAPI is told here what they and the answers look like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode

from sentei.serving.openai.answers import ErrorBody

REF = "#/components/schemas/{model}"
ERRORS = {
    400: "the request cannot be answered: parameter, value and way out are named",
    401: "no valid key",
    403: "the role does not cover it, or the app does not allow it",
    404: "no such thing",
    409: "not now",
    408: "the body did not come in time",
    413: "the body is too long",
    429: "too many requests; `retry-after` says when to come back",
    503: "nobody can answer now",
}
_DEFINITIONS = "x-definitions"  # the parts of a body's schema, until they stand where all schemas do


def describe(
    body: type[BaseModel] | None = None,
    *,
    answer: type[BaseModel] | None = None,
    errors: Sequence[int] = (400, 401, 404, 413, 429, 503),
    piece: type[BaseModel] | None = None,
) -> dict[str, Any]:
    """Return what a route says of its body, its answer (None: any JSON), a stream's pieces, its errors."""
    responses: dict[int | str, dict[str, Any]] = {} if answer is None else {200: {"model": answer}}
    extra: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    if piece is not None:
        responses[200]["content"] = {"text/event-stream": {"schema": _event_schema(piece)}}
        parts |= _parts(piece, "serialization")
    errors = errors if body is None else sorted({*errors, 408})
    responses |= {status: {"model": ErrorBody, "description": ERRORS[status]} for status in errors}
    if body is not None:
        content = {"application/json": {"schema": {"$ref": REF.format(model=body.__name__)}}}
        extra["requestBody"] = {"required": True, "content": content}
        parts |= _parts(body, "validation")
    return {"responses": responses, "openapi_extra": {**extra, _DEFINITIONS: parts}}


def _parts(kind: type[BaseModel], mode: JsonSchemaMode) -> dict[str, Any]:
    schema = kind.model_json_schema(ref_template=REF, mode=mode)
    return {**schema.pop("$defs", {}), kind.__name__: schema}


def _event_schema(piece: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of one event: a piece, an error that ends the stream, or its end."""
    refs = [{"$ref": REF.format(model=kind.__name__)} for kind in (piece, ErrorBody)]
    body = {"contentMediaType": "application/json", "contentSchema": {"anyOf": refs}}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, body]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def add_document(api: FastAPI) -> None:
    """Let the app describe its bodies, too."""

    def document() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = _complete(
                get_openapi(title=api.title, version=api.version, routes=api.routes)
            )
        return api.openapi_schema

    api.openapi = document  # type: ignore[method-assign]


def _complete(found: dict[str, Any]) -> dict[str, Any]:
    known = found.setdefault("components", {}).setdefault("schemas", {})
    for operations in found["paths"].values():
        for operation in operations.values():
            known |= operation.pop(_DEFINITIONS, {})
            # FastAPI says that path parameters may be refused with 422; ours are any text.
            operation.get("responses", {}).pop("422", None)
    return found
