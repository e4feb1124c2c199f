"""The soak's story: what an undisturbed run says, the rollouts, the blows, and what became of the answers."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from sentei.pipeline.rollout.client import AdminError
from tests.integration.test_serving_ray import save_tiny_model
from tests.machine import wait_for
from tests.soak.cluster import Cluster, kill
from tests.soak.streams import Answer, ask
from tests.soak.traffic import Traffic

SALT = "soak"
NUM_PROMPTS = 24
PROMPT_CHARS = 300
STOP_S = (2.0, 6.0, 12.0)  # how long a stopped process stays so, in turn
CALM_S = 4.0  # between two blows, once all is well again
WELL_WITHIN_S = 120.0
LEAST_LEAD = 2e-5  # nats; an answer that goes on elsewhere is summed in another order, in fp32
FULL_S = 60.0  # at the largest share before the abort
PARTS = ("sparse", "ingress", "dense", "controller", "auditor")
POLICY = f"""
apiVersion: sentei/v1
kind: RolloutPolicy
metadata: {{name: soak}}
spec:
  ladder: [{{id: mild}}]
  slices: {{buckets: [{{id: all, range: [0, 1024]}}]}}
  assignment: {{unit: session_id, salt: {SALT}}}
  stages:
    - {{id: shadow, share: 0, rung: mild, hold_min: 5s, need: no_harm}}
    - {{id: half, share: 50%, rung: mild, hold_min: 10s, need: no_harm}}
    - {{id: full, share: 95%, rung: mild, hold_min: 1h}}
  advance: {{need: all_safe, min_units: 9}}
  audit: {{select: {{fraction: 1.0, period: 30s}}}}
  guardrails:
    alpha_total: 0.05
    detector_arl: 10000
    items:
      - {{id: agree, value: audit.token_disagreement, bound: {{excess_over_floor: 0.5, floor_cap: 0.1}},
          test: betting_paired, action: rollback}}
  breaker: {{variant: {{window: 30s, min_requests: 1000, failure_share: 90%, no_replica_for: 180s}}}}
  data:
    max_age: 60s
    no_data: {{grace: 10m, then: hold, after: 60m, finally: rollback}}
    monitor_lease: 3s
  schedule: {{check_every: 1s}}
"""


@dataclass(frozen=True, slots=True)
class Options:
    """How long and how hard."""

    seconds: float
    rate: float
    max_tokens: int
    seed: int = 1


@dataclass(slots=True)
class Blow:
    """One signal to one part, and what it met."""

    at_s: float
    part: str
    kind: str  # kill, or stop for so many seconds
    pid: int
    share: float
    streams: int  # answers in mid-stream, of all
    streams_hit: int | None  # of these, those through the part; None where nobody can tell
    well_after_s: float = -1.0


def run(folder: Path, options: Options, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Tell the story once; returns what happened."""
    save_tiny_model(folder / "tiny", folder / "adapter")
    config = {
        "model": str(folder / "tiny"),
        "adapter": str(folder / "adapter"),
        "store_url": f"sqlite:///{folder / 'state.db'}",
        "mlflow_uri": "off",
        "dtype": "float32",
        "tick_every_s": 0.5,
        "ingress_replicas": 2,
        "max_running": 8,
    }
    with Cluster(config, folder) as cluster:
        say("the app is up; asking undisturbed")
        prompts = _prompts(options.seed)
        undisturbed = _undisturbed(cluster, prompts, options.max_tokens)
        say(f"{len(undisturbed)} of {len(prompts)} prompts have one answer on dense and sparse")
        story = Story(cluster, options, list(undisturbed), say)
        story.tell()
    return story.summary(undisturbed)


