"""Where Sentei keeps what it makes: adapters, the store, MLflow's database, reports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

HOME_VARIABLE = "SENTEI_HOME"


@dataclass(frozen=True, slots=True)
class Home:
    """The folders and addresses below one root; nothing is created until something is written."""

    root: Path

    @property
    def adapters(self) -> Path:
        """One folder per adapter."""
        return self.root / "adapters"

    def adapter_dir(self, model: str) -> Path:
        """The folder of a model's adapter."""
        return self.adapters / short_name(model)

    @property
    def models(self) -> Path:
        """Converted checkpoints, such as Gemma 3 270M."""
        return self.root / "models"

    @property
    def reports(self) -> Path:
        """HTML and JSON reports."""
        return self.root / "reports"

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
    """Return a model's name in paths and addresses: the last part of its folder or hub id."""
    return Path(model).name


def sentei_home() -> Home:
    """Return the home of this process: `$SENTEI_HOME`, else `~/.sentei`."""
    return Home(Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".sentei").expanduser().resolve())
