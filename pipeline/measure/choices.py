"""One prompt under one rung: which key blocks each layer kept for each query block, and why.

Choices are made per query head: each head keeps the blocks whose estimated share of its attention, for the
neediest row of the query block, lies above the threshold of its KV group. Sink and diagonal are always kept.
Where query blocks are shorter than key blocks, a record shows those of one key block's length together: kept
is what any of them keeps, and the share is the largest. Densities and dropped mass are those of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sentei.errors import SenteiError
from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.models import attention_modules, text_decoder, thinnable_layers
from sentei.kernels.hf.observe import Selection
from sentei.kernels.hf.retrofit import Retrofit, retrofit
from sentei.kernels.ops.block_mask import num_blocks
from sentei.kernels.ops.block_mass import block_mass
from sentei.pipeline.models import LoadedModel
from sentei.pipeline.progress import Progress, silent

Floats = NDArray[np.float32]

FORMAT = "sentei/choices/v1"
# Scores that a record keeps: bounds the page to about 11 MB. Beyond it, every n-th query block is recorded.
MAX_SCORES = 2_000_000
SINK, DIAGONAL, SCORE = "sink", "diagonal", "score"


class ExplainError(SenteiError, ValueError):
    """A prompt or a position that cannot be explained; the message names the value and the way out."""


@dataclass(frozen=True, slots=True)
class Focus:
    """What one query block truly attended to, measured: over its rows and the layer's query heads."""

    true_shares: Floats  # [Hq, blocks up to its own], of the neediest row
    dropped_share_at_most: float  # estimated, mean over heads
    dropped_mass_mean: float
    dropped_mass_worst: float


@dataclass(frozen=True, slots=True)
class LayerChoices:
    """One layer's choices; `blocks` hold one array [Hq, i + 1] per recorded query block i."""

    index: int
    query_heads: int
    kv_heads: int
    log_thresholds: Floats  # [Hq, recorded]
    log_shares: tuple[Floats, ...]
    kept: tuple[NDArray[np.bool_], ...]
    density_by_head: tuple[float, ...]  # over all query blocks
    dropped_share_at_most: float  # estimated, mean over heads and query blocks
    focus: Focus

    @property
    def density(self) -> float:
        """Kept share of the causal blocks, over all query heads."""
        return sum(self.density_by_head) / len(self.density_by_head)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The record of one prompt; layers that thinned nothing are named, not recorded. It holds no text."""

    model: str
    adapter: str
    rung: str
    prompt_sha256: str
    prompt_tokens: int
    block_tokens: int
    query_block: int  # the one in focus
    recorded: tuple[int, ...]  # query blocks
    block_chars: tuple[tuple[int, int], ...]  # where each block's text begins and ends in the prompt
    layers: tuple[LayerChoices, ...]
    dense_layers: tuple[int, ...]
    window_layers: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """Blocks of the prompt, the ragged last one included."""
        return len(self.block_chars)

    def votes(self) -> tuple[list[int], int]:
        """Return how many (layer, head) pairs kept each block for the focus, and of how many."""
        at = self.recorded.index(self.query_block)
        votes = np.zeros(self.query_block + 1, dtype=int)
        for layer in self.layers:
            votes += layer.kept[at].sum(axis=0)
        return [int(vote) for vote in votes], sum(layer.query_heads for layer in self.layers)

    def summary(self) -> dict[str, Any]:
        """Return what a table shows: the document without the single choices."""
        votes, most = self.votes()
        return {
            "format": FORMAT,
            "model": self.model,
            "adapter": self.adapter,
            "rung": self.rung,
            "prompt_sha256": self.prompt_sha256,
            "prompt_tokens": self.prompt_tokens,
            "block_tokens": self.block_tokens,
            "blocks": self.num_blocks,
            "choices_per": "query head",
            "query_block": self.query_block,
            "kept_by_all": sum(vote == most for vote in votes) if self.layers else self.query_block + 1,
            "dense_layers": list(self.dense_layers),
            "window_layers": list(self.window_layers),
            "layers": [self._layer_summary(layer) for layer in self.layers],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the whole record as plain values: shares as logs, null where a block was kept unasked."""
        document = self.summary()
        document["query_blocks_recorded"] = list(self.recorded)
        document["block_chars"] = [list(pair) for pair in self.block_chars]
        for plain, layer in zip(document["layers"], self.layers, strict=True):
            plain["heads"] = [self._head(layer, head) for head in range(layer.query_heads)]
        return document

    def _layer_summary(self, layer: LayerChoices) -> dict[str, Any]:
        kept = layer.kept[self.recorded.index(self.query_block)]
        return {
            "layer": layer.index,
            "query_heads": layer.query_heads,
            "kv_heads": layer.kv_heads,
            "density": _rounded(layer.density),
            "density_by_head": [_rounded(value) for value in layer.density_by_head],
            "dropped_share_at_most": _rounded(layer.dropped_share_at_most),
            "at_query_block": {
                "kept_by_all_heads": int(kept.all(axis=0).sum()),
                "kept_by_no_head": int((~kept.any(axis=0)).sum()),
                "dropped_share_at_most": _rounded(layer.focus.dropped_share_at_most),
                "dropped_mass_mean": _rounded(layer.focus.dropped_mass_mean),
                "dropped_mass_worst": _rounded(layer.focus.dropped_mass_worst),
            },
        }

    def _head(self, layer: LayerChoices, head: int) -> dict[str, Any]:
        rows = zip(self.recorded, layer.log_shares, layer.kept, strict=True)
        return {
            "head": head,
            "kv_group": head // (layer.query_heads // layer.kv_heads),
            "query_blocks": [
                {
                    "query_block": block,
                    "log_threshold": _rounded(float(layer.log_thresholds[head, i])),
                    **_kept_blocks(shares[head], kept[head]),
                }
                for i, (block, shares, kept) in enumerate(rows)
            ],
        }


