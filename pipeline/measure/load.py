"""Load on an OpenAI-compatible API by guidellm: what it is told, and what users would have felt.

Open loop: requests leave at times drawn beforehand, however slow the server is; a closed loop would slow down
with it and flatter it. Any server that streams `/v1/completions` will do: engines are compared from outside.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from sentei.errors import SenteiError

MODULE = "guidellm"
MEASURED = ("ttft_ms", "tpot_ms", "tokens_per_s", "prompt_tokens_per_s", "goodput_per_s", "memory_mib")


class LoadError(SenteiError):
    """The load was not put on, or its report cannot be read; the message says what to look at."""

    is_absent = True


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request's text, and its length in the model's own tokens."""

    text: str
    tokens: int

    def shortened(self) -> Prompt:
        """Return its first tenth, to warm a server up without a prefix that it would find again."""
        return Prompt("." + self.text[: len(self.text) // 10], self.tokens // 10)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a request must keep to count as good."""

    first_ms: float
    per_token_ms: float

    def is_met(self, felt: Felt) -> bool:
        """Whether one request was good."""
        return felt.first_ms <= self.first_ms and (felt.per_token_ms or 0.0) <= self.per_token_ms


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Requests that leave at `rate_per_s` in a Poisson process, or all at once; answers have one length.

    Where a server knows no way to go on behind an end token (`forces_length`), answers may be shorter.
    `body` is merged into each request's body: what one server alone understands.
    """

    prompts: tuple[Prompt, ...]
    answer_tokens: int
    rate_per_s: float | None = None
    seed: int = 0
    timeout_s: float = 600.0
    body: Mapping[str, Any] = field(default_factory=dict)
    forces_length: bool = True


@dataclass(frozen=True, slots=True)
class Felt:
    """How one answered request went; per_token_ms is the mean after the first, None for one token."""

    first_ms: float
    per_token_ms: float | None
    tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """One run: requests that were answered, what failed, and the seconds until the last answer."""

    felt: tuple[Felt, ...]
    failures: tuple[str, ...]
    seconds: float
    memory_mib: float | None = None

    def measure(self, goal: Goal | None) -> dict[str, float | None]:
        """Return this run's figures by the names in MEASURED; None where there are none."""
        first = [one.first_ms for one in self.felt]
        pace = [one.per_token_ms for one in self.felt if one.per_token_ms is not None]
        good = sum(goal.is_met(one) for one in self.felt) if goal else 0
        return {
            "ttft_ms": median(first) if first else None,
            "tpot_ms": median(pace) if pace else None,
            "tokens_per_s": sum(one.tokens for one in self.felt) / self.seconds,
            "prompt_tokens_per_s": sum(one.prompt_tokens for one in self.felt) / self.seconds,
            "goodput_per_s": good / self.seconds if goal else None,
            "memory_mib": self.memory_mib,
        }


def plan_prompts(tokenizer: Any, lengths: Sequence[int], *, runs: int, seed: int) -> list[tuple[Prompt, ...]]:
    """Return prompts for each run: the lengths in a drawn order, each a piece of held-out text of its own.

    A piece is cut in tokens and sent as text, so that its length may be off by a few tokens.
    """
    from sentei.pipeline.text.corpus import load_corpus
    from sentei.pipeline.text.splits import split_text

    draw = random.Random(seed)
    documents = list(split_text(load_corpus(None)).evaluate)
    draw.shuffle(documents)
    wanted, found = [list(lengths) for _ in range(runs)], []
    ids: list[int] = []
    rest = iter(documents)
    for run in wanted:
        draw.shuffle(run)
        prompts = []
        for length in run:
            while len(ids) < length:
                document = next(rest, None)
                if document is None:
                    wanted_tokens = f"{runs} runs of {sum(lengths)} tokens"
                    raise LoadError(f"the corpus has too little text for {wanted_tokens}; ask for fewer")
                ids += tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
            text = tokenizer.decode(ids[:length])
            ids = ids[length:]
            prompts.append(Prompt(text, len(tokenizer(text)["input_ids"])))
        found.append(tuple(prompts))
    return found


def run_load(plan: LoadPlan, url: str, model: str, folder: Path) -> Load:
    """Put the load on a server; the requests and guidellm's report and log stay in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    requests, report, log = (folder / name for name in ("requests.jsonl", "report.json", "guidellm.log"))
    requests.write_text(write_requests(plan), encoding="utf-8")
    report.unlink(missing_ok=True)
    # One worker is enough for the rates of a few cores, which it shares with the server.
    environment = {**os.environ, "GUIDELLM__MAX_WORKER_PROCESSES": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as out:
        command = [sys.executable, "-m", MODULE, *guidellm_arguments(plan, url, model, requests, report)]
        code = subprocess.run(command, stdout=out, stderr=out, env=environment, check=False).returncode
    if code or not report.exists():
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["nothing"]
        raise LoadError(f"guidellm ended with {code} and said {last[0][:200]!r}; its log is {log}")
    return read_report(json.loads(report.read_text(encoding="utf-8")))


def write_requests(plan: LoadPlan) -> str:
    """Return the requests as guidellm reads them: one JSON object a line."""
    length = {"output_tokens_count": plan.answer_tokens} if plan.forces_length else {}
    lines = (
        json.dumps({"prompt": prompt.text, "prompt_tokens_count": prompt.tokens, **length})
        for prompt in plan.prompts
    )
    return "\n".join(lines) + "\n"


def guidellm_arguments(plan: LoadPlan, url: str, model: str, requests: Path, report: Path) -> list[str]:
    """Return the arguments of `guidellm run`; what it adds to bodies that strict servers refuse is nulled."""
    body = {"temperature": 0.0, "stream_options": {"continuous_usage_stats": None}, **plan.body}
    backend = {
        "kind": "openai_http",
        "target": url,
        "model": model,
        "request_format": "/v1/completions",
        "http2": False,
        "timeout": plan.timeout_s,
        "max_tokens": plan.answer_tokens,
        "validate_backend": False,
        "extras": {"body": body},
    }
    profile: dict[str, Any] = {"kind": "throughput", "max_concurrency": len(plan.prompts)}
    if plan.rate_per_s is not None:
        profile = {"kind": "poisson", "rate": [plan.rate_per_s]}
    options = {
        "backend": backend,
        "profile": profile,
        "constraint": {"kind": "max_requests", "count": len(plan.prompts)},
        "data": {"kind": "json_file", "path": str(requests)},
        "seed": {"kind": "static", "value": plan.seed},
        "output": {"kind": "json", "path": str(report)},
    }
    words = (word for name, value in options.items() for word in (f"--{name}", json.dumps(value)))
    return ["run", *words, "--disable-console"]


def read_report(report: Mapping[str, Any]) -> Load:
    """Read guidellm's JSON report of one run; LoadError names what is not there."""
    try:
        (run,) = report["benchmarks"]
        requests = run["requests"]
        felt = tuple(_read_felt(one) for one in requests["successful"])
        failures = tuple(
            str((one.get("info") or {}).get("error") or kind)[:200]
            for kind in ("errored", "incomplete")
            for one in requests[kind]
        )
        return Load(felt, failures, float(run["duration"]))
    except (KeyError, TypeError, ValueError) as error:
        version = (report.get("metadata") or {}).get("guidellm_version", "unknown")
        raise LoadError(f"the report of guidellm {version} is not as expected: {error!r}") from error


def _read_felt(one: Mapping[str, Any]) -> Felt:
    tokens = int(one["output_tokens"])
    pace = one["inter_token_latency_ms"] if tokens > 1 else None
    return Felt(
        float(one["time_to_first_token_ms"]),
        None if pace is None else float(pace),
        tokens,
        int(one["prompt_tokens"]),
    )


def summarise(loads: Sequence[Load], goal: Goal | None) -> dict[str, Any]:
    """Return the row of a table: each figure's median over the runs, and its lowest and highest."""
    row: dict[str, Any] = {
        "runs": len(loads),
        "requests": sum(len(load.felt) + len(load.failures) for load in loads),
        "failed": sum(len(load.failures) for load in loads),
    }
    runs = [load.measure(goal) for load in loads]
    for name in MEASURED:
        found = [run[name] for run in runs if run[name] is not None]
        known = [value for value in found if value is not None]
        row[name] = round(median(known), 3) if known else None
        row[f"{name}_range"] = [round(min(known), 3), round(max(known), 3)] if known else None
    return row
