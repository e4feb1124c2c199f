"""The load on servers: what guidellm is told, what its report says, how servers are started, the table."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sentei.pipeline.cli.load import ending_in_order, make_table
from sentei.pipeline.demo.systems import (
    ModelUnderTest,
    System,
    SystemNameError,
    app_config,
    read_system,
    served_name,
    server_command,
)
from sentei.pipeline.measure.load import (
    Goal,
    Load,
    LoadError,
    LoadPlan,
    Prompt,
    guidellm_arguments,
    plan_prompts,
    read_report,
    run_load,
    summarise,
    write_requests,
)

PLAN = LoadPlan(
    (Prompt("one", 1), Prompt("two words", 2)), 8, 2.5, seed=3, body={"vllm_xargs": {"sentei": "d"}}
)
MODEL = ModelUnderTest("/models/m", "bfloat16", 9000, 2, 16, 512, 2048, Path("/adapters/m"))


def options_of(plan: LoadPlan) -> dict[str, Any]:
    """The arguments of guidellm by their name."""
    words = guidellm_arguments(plan, "http://h:1", "m", Path("in.jsonl"), Path("out.json"))
    assert words[0] == "run"
    return {name: json.loads(value) for name, value in zip(words[1:-1:2], words[2:-1:2], strict=True)}


def report(**changes: Any) -> dict[str, Any]:
    """A report as guidellm 0.8 writes it, what is not read left out."""
    answered = [
        {
            "prompt_tokens": 100 * i,
            "output_tokens": 8,
            "time_to_first_token_ms": 50.0 * i,
            "inter_token_latency_ms": 4.0,
        }
        for i in (1, 2, 3)
    ]
    short = answered[0] | {"output_tokens": 1, "inter_token_latency_ms": None, "time_to_first_token_ms": 10.0}
    requests = {
        "successful": [*answered, short],
        "errored": [{"info": {"error": "status 503"}}],
        "incomplete": [],
    }
    run = {"requests": requests, "duration": 2.0, **changes}
    return {"metadata": {"guidellm_version": "0.8.1"}, "benchmarks": [run]}


def test_requests_leave_at_drawn_times_and_bodies_suit_strict_servers() -> None:
    """A Poisson process of the seed; what guidellm adds and our own API refuses is null."""
    options = options_of(PLAN)

    assert options["--profile"] == {"kind": "poisson", "rate": [2.5]}
    assert options["--constraint"] == {"kind": "max_requests", "count": 2}
    assert options["--seed"] == {"kind": "static", "value": 3}
    backend = options["--backend"]
    assert (backend["target"], backend["request_format"]) == ("http://h:1", "/v1/completions")
    body = backend["extras"]["body"]
    assert body["temperature"] == 0.0
    assert body["stream_options"] == {"continuous_usage_stats": None}
    assert body["vllm_xargs"] == {"sentei": "d"}


def test_without_a_rate_all_leave_at_once() -> None:
    """As many at a time as there are requests."""
    plan = LoadPlan(PLAN.prompts, 8)

    assert options_of(plan)["--profile"] == {"kind": "throughput", "max_concurrency": 2}


def test_each_request_is_a_line_with_its_lengths() -> None:
    """The answer's length is asked for with each, so that no answer ends early."""
    lines = [json.loads(line) for line in write_requests(PLAN).splitlines()]

    assert lines[1] == {"prompt": "two words", "prompt_tokens_count": 2, "output_tokens_count": 8}
    shorter = json.loads(write_requests(LoadPlan(PLAN.prompts, 8, forces_length=False)).splitlines()[1])
    assert shorter == {"prompt": "two words", "prompt_tokens_count": 2}
    assert options_of(PLAN)["--backend"]["max_tokens"] == 8


def test_a_report_is_what_users_felt() -> None:
    """Medians over requests, throughput over the whole time, and how many were good."""
    load = read_report(report())
    figures = load.measure(Goal(first_ms=100.0, per_token_ms=5.0))

    assert load.failures == ("status 503",)
    assert figures["ttft_ms"] == 75.0
    assert figures["tpot_ms"] == 4.0
    assert figures["tokens_per_s"] == 12.5
    assert figures["prompt_tokens_per_s"] == 350.0
    assert figures["goodput_per_s"] == 1.5
    assert load.measure(None)["goodput_per_s"] is None


@pytest.mark.parametrize("changes", [{"requests": {}}, {"duration": None}])
def test_a_report_of_another_form_is_told_with_its_version(changes: dict[str, Any]) -> None:
    """Not a traceback: the tool's next minor may write it differently."""
    with pytest.raises(LoadError, match=r"the report of guidellm 0\.8\.1 is not as expected"):
        read_report(report(**changes))


def test_a_row_has_medians_over_runs_and_their_spread() -> None:
    """Where nothing was answered there is no figure, and what failed is counted."""
    loads = [
        Load(read_report(report()).felt, (), seconds, memory_mib=mib)
        for seconds, mib in ((2.0, 100.0), (4.0, 300.0), (8.0, 200.0))
    ]
    row = summarise(loads, None)

    assert (row["runs"], row["requests"], row["failed"]) == (3, 12, 0)
    assert row["tokens_per_s"] == 6.25
    assert row["tokens_per_s_range"] == [3.125, 12.5]
    assert row["memory_mib_range"] == [100.0, 300.0]
    assert row["goodput_per_s"] is None
    nothing = summarise([Load((), ("gone",), 1.0)], Goal(1.0, 1.0))
    assert (nothing["failed"], nothing["ttft_ms"], nothing["goodput_per_s"]) == (1, None, 0.0)


