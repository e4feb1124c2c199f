"""Reduce KubeRay's CRD to what a check needs: `python reduce.py ray.io_rayservices.yaml > rayservice.json`.

Version v1 only, without descriptions; what stands in it more than once (pod templates above all) becomes a
definition; an object that lists its properties takes no others, as `kubectl apply --validate=strict` has it.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

MIN_CHARS = 600  # of a part that is worth a definition


def strict(schema: Any) -> Any:
    """The schema without descriptions, closed where it lists properties."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {k: strict(v) for k, v in schema.items() if not (k == "description" and isinstance(v, str))}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        kept["additionalProperties"] = False
    return kept


def count(schema: Any, texts: Counter[str]) -> None:
    """Count each part by its text."""
    if isinstance(schema, dict):
        texts[json.dumps(schema, sort_keys=True)] += 1
    for item in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        count(item, texts)


def share(schema: Any, names: dict[str, str]) -> Any:
    """Put a reference in the place of each part that has a name."""
    if isinstance(schema, list):
        return [share(item, names) for item in schema]
    if not isinstance(schema, dict):
        return schema
    name = names.get(json.dumps(schema, sort_keys=True))
    return {"$ref": f"#/$defs/{name}"} if name else {k: share(v, names) for k, v in schema.items()}


def reduce(crd: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a RayService of version v1."""
    (version,) = (item for item in crd["spec"]["versions"] if item["name"] == "v1")
    whole = strict(version["schema"]["openAPIV3Schema"])
    whole["properties"]["metadata"] = {"type": "object"}
    texts: Counter[str] = Counter()
    count(whole, texts)
    shared = sorted((t for t, n in texts.items() if n > 1 and len(t) >= MIN_CHARS), key=len, reverse=True)
    names = {text: f"p{i}" for i, text in enumerate(shared)}
    parts = {name: {k: share(v, names) for k, v in json.loads(text).items()} for text, name in names.items()}
    return {**share(whole, names), "$defs": parts}


if __name__ == "__main__":
    found = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(reduce(found), separators=(",", ":"), sort_keys=True))
