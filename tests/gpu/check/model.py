"""A whole model's prefill under the retrofit, dense and sparse, where Transformers and weights are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from sentei.kernels.ops.registry import Request, pick_backend

from .plan import Line, SkipRowError
from .tensors import cut_for
from .timing import Work, extra_mib, take_turns
from .worker import Bench

DENSITY = 0.1
_NEEDS = {"pocket": ("transformers", "safetensors"), "gemma-3-270m": ("transformers", "gguf", "accelerate")}


def prefill(bench: Bench, name: str) -> Iterator[Line]:
    """One prompt of random tokens in bf16: Transformers' SDPA, and a rung at a tenth of the blocks.

    The scorers are untrained, so this times the whole way and says nothing of quality.
    """
    _need(name)
    from sentei.kernels.hf.adapter import new_adapter
    from sentei.kernels.hf.retrofit import retrofit
    from sentei.pipeline.models import resolve_model

    try:
        model = resolve_model(name, dtype=torch.bfloat16).model.to(bench.device)
    except ModuleNotFoundError as error:
        raise SkipRowError(f"its weights need another package: {error}") from error
    tokens = bench.sizes.model_tokens
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(1, vocabulary, (1, tokens), generator=bench.generator, device=bench.device)
    adapter = new_adapter(model, name, block_tokens=bench.sizes.block)
    scorers = {index: scorer.to(bench.device) for index, scorer in adapter.scorers.items()}
    adapter = replace(adapter, scorers=scorers)

    def run() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits

    alone = take_turns(bench, {"untouched": run})
    yield alone.line(
        "untouched", extra_mib=extra_mib(bench, run), note=f"Transformers' sdpa, {tokens} tokens, bf16"
    )
    adapter = adapter.with_ladder(_ladder(adapter, _cuts(model, adapter, run)))
    with retrofit(model, adapter, "tenth") as handle:
        logits = run()
        if not bool(logits.isfinite().all()):
            raise RuntimeError("the sparse model's logits are not finite")
        density = handle.stats().density()
        times = take_turns(bench, {"sparse": run, "dense": _dense(handle, run)})
        mib = extra_mib(bench, run)
    choice = pick_backend(Request(bench.device.type, torch.bfloat16, tokens)).backend.name
    base = times.median("dense")
    yield times.line("dense", note="the same through the retrofit, rung dense, in turn with sparse")
    yield times.line(
        "sparse",
        against="dense",
        ratio=base / times.median("sparse"),
        extra_mib=mib,
        note=f"density {density:.3f}, attention by {choice}, scorers untrained",
    )


def _need(name: str) -> None:
    missing = [package for package in _NEEDS[name] if find_spec(package) is None]
    if missing:
        raise SkipRowError(f"it needs {', '.join(missing)}, not installed here")
    from sentei.pipeline.packaged import PACKAGED

    if name in PACKAGED and find_spec(PACKAGED[name].package) is None:
        raise SkipRowError(f"the weights come in the package {PACKAGED[name].package}, not installed here")


def _cuts(model: Any, adapter: Any, run: Work) -> dict[int, float]:
    """The log share of each layer above which the density lies, from one run that keeps everything."""
    from sentei.kernels.hf.retrofit import retrofit
    from sentei.kernels.ops.rules import Grid

    cuts: dict[int, float] = {}

    def note(seen: Any) -> None:
        mask = seen.mask
        grid = Grid(mask.q_len, mask.kv_len, mask.block_q, mask.block_k, mask.q_offset)
        cuts[seen.layer.index] = cut_for(seen.log_shares, grid, DENSITY)

    keep_all = dict.fromkeys(adapter.scorers, -70.0)
    ladder = _ladder(adapter, keep_all)
    with retrofit(model, adapter.with_ladder(ladder), "tenth") as handle, handle.watching(note):
        run()
    return cuts


def _ladder(adapter: Any, cuts: dict[int, float]) -> Any:
    from sentei.kernels.hf.ladder import DENSE, Ladder, Rung

    thresholds = {
        index: ((float(torch.tensor(cut).exp()),),) * adapter.scorers[index].shape.kv_heads
        for index, cut in cuts.items()
    }
    block = max(scorer.shape.block_tokens for scorer in adapter.scorers.values())
    return Ladder((Rung(DENSE), Rung("tenth", thresholds, bound_dropped_mass=None)), (), block)


def _dense(handle: Any, run: Work) -> Work:
    def run_dense() -> object:
        handle.set_rung("dense")
        try:
            return run()
        finally:
            handle.set_rung("tenth")

    return run_dense
