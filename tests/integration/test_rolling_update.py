"""A rolling update of the app on a real Ray: ingresses begin before others end, and say the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.test_serving_ray import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
def test_new_ingress_is_up_before_an_old_one_ends(tmp_path: Path) -> None:
    """Never fewer ingresses than the setting says; no request is refused; all say the same of the model."""
    save_tiny_model(tmp_path / "tiny", tmp_path / "adapter")
    config = {
        "model": str(tmp_path / "tiny"),
        "adapter": str(tmp_path / "adapter"),
        "store_url": f"sqlite:///{tmp_path / 'state.db'}",
        "mlflow_uri": "off",
        "ingress_replicas": 2,
        "dense_replicas": 2,  # model servers are replaced one by one, so one answers meanwhile
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.rolling_story", str(tmp_path / "serve.yaml")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "SENTEI_HOME": str(tmp_path / "home"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(found)

    assert len(found["before"]) == 2
    assert len(found["after"]) == 2
    assert not set(found["before"]) & set(found["after"])
    assert found["fewest"] >= 2
    assert found["new_before_old_ended_s"] > 0
    assert (found["models"], found["refused"]) == (1, [])
    assert found["answered"] > 10
