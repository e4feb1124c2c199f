"""Put an adapter folder into MLflow's model registry, under an alias that serving and policies can name.

A version is a copy of the folder as artifacts of a run: safetensors and JSON, no pickle, no Python code.
It is found again by `models:/<name>@<alias>`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentei.errors import SenteiError
from sentei.pipeline.tracking.tracker import MlflowTracker, RunSpec, TrackingError

EXPERIMENT = "sentei-register"
ALIASES = ("candidate", "champion")
_FOLDER = "adapter"
_NEEDED = ("manifest.json", "ladder.json", "scorer.safetensors")
_MAX_TAG_CHARS = 4000


class RegisterError(SenteiError):
    """An adapter that cannot be registered; the message names the folder or the alias."""


@dataclass(frozen=True, slots=True)
class RegisteredVersion:
    """Where the adapter is now."""

    name: str
    version: str
    alias: str
    run_id: str
    source: str


def register_adapter(
    tracker: MlflowTracker,
    folder: Path,
    *,
    name: str,
    alias: str = "candidate",
    tags: Mapping[str, str] | None = None,
    now_s: float | None = None,
) -> RegisteredVersion:
    """Copy the adapter into a new version and move the alias to it; raises RegisterError or TrackingError.

    `tags` are said of run and version, beside the manifest's plain values.
    """
    if alias not in ALIASES:
        raise RegisterError(f"alias {alias!r} is not known: use one of {', '.join(ALIASES)}.")
    missing = [file for file in _NEEDED if not (folder / file).is_file()]
    if missing:
        raise RegisterError(
            f"{folder} is no adapter: {', '.join(missing)} is missing. Run `sentei distill` first."
        )
    started_s = time.time() if now_s is None else now_s
    said = _flat(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))) | dict(tags or {})
    spec = RunSpec(
        key=f"register:{name}:{started_s:.6f}",
        name=f"{name} {folder.name}",
        start_s=started_s,
        tags={"sentei.kind": "register", **said},
    )
    run_id = tracker.ensure_run(EXPERIMENT, spec)
    tracker.save_file(run_id, folder, _FOLDER)
    with tracker.answering() as client:
        source = f"{client.get_run(run_id).info.artifact_uri}/{_FOLDER}"
        version = _create_version(client, name, source, run_id, said)
        client.set_registered_model_alias(name, alias, version)
    tracker.finish(run_id, started_s, is_ok=True)
    return RegisteredVersion(name, version, alias, run_id, source)


def _create_version(client: Any, name: str, source: str, run_id: str, tags: dict[str, str]) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise TrackingError(f"model {name!r} cannot be created: {error}") from error
    return str(client.create_model_version(name, source, run_id, tags=tags).version)


def _flat(manifest: dict[str, Any]) -> dict[str, str]:
    """The manifest's plain values as tags."""
    plain = {key: value for key, value in manifest.items() if isinstance(value, str | int | float | bool)}
    return {f"manifest.{key}": str(value)[:_MAX_TAG_CHARS] for key, value in plain.items()}
