"""Pooled keys beside a KV cache: they grow with it, and start anew where it is not what it was."""

import torch

from sentei.kernels.ops.registry import is_native_usable
from sentei.kernels.scorer.features import RotaryTable, pool_tokens, unrotate
from sentei.kernels.scorer.network import BlockScorer, ScorerShape


class PooledCache:
    """Encoded pooled keys of one layer of one KV cache; only new full pools are ever computed.

    Everything here is a function of the cached keys, so a cache that was cropped, reset, reordered or swapped
    is noticed (length, and the last key seen) and rebuilt from them.
    """

    def __init__(self, scorer: BlockScorer) -> None:
        self._scorer = scorer
        self._keys: torch.Tensor | None = None  # a view of the first pools of `_room`
        self._room: torch.Tensor | None = None
        self._tokens = 0
        self._last_key: torch.Tensor | None = None

    def update(self, k: torch.Tensor, num_new: int, table: RotaryTable) -> torch.Tensor:
        """Take in the KV cache's keys [B, Hkv, T, D], of which `num_new` are new; return all pooled keys."""
        kv_len = k.shape[2]
        if not self._is_continued_by(k, kv_len - num_new):
            self._keys = self._room = None
        size = self._scorer.shape.pool_tokens
        done = 0 if self._keys is None else self._keys.shape[2]
        if self._keys is None or kv_len // size > done:
            fresh = self._encode(k[:, :, done * size : (kv_len // size) * size], done * size, table)
            self._keys = self._append(fresh, done)
        self._tokens = kv_len
        self._last_key = k[:, :, kv_len - 1].detach().clone()
        return self._keys

    def _is_continued_by(self, k: torch.Tensor, past: int) -> bool:
        if self._last_key is None or past != self._tokens or self._last_key.shape[0] != k.shape[0]:
            return False
        return torch.equal(self._last_key, k[:, :, past - 1])

    def _append(self, fresh: torch.Tensor, done: int) -> torch.Tensor:
        """Put new pools behind the first `done`; room doubles, so that a decode step copies only its own."""
        if self._room is None or self._keys is None:
            self._room = fresh
            return fresh
        total = done + fresh.shape[2]
        if total > self._room.shape[2]:
            room = fresh.new_empty(*fresh.shape[:2], 2 * total, fresh.shape[3])
            room[:, :, :done] = self._keys
            self._room = room
        self._room[:, :, done:total] = fresh
        return self._room[:, :, :total]

    def _encode(self, k: torch.Tensor, first: int, table: RotaryTable) -> torch.Tensor:
        pooled, plain = pool_keys(k, first, table, self._scorer.shape)
        return self._scorer.encode_keys(pooled.to(k.dtype), plain.to(k.dtype))


def pool_keys(
    k: torch.Tensor, first: int, table: RotaryTable, shape: ScorerShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean keys of each pool with and without rotation; k [B, Hkv, T, D] starts at `first`."""
    last = first + k.shape[2]
    if is_native_usable(k.device.type, shape.block_tokens):
        from sentei.kernels.ops.native.calls import pool_native

        cos, sin = (part[first:last].float().contiguous() for part in (table.cos, table.sin))
        return pool_native(k, cos, sin, shape.pool_tokens)
    plain = unrotate(k, torch.arange(first, last, device=k.device), table)
    return pool_tokens(k, shape.pool_tokens), pool_tokens(plain, shape.pool_tokens)