def explain_prompt(
    loaded: LoadedModel,
    adapter: Adapter,
    text: str,
    *,
    rung: str,
    token: int | None = None,
    progress: Progress = silent,
) -> Explanation:
    """Run one prefill of `text` under a rung and record its choices; `token` (None: the last) is in focus."""
    encoded = loaded.tokenizer(
        text, return_offsets_mapping=loaded.tokenizer.is_fast, verbose=False, truncation=False
    )
    ids: list[int] = encoded["input_ids"]
    _check_length(len(ids), loaded)
    block = next(iter(adapter.manifest.shapes.values())).block_tokens
    query_block = _check_token(token, len(ids)) // block
    layers = thinnable_layers(loaded.model)
    recorded = pick_query_blocks(
        num_blocks(len(ids), block), sum(layer.query_heads for layer in layers), query_block
    )
    recorder = ChoiceRecorder(recorded, query_block, progress, num_layers=len(layers))
    with retrofit(loaded.model, adapter, rung, base="best") as handle:
        run_recorded(handle, ids, recorder)
    seen = {choices.index for choices in recorder.layers}
    thinnable = {layer.index for layer in layers}
    return Explanation(
        model=loaded.name,
        adapter=str(adapter.folder or ""),
        rung=rung,
        prompt_sha256=hashlib.sha256(text.encode()).hexdigest(),
        prompt_tokens=len(ids),
        block_tokens=block,
        query_block=query_block,
        recorded=recorded,
        block_chars=block_chars(encoded.get("offset_mapping"), len(ids), block, len(text)),
        layers=tuple(recorder.layers),
        dense_layers=tuple(sorted(thinnable - seen)),
        window_layers=tuple(i for i, _ in attention_modules(loaded.model) if i not in thinnable),
    )


@torch.no_grad()
def run_recorded(handle: Retrofit, ids: Sequence[int], recorder: ChoiceRecorder) -> None:
    """Run one prefill with the recorder switched on for this pass alone."""
    decoder = text_decoder(handle.model)
    device = next(handle.model.parameters()).device
    with handle.watching(recorder):
        decoder(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)


def pick_query_blocks(blocks: int, heads: int, focus: int, max_scores: int = MAX_SCORES) -> tuple[int, ...]:
    """Return all query blocks, or the focus and every n-th, so that at most `max_scores` are kept."""
    for step in range(1, blocks + 1):
        chosen = {focus, *range(blocks - 1, -1, -step)}
        if heads * sum(i + 1 for i in chosen) <= max_scores:
            return tuple(sorted(chosen))
    return tuple(sorted({focus, blocks - 1}))


class ChoiceRecorder:
    """An observer of one prefill that keeps what a record needs of each layer, and drops the tensors."""

    def __init__(
        self,
        recorded: Sequence[int],
        focus: int,
        progress: Progress = silent,
        *,
        num_layers: int = 0,
    ) -> None:
        self.layers: list[LayerChoices] = []
        self._recorded = recorded
        self._focus = focus
        self._progress = progress
        self._num_layers = num_layers

    def __call__(self, selection: Selection) -> None:
        """Take in one layer's choice."""
        self.layers.append(record_choices(selection, self._recorded, self._focus))
        self._progress("layers", len(self.layers), max(self._num_layers, len(self.layers)))