class Story:
    """Traffic, rollouts and blows at once."""

    def __init__(
        self, cluster: Cluster, options: Options, prompts: list[str], say: Callable[[str], None]
    ) -> None:
        self._cluster = cluster
        self._options = options
        self._say = say
        self._traffic = Traffic(cluster.url, options.rate, prompts, options.max_tokens, name="soak")
        self._rng = random.Random(options.seed)
        self._is_over = threading.Event()
        self._began_s = time.monotonic()
        self.share = 0.0
        self.shares: list[tuple[float, float]] = []  # when, share
        self.outcomes: list[str] = []
        self.blows: list[Blow] = []

    def tell(self) -> None:
        """Run for the time that was asked for, then let what began end."""
        with self._traffic:
            steering = threading.Thread(target=self._steer, daemon=True)
            steering.start()
            time.sleep(3)
            i = 0
            while self._now_s() < self._options.seconds:
                self._strike(PARTS[i % len(PARTS)], i // len(PARTS))
                self._report()
                i += 1
            self._is_over.set()
            steering.join(60)
            self._say("waiting for the last answers")

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    def _strike(self, part: str, round_: int) -> None:
        """Kill in even rounds, stop in odd ones; then wait until the app is well."""
        through = {"dense": "dense/", "sparse": "sparse/"}.get(part, "")
        with suppress(TimeoutError):  # better in mid-stream; the part may have no streams at this share
            wait_for(lambda: bool(self._through(through)), "streams", 10)
        pids = self._cluster.pids(part)
        if not pids:
            self._say(f"{part} is not there")
            time.sleep(1)
            return
        pid = self._rng.choice(pids)
        streams = len(self._traffic.in_mid_stream())
        hit = len(self._through(through)) if through else None
        stop_s = STOP_S[(round_ // 2) % len(STOP_S)] if round_ % 2 else 0.0
        blow = Blow(
            round(self._now_s(), 1),
            part,
            f"stop {stop_s:g} s" if stop_s else "kill",
            pid,
            self.share,
            streams,
            hit,
        )
        self.blows.append(blow)
        num_cut = self._cluster.num_cut_streams() if part == "ingress" else 0
        struck_s = time.monotonic()
        if stop_s:
            kill(pid, signal.SIGSTOP)
            time.sleep(stop_s)
            kill(pid, signal.SIGCONT)
        else:
            kill(pid)
        try:
            wait_for(lambda: self._is_well(part, len(pids), pid if not stop_s else 0), part, WELL_WITHIN_S)
            blow.well_after_s = round(time.monotonic() - struck_s, 1)
        except TimeoutError:
            self._say(f"{part} was not well within {WELL_WITHIN_S:g} s")
        time.sleep(CALM_S)
        if part == "ingress" and not stop_s:  # the proxy alone knows which streams passed through it
            blow.streams_hit = self._cluster.num_cut_streams() - num_cut

    def _through(self, maker: str) -> list[Answer]:
        return self._traffic.in_mid_stream(lambda found: found.startswith(maker))

    def _is_well(self, part: str, num: int, gone: int) -> bool:
        pids = self._cluster.pids(part)
        if len(pids) < num or gone in pids:
            return False
        try:
            status = httpx.get(f"{self._cluster.url}/readyz", timeout=5, trust_env=False).json()
        except (httpx.HTTPError, ValueError):
            return False
        return bool(status.get("ready")) and all(status["variants"].values())

    def _steer(self) -> None:
        """Rollouts one after the other: from 0 to the largest share, a while there, and back at once."""
        while not self._is_over.is_set():
            try:
                started = self._cluster.admin.start_rollout(POLICY, release_quarantine=True)["rollout_id"]
                self._follow(started)
            except AdminError as error:
                self._say(f"operations: {error}"[:200])
                self._is_over.wait(2)

    def _follow(self, rollout_id: str) -> None:
        full_since_s, has_aborted = None, False
        while True:
            found = self._cluster.admin.rollout(rollout_id)
            stage = str(found["stage_id"])
            share = {"half": 0.5, "full": 0.95}.get(stage, 0.0) if found["outcome"] is None else 0.0
            if share != self.share:
                self.share = share
                self.shares.append((round(self._now_s(), 1), share))
            if found["outcome"] is not None:
                self.outcomes.append(f"{found['outcome']} by {found['by']} at {stage}")
                return
            if stage == "full" and full_since_s is None:
                full_since_s = time.monotonic()
            is_enough = full_since_s is not None and time.monotonic() - full_since_s > FULL_S
            if (is_enough or self._is_over.is_set()) and not has_aborted:
                self._cluster.admin.command(rollout_id, "abort", reason="soak")
                has_aborted = True
            time.sleep(1)

    def _report(self) -> None:
        answers = list(self._traffic.answers)
        done = [a for i, a in enumerate(answers) if i not in self._traffic.running]
        faults = [fault for a in done if (fault := a.fault)]
        blow = self.blows[-1]
        self._say(
            f"{self._now_s():6.0f} s  {blow.kind} {blow.part}, {blow.streams_hit} of {blow.streams} streams; "
            f"well after {blow.well_after_s} s; share {self.share}; {len(done)} answers, "
            f"{len(self._traffic.running)} running, {len(faults)} faults {faults[-1:]}"
        )

    def summary(self, undisturbed: dict[str, list[str]]) -> dict[str, Any]:
        """Count what happened."""
        answers = self._traffic.answers
        faults = [(a.session_id, round(a.began_s - self._began_s, 1), a.fault) for a in answers if a.fault]
        other = [
            (a.session_id, _first_difference(a.tokens, undisturbed[a.prompt]), a.makers[-1])
            for a in answers
            if not a.fault and a.tokens != undisturbed[a.prompt]
        ]
        kills = [blow for blow in self.blows if blow.kind == "kill"]
        took = sorted(a.took_s for a in answers)
        return {
            "seconds": round(self._now_s()),
            "rate_per_s": self._options.rate,
            "answers": len(answers),
            "tokens": sum(len(a.tokens) for a in answers),
            "num_wrong": len(faults) + len(other),
            "failed_or_truncated": faults,
            "other_tokens": other,
            "by_first_maker": dict(Counter(a.makers[0] for a in answers if a.makers)),
            "moved_in_mid_stream": sum(a.num_moves > 0 for a in answers),
            "answer_s": {
                "median": round(statistics.median(took), 2),
                "p95": round(took[int(0.95 * len(took))], 2),
                "max": round(took[-1], 2),
            },
            "shares": self.shares,
            "outcomes": dict(Counter(self.outcomes)),
            "kills": dict(Counter(blow.part for blow in kills)),
            "stops": dict(Counter(blow.part for blow in self.blows if blow.kind != "kill")),
            "kills_in_mid_stream": sum(
                (blow.streams_hit or 0) > 0 for blow in kills if blow.part in ("dense", "sparse", "ingress")
            ),
            "never_well": sum(blow.well_after_s < 0 for blow in self.blows),
            "blows": [asdict(blow) for blow in self.blows],
        }


def _first_difference(found: Sequence[str], expected: Sequence[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))


def _prompts(seed: int) -> list[str]:
    rng = random.Random(seed)
    words = ["def", "return", "import", "for", "while", "class", "self", "value", "lambda", "yield", "with"]
    return [
        " ".join(rng.choice(words) for _ in range(PROMPT_CHARS // 6))[:PROMPT_CHARS]
        for _ in range(NUM_PROMPTS)
    ]


def _undisturbed(cluster: Cluster, prompts: list[str], max_tokens: int) -> dict[str, list[str]]:
    """Ask each prompt on dense, then on sparse; keeps those whose answer does not depend on who gives it.

    An answer that moves in the middle has then one right continuation, whenever it moves, as long as no two
    tokens are so near that rounding tells them apart.
    """
    dense = asyncio.run(_ask_all(cluster.url, prompts, max_tokens, "before"))
    rollout_id = cluster.admin.start_rollout(_all_sparse())["rollout_id"]
    wait_for(
        lambda: cluster.admin.rollout(rollout_id)["stage_id"] == "half",
        "the undisturbed rollout",
        WELL_WITHIN_S,
    )
    time.sleep(2)
    sparse = asyncio.run(_ask_all(cluster.url, prompts, max_tokens, "undisturbed"))
    cluster.admin.command(rollout_id, "abort", reason="undisturbed run is done")
    wait_for(
        lambda: cluster.admin.rollout(rollout_id)["outcome"] is not None,
        "the undisturbed rollout's end",
        WELL_WITHIN_S,
    )
    for answer in (*dense, *sparse):
        assert not answer.fault, answer.fault
    assert any(a.makers[0].startswith("sparse/") for a in sparse)
    pairs = zip(dense, sparse, strict=True)
    kept = {
        a.prompt: a.tokens
        for a, b in pairs
        if a.tokens == b.tokens and b.makers[0].startswith("sparse/") and min(a.lead, b.lead) > LEAST_LEAD
    }
    assert kept, "no prompt has one right answer: choose another seed"
    return kept


def _all_sparse() -> str:
    """The policy, at its largest share from its first tick on."""
    shadow = next(line for line in POLICY.splitlines() if "shadow" in line)
    half = next(line for line in POLICY.splitlines() if "half" in line)
    text = POLICY.replace("name: soak", "name: undisturbed").replace(shadow + "\n", "")
    return text.replace(half, half.replace("50%", "94%").replace("10s", "1h"))


async def _ask_all(url: str, prompts: list[str], max_tokens: int, name: str) -> list[Answer]:
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        answers = [Answer(f"{name}-{i}", prompt, max_tokens) for i, prompt in enumerate(prompts)]
        return list(await asyncio.gather(*(ask(client, answer, logprobs=2) for answer in answers)))
