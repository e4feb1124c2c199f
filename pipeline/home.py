"""Where Sentei keeps what it makes: adapters, the store, MLflow's database, reports."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sentei.errors import SenteiError

HOME_VARIABLE = "SENTEI_HOME"
MAX_NAME_CHARS = 80
_HASH_CHARS = 12  # of the weights, in an adapter's name; of the whole text, where a name was made safe
_MANIFEST = "manifest.json"


class HomeError(SenteiError, ValueError):
    """A name that means nothing here, or more than one thing; the message lists what there is."""


@dataclass(frozen=True, slots=True)
class Home:
    """The folders and addresses below one root; nothing is created until something is written."""

    root: Path

    @property
    def adapters(self) -> Path:
        """One folder per adapter."""
        return self.root / "adapters"

    def adapter_dir(self, model: str, weights_sha256: str) -> Path:
        """The folder of the adapter of these weights, whatever folder they were read from."""
        bound = self.adapters / f"{short_name(model)}-{weights_sha256[:_HASH_CHARS]}"
        before = self.adapters / short_name(model)  # as versions of before 2026-11-27 named it
        is_older = not bound.exists() and _read_weights(before) == weights_sha256
        return before if is_older else bound

    def find_adapter(self, model: str) -> Path:
        """The folder of the one adapter of that name, for those who have not read the weights.

        Where there is none, the folder that there might be; raises HomeError where there are several.
        """
        name = short_name(model)
        of_weights = re.compile(f"{re.escape(name)}(-[0-9a-f]{{{_HASH_CHARS}}})?")
        folders = sorted(self.adapters.glob(f"{name}*")) if self.adapters.is_dir() else []
        found = [path for path in folders if of_weights.fullmatch(path.name) and _read_weights(path)]
        if len(found) > 1:
            listed = ", ".join(str(path) for path in found)
            raise HomeError(f"{len(found)} adapters are called {name!r}: {listed}; say which by its folder")
        return found[0] if found else self.adapters / name

    @property
    def models(self) -> Path:
        """Converted checkpoints, such as Gemma 3 270M."""
        return self.root / "models"

    @property
    def reports(self) -> Path:
        """HTML and JSON reports."""
        return self.root / "reports"

    @property
    def secrets(self) -> Path:
        """One file per secret that a policy names; made by people, never by us."""
        return self.root / "secrets"

    @property
    def store_url(self) -> str:
        """Records, event log and routing table (SQLAlchemy URL)."""
        return f"sqlite:///{self.root / 'state.db'}"

    @property
    def mlflow_uri(self) -> str:
        """MLflow's tracking database: always passed on by name, because its default depends on the folder."""
        return f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        """Where MLflow keeps artifacts of runs logged straight into the database."""
        return self.root / "mlartifacts"

    def create(self) -> Home:
        """Make the root folder and return itself."""
        self.root.mkdir(parents=True, exist_ok=True)
        return self


def short_name(model: str) -> str:
    """Return a model's name in paths and addresses: the last part of its folder or hub id, made safe."""
    path = Path(model).expanduser()
    return safe_name((path.resolve() if path.is_dir() else path).name or "model")


def safe_name(text: str) -> str:
    """Return a text as a name that is one part of a path, on any system and in any query.

    A text that is such a name already stays what it is; another one stays readable and gets a hash of the
    whole, so that two different texts never share a name.
    """
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-. ")
    if kept == text != "" and len(text) <= MAX_NAME_CHARS:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARS]
    return f"{kept[: MAX_NAME_CHARS - _HASH_CHARS - 1].rstrip('-.') or 'named'}-{digest}"


def _read_weights(folder: Path) -> str | None:
    """The hash of the weights that an adapter's manifest names, or None where there is no adapter."""
    try:
        weights = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["base"]["weights_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return str(weights)


def sentei_home() -> Home:
    """Return the home of this process: `$SENTEI_HOME`, else `~/.sentei`."""
    return Home(Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".sentei").expanduser().resolve())
