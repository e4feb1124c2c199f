"""Reduce KubeRay's CRD to what a check needs: `python reduce.py ray.io_rayservices.yaml > rayservice.json`.

Version v1 only, without descriptions; what stands in it more than once (pod templates above all) becomes a
definition; an object that lists its properties takes no others, as `kubectl apply --validate=strict` has it.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

MIN_CHARS = 600  # of a part that is worth a definition


def children(schema: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The schema with each schema directly below it changed; names of properties are no schemas."""
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            kept[key] = {name: change(part) for name, part in value.items()}
        elif key in ("items", "additionalProperties", "not") and isinstance(value, dict):
            kept[key] = change(value)
        elif key in ("anyOf", "allOf", "oneOf"):
            kept[key] = [change(part) for part in value]
        else:
            kept[key] = value
    return kept


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without descriptions, closed where it lists properties."""
    kept = children({key: value for key, value in schema.items() if key != "description"}, strict)
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and schema.get("type") == "object" and not is_open:
        kept["additionalProperties"] = False
    return kept


def count(schema: dict[str, Any], texts: Counter[str]) -> None:
    """Count each schema by its text."""
    texts[json.dumps(schema, sort_keys=True)] += 1
    children(schema, lambda part: count(part, texts))


def share(schema: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Put a reference in the place of each schema that has a name."""
    name = names.get(json.dumps(schema, sort_keys=True))
    return {"$ref": f"#/$defs/{name}"} if name else children(schema, lambda part: share(part, names))


def reduce(crd: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a RayService of version v1."""
    (version,) = (item for item in crd["spec"]["versions"] if item["name"] == "v1")
    whole = strict(version["schema"]["openAPIV3Schema"])
    whole["properties"]["metadata"] = {"type": "object"}
    texts: Counter[str] = Counter()
    count(whole, texts)
    shared = sorted((t for t, n in texts.items() if n > 1 and len(t) >= MIN_CHARS), key=len, reverse=True)
    names = {text: f"p{i}" for i, text in enumerate(shared)}
    parts = {
        name: children(json.loads(text), lambda part: share(part, names)) for text, name in names.items()
    }
    return {**share(whole, names), "$defs": parts}


if __name__ == "__main__":
    found = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(reduce(found), separators=(",", ":"), sort_keys=True))
