"""`sentei bench serving` for real: a server that ends, and the pocket model in our own app under load."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sentei.pipeline.cli.app import app
from sentei.pipeline.demo.local_server import ServerError
from sentei.pipeline.demo.systems import ModelUnderTest, System, start

MODEL = ModelUnderTest("/models/m", "bfloat16", 9000, 2, 16, 512, 2048)


def test_a_server_that_ends_at_once_is_told_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its log's place; nothing is waited for."""
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    monkeypatch.setattr("sentei.pipeline.demo.systems.server_command", lambda *_: (command, {}))

    with pytest.raises(ServerError, match=r"ended with 1 and said 'no such model'; read .*server\.log"):
        start(System("vllm"), MODEL, tmp_path).__enter__()


@pytest.mark.timeout(600)
def test_the_built_in_engine_is_started_loaded_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few short requests; all are answered in full, and the row says what users felt."""
    pytest.importorskip("guidellm", reason="the extra bench is not installed")
    monkeypatch.setenv("SENTEI_HOME", str(tmp_path))
    words = ["bench", "serving", "--system", "builtin", "--model", "pocket", "--dtype", "float32", "--json"]
    sizes = ["--requests", "3", "--prompt-tokens", "64", "--prompt-tokens", "200", "--answer-tokens", "6"]
    load = ["--rate", "2", "--goal-ttft-ms", "60000", "--goal-tpot-ms", "60000", "--threads", "1"]

    done = CliRunner().invoke(app, [*words, *sizes, *load], catch_exceptions=False)

    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["system"], row["rung"]) == ("builtin", "dense")
    assert (row["requests"], row["failed"]) == (3, 0)
    assert row["ttft_ms"] > 0
    assert row["tpot_ms"] > 0
    assert row["memory_mib"] > 100
    report = json.loads((tmp_path / "bench" / "serving" / "builtin" / "run-0" / "report.json").read_text())
    assert [one["output_tokens"] for one in report["benchmarks"][0]["requests"]["successful"]] == [6] * 3