def test_the_table_shows_a_spread_only_where_there_is_one() -> None:
    """One line for each system."""
    row = summarise([Load(read_report(report()).felt, (), 2.0)], None)
    several = summarise([Load(read_report(report()).felt, (), s) for s in (2.0, 4.0)], None)
    rows = [{"system": "vllm", "rung": "d20", **row}, {"system": "app", "rung": "dense", **several}]
    out = io.StringIO()
    Console(file=out, width=200).print(make_table(rows))

    lines = out.getvalue().splitlines()
    assert any("vllm" in line and "12.5" in line and "to" not in line.split("d20")[1] for line in lines)
    assert any("app" in line and "9.375 (6.25 to 12.5)" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sglang", "none of builtin, app, vllm, transformers, or vllm:RUNG"),
        ("app:bold", "a rung is measured on vLLM's own server, as vllm:bold"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(text: str, message: str) -> None:
    """Before anything starts."""
    with pytest.raises(SystemNameError, match=message):
        read_system(text)


def test_a_rung_is_vllms_server_with_the_plugin() -> None:
    """Stock vLLM gets nothing of ours; a rung gets scheduler and adapter, and says itself in each request."""
    stock, _ = server_command(read_system("vllm"), MODEL, 7)
    rung = read_system("vllm:d20")
    ours, environment = server_command(rung, MODEL, 7)

    assert not any("sentei" in word for word in stock)
    eager, _ = server_command(read_system("vllm"), replace(MODEL, is_compiled=False), 7)
    assert eager == [*stock, "--enforce-eager"]
    assert [word for word in ours if word not in stock] == [
        "--no-async-scheduling",
        "--scheduler-cls",
        "sentei.serving.vllm.scheduler.SenteiScheduler",
        "--additional-config",
        '{"sentei": {"engine": "bench", "adapter": "/adapters/m"}}',
        "--block-size",
        "64",
    ]
    assert rung.body == {"vllm_xargs": {"sentei": "d20"}}
    assert environment["OMP_NUM_THREADS"] == "2"
    with pytest.raises(SystemNameError, match="a rung needs an adapter"):
        server_command(rung, ModelUnderTest("m", "bfloat16", 1, 1, 1, 64, 128), 7)


def test_transformers_serves_the_checkpoint_by_its_own_name() -> None:
    """It knows no other name."""
    system = System("transformers")

    assert "--continuous-batching" in server_command(system, MODEL, 7)[0]
    assert not system.forces_length  # its API refuses `ignore_eos`
    assert served_name(system, MODEL) == "/models/m"
    assert served_name(System("app"), MODEL) == "bench"


def test_the_app_is_dense_alone_and_keeps_everything_in_its_folder(tmp_path: Path) -> None:
    """Its settings are ones that the app knows."""
    from sentei.serving.settings import AppArgs

    options = AppArgs.model_validate(app_config(System("app"), MODEL, tmp_path))

    assert options.engine == "vllm"
    assert options.store_url == f"sqlite:///{tmp_path / 'store.db'}"
    assert AppArgs.model_validate(app_config(System("builtin"), MODEL, tmp_path)).engine == "builtin"


def test_a_load_that_does_not_run_is_told_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the tool is not there, too."""
    monkeypatch.setattr("sentei.pipeline.measure.load.MODULE", "no_such_tool")

    with pytest.raises(LoadError, match=r"guidellm ended with 1 and said .*No module named no_such_tool"):
        run_load(PLAN, "http://h:1", "m", tmp_path)


def test_a_terminated_bench_ends_what_it_started() -> None:
    """SIGTERM leaves through the `with` blocks; before and behind them it is what it was."""
    previous, steps = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with ending_in_order():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                steps.append("not reached")
            finally:
                steps.append("ended")

    with pytest.raises(SystemExit) as ended:
        work()

    assert ended.value.code == 143
    assert steps == ["ended"]
    assert signal.getsignal(signal.SIGTERM) is previous


class Words:
    """A tokenizer of words."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    def decode(self, ids: list[str]) -> str:
        """The words again."""
        return " ".join(ids)


def test_prompts_share_no_text_and_come_in_a_drawn_order() -> None:
    """Each has the length that was asked for, in each run; the same seed gives the same."""
    runs = plan_prompts(Words(), [50, 100, 200], runs=2, seed=1)

    assert [sorted(prompt.tokens for prompt in run) for run in runs] == [[50, 100, 200]] * 2
    texts = [prompt.text for run in runs for prompt in run]
    assert len(set(texts)) == 6
    assert runs == plan_prompts(Words(), [50, 100, 200], runs=2, seed=1)
    assert runs != plan_prompts(Words(), [50, 100, 200], runs=2, seed=2)
    short = runs[0][0].shortened()
    assert short.tokens == runs[0][0].tokens // 10
    assert not runs[0][0].text.startswith(short.text)