def record_choices(selection: Selection, recorded: Sequence[int], focus: int) -> LayerChoices:
    """Reduce a layer's choice in a whole prefill (batch of one) to its record."""
    own, chosen = selection.log_shares[0].float().cpu(), selection.mask.to_dense()[0].cpu()
    density = chosen.sum(dim=(1, 2)) / int(selection.mask.limits().sum())
    lost = own.exp().masked_fill(chosen, 0.0).sum(dim=-1).clamp_max(1.0)  # [Hq, Q]
    together = selection.mask.block_k // selection.mask.block_q
    shares = _in_rows_of(together, own, float("-inf")).amax(dim=2)
    kept = _in_rows_of(together, chosen, False).any(dim=2)
    focused = slice(focus * together, (focus + 1) * together)
    thresholds = selection.log_thresholds.float().cpu()[:, ::together]
    return LayerChoices(
        index=selection.layer.index,
        query_heads=selection.layer.query_heads,
        kv_heads=selection.layer.kv_heads,
        log_thresholds=thresholds[:, list(recorded)].numpy(),
        log_shares=tuple(shares[:, i, : i + 1].numpy().copy() for i in recorded),
        kept=tuple(kept[:, i, : i + 1].numpy().copy() for i in recorded),
        density_by_head=tuple(density.tolist()),
        dropped_share_at_most=float(lost.mean()),
        focus=_measure(selection, chosen[:, focused], focus, float(lost[:, focused].mean())),
    )


def _in_rows_of(together: int, x: torch.Tensor, filling: float) -> torch.Tensor:
    """Group [Hq, Q, blocks] into [Hq, Q / together, together, blocks], the last group filled up."""
    missing = -x.shape[1] % together
    padded = torch.nn.functional.pad(x, (0, 0, 0, missing), value=filling)
    return padded.reshape(x.shape[0], -1, together, x.shape[2])


def _measure(selection: Selection, kept: torch.Tensor, focus: int, estimated: float) -> Focus:
    """Compute the focus's true attention exactly; kept [Hq, query blocks, blocks]."""
    size, last = selection.mask.block_k, selection.query.shape[2]
    rows = torch.arange(focus * size, min((focus + 1) * size, last), device=selection.query.device)
    _, mass = block_mass(selection.query, selection.key, scale=selection.layer.scale, block_k=size, rows=rows)
    mass = mass[0].float().cpu()
    by_row = kept.repeat_interleave(selection.mask.block_q, dim=1)[:, : len(rows)]
    dropped = mass.masked_fill(by_row, 0.0).sum(dim=-1)
    shares = mass.amax(dim=1)[:, : focus + 1].numpy()
    return Focus(shares, estimated, float(dropped.mean()), float(dropped.max()))


def ranks_of(log_shares: Floats) -> NDArray[np.int64]:
    """Return each block's place among those a head may choose (1: the largest share; of equals, the first).

    log_shares [i + 1] are those of query block i; sink and diagonal get 0.
    """
    ranks = np.zeros(len(log_shares), dtype=np.int64)
    order = np.argsort(-log_shares[1:-1], kind="stable")
    ranks[1 + order] = np.arange(1, len(order) + 1)
    return ranks


def why_kept(block: int, query_block: int) -> str:
    """Return why a kept block was kept."""
    if block == query_block:
        return DIAGONAL
    return SINK if block == 0 else SCORE


def _kept_blocks(shares: Floats, kept: NDArray[np.bool_]) -> dict[str, list[Any]]:
    own, ranks = len(kept) - 1, ranks_of(shares)
    blocks = [int(block) for block in np.flatnonzero(kept)]
    whys = [why_kept(block, own) for block in blocks]
    is_scored = [why == SCORE for why in whys]
    return {
        "kept": blocks,
        "why": whys,
        "log_share": [
            _rounded(float(shares[b])) if s else None for b, s in zip(blocks, is_scored, strict=True)
        ],
        "rank": [int(ranks[b]) if s else None for b, s in zip(blocks, is_scored, strict=True)],
    }


def block_chars(
    offsets: Sequence[tuple[int, int]] | None, tokens: int, block: int, length: int
) -> tuple[tuple[int, int], ...]:
    """Cut the prompt's characters at block borders; without offsets (slow tokenizers) in equal parts."""
    if offsets is None:
        borders = [round(i * length / tokens) for i in range(0, tokens, block)]
    else:
        # A special token has no characters of its own: (0, 0).
        borders = [
            offsets[i][0] if i == 0 or offsets[i][1] else offsets[i - 1][1] for i in range(0, tokens, block)
        ]
    borders[0] = 0
    ends = [*borders[1:], length]
    return tuple(zip(borders, ends, strict=True))


def _check_length(tokens: int, loaded: LoadedModel) -> None:
    if not 0 < tokens <= loaded.max_tokens:
        raise ExplainError(
            f"the prompt has {tokens} tokens; {loaded.name} takes 1 to {loaded.max_tokens}: "
            f"{'write some text' if tokens == 0 else 'shorten it'}"
        )


def _check_token(token: int | None, tokens: int) -> int:
    position = tokens - 1 if token is None else token
    if not 0 <= position < tokens:
        raise ExplainError(f"token is {position}; the prompt's tokens are 0 to {tokens - 1}, or `last`")
    return position


def _rounded(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None
