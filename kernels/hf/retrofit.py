"""The retrofit: a frozen decoder gets sparse attention for a while, and is itself again afterwards.

One handle per model. It registers an attention function and a mask function under a name of its own, hooks
the attention modules to learn which KV cache a call belongs to, and takes all of it out again on close.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, Literal, get_args
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sentei.kernels.hf.adapter import Adapter
from sentei.kernels.hf.growing_cache import give_room
from sentei.kernels.hf.heap import keep_freed_memory
from sentei.kernels.hf.ladder import DENSE, Ladder, Rung, dense_ladder
from sentei.kernels.hf.low_rank import hook_low_rank
from sentei.kernels.hf.masked import attend_masked
from sentei.kernels.hf.models import (
    AdapterError,
    LayerInfo,
    ModelError,
    attention_modules,
    text_decoder,
    thinnable_layers,
)
from sentei.kernels.hf.observe import AttendedRows, Selection, SelectionObserver
from sentei.kernels.hf.parts import (
    FEATURES,
    FULL_ATTENTION,
    SCORING,
    SELECTION,
    WINDOW_ATTENTION,
    PartClock,
)
from sentei.kernels.hf.prompt_pieces import PIECE_TOKENS
from sentei.kernels.hf.rotary import RotaryReader
from sentei.kernels.hf.stats import LayerCall, RetrofitStats
from sentei.kernels.hf.versions import CACHE_KEYWORD
from sentei.kernels.ops.attention import attend, dense_attend
from sentei.kernels.ops.block_mask import DEFAULT_BLOCK, BlockMask, num_blocks
from sentei.kernels.scorer.byte_keys import EncodedKeys
from sentei.kernels.scorer.faults import Fault
from sentei.kernels.scorer.pooled_cache import PooledCache
from sentei.kernels.scorer.selection import (
    Thresholds,
    keep_before,
    nan_where_broken,
    per_head_thresholds,
    score_blocks,
    select_blocks,
)

# sdpa: Transformers' own. flex: compiled FlexAttention. best: our fastest dense path, call by call.
Base = Literal["sdpa", "flex", "best"]
AttentionResult = tuple[torch.Tensor, None]
# Chooses blocks in place of the learned scorer, from (layer, q, k): for baselines.
Selector = Callable[[LayerInfo, torch.Tensor, torch.Tensor], BlockMask]
_serial = itertools.count(1)


class Retrofit:
    """A model under retrofit: switch rungs, read statistics, close. One forward pass at a time."""

    def __init__(self, model: nn.Module, adapter: Adapter | None, *, rung: str, base: Base) -> None:
        if base not in get_args(Base):
            raise ModelError(f"base is {base!r}; it must be one of {', '.join(get_args(Base))}")
        self.model = model
        self.adapter = adapter
        self.base = base
        self.fault: Fault | None = None
        self.selector: Selector | None = None
        self._observer: SelectionObserver | None = None
        self._attended: list[AttendedRows] | None = None
        self._num_attended: int | None = None
        self._prompt_tokens: int | None = None
        self._clock: PartClock | None = None
        self.is_differentiable = False
        self._low_rank_hooks: list[Any] = []
        self._ladder = adapter.ladder if adapter is not None else dense_ladder()
        self._layers = _match_layers(model, adapter)
        self._rung = self._ladder.find(rung)
        self._thresholds_by_rung: dict[str, Mapping[int, Thresholds]] = {}
        self._thresholds = self._read_thresholds()
        self._has_own_positions = True  # until a pass says otherwise
        self._seen_positions: torch.Tensor | None = None
        self._stats = RetrofitStats()
        self._pooled: WeakKeyDictionary[Any, dict[int, PooledCache]] = WeakKeyDictionary()
        self._cache: ReferenceType[Any] | None = None  # of the call that runs: its owner frees it
        self._rotary = RotaryReader(model)
        self._name = f"sentei_{next(_serial)}"
        self._previous = model.config._attn_implementation  # type: ignore[union-attr]
        self._hooks: list[Any] = []
        self._install()

    @property
    def rung(self) -> Rung:
        """The rung in use."""
        return self._rung

    @property
    def ladder(self) -> Ladder:
        """All rungs that can be set."""
        return self._ladder

    def set_rung(self, rung_id: str) -> None:
        """Switch to another rung, from the next forward pass on."""
        self._rung = self._ladder.find(rung_id)
        self._thresholds = self._read_thresholds()

    def set_selector(self, selector: Selector | None) -> None:
        """Choose blocks by another rule than the learned scorer's, or by the scorer again."""
        self.selector = selector

    @contextmanager
    def watching(self, observer: SelectionObserver) -> Iterator[None]:
        """Show the observer each choice that the scorer makes, for the length of a `with` block."""
        previous, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = previous

    @contextmanager
    def recording_rows(self, newest: int | None = None) -> Iterator[list[AttendedRows]]:
        """Keep what the `newest` rows of each call read, None: all, for the length of a `with` block."""
        rows: list[AttendedRows] = []
        self._attended, self._num_attended = rows, newest
        try:
            yield rows
        finally:
            self._attended = None

    @contextmanager
    def clocked(self, clock: PartClock) -> Iterator[None]:
        """Count the seconds of attention, scoring and selection, for the length of a `with` block."""
        self._clock = clock
        try:
            yield
        finally:
            self._clock = None

    def _part(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._clock is None else self._clock.part(name)

    def set_fault(self, fault: Fault | None) -> None:
        """Plant a fault, or take it out."""
        self.fault = fault

    def set_low_rank(self, is_on: bool) -> None:
        """Let the adapter's low-rank weights take part, on every rung and in dense too, or leave them out.

        Off at first. A KV cache belongs to the weights it was filled with: begin a new one after switching.
        """
        for hook in self._low_rank_hooks:
            hook.remove()
        self._low_rank_hooks.clear()
        if not is_on:
            return
        if self.adapter is None or self.adapter.low_rank is None:
            raise AdapterError("the adapter has no low-rank weights; train them with: sentei distill --joint")
        self._low_rank_hooks.extend(hook_low_rank(self.model, self.adapter.low_rank))

    def set_prompt_tokens(self, tokens: int | None) -> None:
        """Say where the prompt of what runs next ends; None: where a call of several rows with a cache ends.

        The rows before it keep everything, as many as the rung says. Text without a cache has no such end.
        """
        self._prompt_tokens = tokens

    @property
    def piece_tokens(self) -> int | None:
        """How long the pieces are that a prompt should run in; None where one pass is better.

        Only our own program on a CPU reads a prompt behind a cache as it reads one in one pass: Transformers'
        sdpa asks for a mask there, and on a GPU nobody measured it.
        """
        is_on_cpu = next(self.model.parameters()).device.type == "cpu"
        return PIECE_TOKENS if self.base == "best" and is_on_cpu else None

    def set_differentiable(self, is_on: bool) -> None:
        """Run sparse attention so that gradients flow (for training on short windows), or fast again."""
        self.is_differentiable = is_on

    def stats(self) -> RetrofitStats:
        """What the attention calls did since the last reset."""
        return self._stats

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._stats = RetrofitStats()

    def close(self) -> None:
        """Give the model its own attention back; closing twice does nothing."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.set_low_rank(False)
        self.model.set_attn_implementation(self._previous)  # type: ignore[operator]
        AttentionInterface._global_mapping.pop(self._name, None)
        AttentionMaskInterface._global_mapping.pop(self._name, None)
        self._pooled.clear()
        self._cache = None

    def _install(self) -> None:
        if next(self.model.parameters()).device.type == "cpu":
            keep_freed_memory()
        AttentionInterface.register(self._name, self._attend)
        AttentionMaskInterface.register(self._name, self._make_mask)
        decoder = text_decoder(self.model)
        self._hooks.append(decoder.register_forward_pre_hook(self._note_positions, with_kwargs=True))
        for _, module in attention_modules(self.model):
            self._hooks.append(module.register_forward_pre_hook(self._note_cache, with_kwargs=True))
        self.model.set_attn_implementation(self._name)  # type: ignore[operator]

    def _note_cache(self, module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get(CACHE_KEYWORD)
        if cache is not None and getattr(cache, "is_compileable", False) and not self._is_untouched():
            raise ModelError(
                f"{type(cache).__name__} has buffers of fixed length; use a DynamicCache instead"
            )
        if not self._is_untouched():
            give_room(cache, int(module.layer_idx), tokens=self._prompt_tokens or 0)  # type: ignore[arg-type]
        self._cache = None if cache is None else ref(cache)
        pooled = {} if cache is None else self._pooled.get(cache, {})
        if (known := pooled.get(int(module.layer_idx))) is not None:  # type: ignore[arg-type]
            known.follow(cached_keys(cache, module))  # now: a cache that grows in place will have written

    def _note_positions(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Positions that the model counts itself go on from its cache: there is nothing to check."""
        told = (kwargs.get(name) for name in ("position_ids", "cache_position"))
        self._has_own_positions = len(args) > 1 or any(positions is not None for positions in told)
        self._seen_positions = None

    def _check_positions(self, position_ids: torch.Tensor | None, kv_len: int) -> None:
        """Refuse a caller's own positions where they have gaps; read once a pass, not in each layer."""
        if not self._has_own_positions or position_ids is None or position_ids is self._seen_positions:
            return
        last = int(position_ids[:, -1].max())
        if last + 1 != kv_len:
            raise ModelError(
                f"position_ids end at {last}, but the KV cache holds {kv_len} tokens; "
                "sparse attention needs positions that count from 0 without gaps"
            )
        self._seen_positions = position_ids

    def _is_untouched(self) -> bool:
        return self._rung.is_dense and self.base == "sdpa"

    def _make_mask(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        padding: torch.Tensor | None = kwargs.get("attention_mask")
        if not self._is_untouched():
            if kwargs.get("allow_is_causal_skip") is False:
                raise ModelError("packed sequences (position_ids that start anew) are not supported")
            if padding is not None:
                check_padding(padding, kwargs["q_length"])
        if self.base == "best":
            return None
        mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
        if mask is not None:
            mask.sentei_made = True  # type: ignore[attr-defined]
        return mask

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> AttentionResult:
        layer = self._layers.get(module)
        if layer is not None and not self._rung.is_dense:
            _check_mask(attention_mask)
            self._check_positions(kwargs.get("position_ids"), key.shape[2])
            # A planted fault strikes the side cache, so layers that the rung leaves dense are not spared.
            is_thinned = self._rung.thins(layer.index) or self.fault is not None
            # What runs dense pays for no features: the side cache is made from the keys when it is asked for.
            if is_thinned and self._is_covered(query, key.shape[2]):
                with self._part(FEATURES):
                    pooled = self._update_pooled(layer, query, key)
                return self._attend_sparse(layer, query, key, value, pooled)
        if layer is not None:
            self._record(layer, query, key, None)
            density = (1.0,) * layer.kv_heads
            causal = self._weigh_dense(layer, query, key)
            self._stats.add(LayerCall(layer.index, query.shape[2], causal, "dense", density))
        with self._part(FULL_ATTENTION if layer is not None else WINDOW_ATTENTION):
            if self.base != "sdpa":
                out = dense_attend(
                    query,
                    key,
                    value,
                    scale=kwargs.get("scaling"),
                    window=kwargs.get("sliding_window"),
                    q_offset=key.shape[2] - query.shape[2],
                    backend="flex" if self.base == "flex" else "auto",
                )
                return out.transpose(1, 2).contiguous(), None
            untouched: AttentionResult = sdpa_attention_forward(
                module, query, key, value, attention_mask, **kwargs
            )
            return untouched

    def _attend_sparse(
        self,
        layer: LayerInfo,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pooled: EncodedKeys,
    ) -> AttentionResult:
        poison = None
        if self.selector is not None:
            mask = self.selector(layer, query, key)
        else:
            mask, poison = self._select(layer, query, key, pooled)
        with self._part(SELECTION):
            kept, causal = _kept_by_group(mask, layer.kv_heads)
        self._stats.add(LayerCall(layer.index, query.shape[2], causal, "sparse", kept))
        with self._part(FULL_ATTENTION):
            if self.is_differentiable:
                out = attend_masked(query, key, value, mask, scale=layer.scale)
            else:
                wants_lse = self._attended is not None
                out, lse = attend(query, key, value, mask, scale=layer.scale, return_lse=wants_lse)
                self._record(layer, query, key, lse)
        out = out.transpose(1, 2).contiguous()
        if poison is not None:
            out[..., :1].add_(poison)  # the projections behind carry it to all that follows
        return out, None

    def _weigh_dense(self, layer: LayerInfo, query: torch.Tensor, key: torch.Tensor) -> int:
        """The causal blocks of a dense call, in blocks as the layer's thinned calls have them."""
        block_k = DEFAULT_BLOCK
        if self.adapter is not None:
            block_k = self.adapter.scorers[layer.index].shape.block_tokens
        offset = key.shape[2] - query.shape[2]
        return _causal_blocks(query.shape[2], self._ladder.query_block_tokens, block_k, offset)

    def _is_covered(self, query: torch.Tensor, kv_len: int) -> bool:
        """Whether a call runs sparse; one row is a decode step, which pays from another length on."""
        batch, _, num_rows, _ = query.shape
        # A prompt longer than was verified is dense from its first piece on.
        if self._prompt_tokens is not None and not self._rung.covers_prompt(self._prompt_tokens):
            return False
        return self._rung.covers_step(kv_len, batch) if num_rows == 1 else self._rung.covers(kv_len)

    def _keep_short(
        self, shares: torch.Tensor, starts: torch.Tensor, query: torch.Tensor, offset: int
    ) -> torch.Tensor:
        """Let query blocks below their break-even keep everything; one row alone has that of a decode step.

        So what a block keeps does not depend on where the prompt was cut, even if one row is left over.
        """
        batch, _, num_rows, _ = query.shape
        if num_rows == 1:
            return shares  # `_is_covered` has looked at its length
        if offset + 1 < self._rung.break_even_tokens:  # else no query block is short
            shares = keep_before(shares, starts, self._rung.break_even_tokens)
        if num_rows % self._ladder.query_block_tokens == 1:
            last = keep_before(shares[:, :, -1:], starts[-1:], self._rung.step_break_even_tokens(batch))
            shares = torch.cat((shares[:, :, :-1], last), dim=2)
        return shares

    def _last_rows(self, num_rows: int, kv_len: int) -> tuple[int, int]:
        """Return between which positions rows keep everything because their prompt ends there."""
        end = self._prompt_tokens
        if end is None:
            end = kv_len if num_rows > 1 and self._cache is not None else 0
        return self._rung.last_from(end, self._ladder.query_block_tokens), end

    def _record(
        self, layer: LayerInfo, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        if self._attended is not None:
            num_rows, kv_len = query.shape[2], key.shape[2]
            first, end = self._last_rows(num_rows, kv_len)
            cut = 0
            if lse is not None and first < kv_len <= end:
                cut = kv_len - first  # what keeps everything by rule says nothing of the rung
            if cut >= num_rows:
                return
            last = num_rows - cut
            newest = slice(max(0, last - (self._num_attended or last)), last)
            lse = None if lse is None else lse[:, :, newest].clone()
            rows = AttendedRows(layer, query[:, :, newest].clone(), key[:, :, : kv_len - cut], lse)
            self._attended.append(rows)

    @torch.no_grad()
    def _select(
        self, layer: LayerInfo, query: torch.Tensor, key: torch.Tensor, pooled: EncodedKeys
    ) -> tuple[BlockMask, torch.Tensor | None]:
        """Return the mask, and on a GPU 0 or, where the scorer gave NaN, the NaN for the output to carry."""
        assert self.adapter is not None
        scorer = self.adapter.scorers[layer.index]
        block_q = self._ladder.query_block_tokens
        offset = key.shape[2] - query.shape[2]
        thresholds = self._thresholds[layer.index]
        table = self._rotary.on(key.device)
        with self._part(SCORING):
            shares, starts = score_blocks(scorer, query, key, pooled, table=table, block_q=block_q)
        poison = nan_where_broken(shares)
        if self.fault is not None:
            shares = self.fault.shift(shares, starts)
        shares = self._keep_short(shares, starts, query, offset)
        first, end = self._last_rows(query.shape[2], key.shape[2])
        if first < min(end, key.shape[2]):  # else no row of this piece is among them
            shares = shares.masked_fill(((starts >= first) & (starts < end))[:, None], float("inf"))
        with self._part(SELECTION):
            mask = select_blocks(
                shares,
                thresholds,
                starts=starts,
                q_len=query.shape[2],
                kv_len=key.shape[2],
                q_offset=offset,
                block_q=block_q,
                block_k=scorer.shape.block_tokens,
            )
        if self._observer is not None:
            cut = per_head_thresholds(thresholds, starts, layer.query_heads)[..., 0]
            self._observer(Selection(layer, query, key, shares, cut, mask))
        return mask, poison

    @torch.no_grad()
    def _update_pooled(self, layer: LayerInfo, query: torch.Tensor, key: torch.Tensor) -> EncodedKeys:
        assert self.adapter is not None
        scorer = self.adapter.scorers[layer.index]
        pooled = PooledCache(scorer)
        cache = None if self._cache is None else self._cache()
        if cache is not None:
            pooled = self._pooled.setdefault(cache, {}).setdefault(layer.index, pooled)
        return pooled.update(key, query.shape[2], self._rotary.on(key.device))

    def _read_thresholds(self) -> Mapping[int, Thresholds]:
        """Made once for each rung: requests on several rungs take turns, step by step."""
        found = self._thresholds_by_rung.get(self._rung.id)
        if found is None:
            layers = () if self._rung.is_dense else self._layers.values()
            found = {layer.index: self._ladder.thresholds(self._rung, layer.index) for layer in layers}
            self._thresholds_by_rung[self._rung.id] = found
        return found


def attach(model: nn.Module, adapter: Adapter | None, *, rung: str = DENSE, base: Base = "sdpa") -> Retrofit:
    """Retrofit a model until `close()` is called; without an adapter only the rung `dense` exists."""
    return Retrofit(model, adapter, rung=rung, base=base)


@contextmanager
def retrofit(
    model: nn.Module,
    adapter: Adapter | None,
    rung: str = DENSE,
    *,
    base: Base = "sdpa",
    low_rank: bool = False,
) -> Iterator[Retrofit]:
    """Retrofit a model for the length of a `with` block; the model is restored also after an error."""
    handle = attach(model, adapter, rung=rung, base=base)
    try:
        handle.set_low_rank(low_rank)
        yield handle
    finally:
        handle.close()


def cached_keys(cache: Any, module: nn.Module) -> torch.Tensor | None:
    """Return the keys that a KV cache holds for an attention module, or None where it holds none yet."""
    layers, index = getattr(cache, "layers", ()), int(module.layer_idx)  # type: ignore[arg-type]
    keys: torch.Tensor | None = getattr(layers[index], "keys", None) if index < len(layers) else None
    return keys


def check_padding(mask: torch.Tensor, q_length: int) -> None:
    """Accept no padding, or right padding in a prefill; refuse what would move block borders."""
    if mask.ndim != 2 or bool(mask.all()):
        return
    is_prefill = mask.shape[1] == q_length
    is_right_padded = bool((mask[:, 1:].int() <= mask[:, :-1].int()).all())
    if is_prefill and is_right_padded:
        return
    raise ModelError(
        "left padding, or decoding after a padded prefill, would move block borders; "
        "use one request per KV cache, sequences of equal length, or right padding without a cache"
    )


def _match_layers(model: nn.Module, adapter: Adapter | None) -> dict[nn.Module, LayerInfo]:
    layers = {layer.module: layer for layer in thinnable_layers(model)}
    if adapter is not None:
        own, theirs = {layer.index for layer in layers.values()}, set(adapter.scorers)
        if own != theirs:
            raise ModelError(
                f"the adapter has scorers for layers {sorted(theirs)}, the model needs {sorted(own)}"
            )
    return layers


def _kept_by_group(mask: BlockMask, kv_heads: int) -> tuple[torch.Tensor | tuple[float, ...], int]:
    """Return each KV group's share of the causal blocks, and how many these are for one head.

    The shares are a tensor [Hkv] on a GPU, which nobody waits for.
    """
    batch, heads, _ = mask.counts.shape
    kept = mask.counts.view(batch, kv_heads, -1).sum(dim=(0, 2))
    sizes = (mask.q_len, mask.block_q, mask.block_k, mask.q_offset)
    causal = _causal_blocks(*sizes)
    per_group = causal * batch * (heads // kv_heads)
    if kept.device.type == "cpu":
        return tuple(count / per_group for count in kept.tolist()), causal
    return kept.double() / per_group, causal


@lru_cache(maxsize=64)  # the layers of one pass ask the same
def _causal_blocks(q_len: int, block_q: int, block_k: int, q_offset: int) -> int:
    """Key blocks at or before the last row of each query block, summed: counted without asking a device."""
    ends = (min((i + 1) * block_q, q_len) for i in range(num_blocks(q_len, block_q)))
    return sum((q_offset + end - 1) // block_k + 1 for end in ends)


def _check_mask(mask: torch.Tensor | None) -> None:
    if mask is not None and not getattr(mask, "sentei_made", False):
        raise ModelError(
            "a mask of one's own (4 dimensions) is not supported; pass a 2-dimensional one, or none"
        )
