"""Pooled keys beside a KV cache: they grow with it, and start anew where it is not what it was."""

from functools import partial
from weakref import ReferenceType, ref

import torch

from sentei.kernels.ops.native.calls import BytePanels
from sentei.kernels.ops.registry import attempt, is_native_usable, takes_triton
from sentei.kernels.scorer.byte_keys import EncodedKeys, add_blocks, takes_bytes
from sentei.kernels.scorer.features import Rotary, RotaryTable, pool_tokens, unrotate
from sentei.kernels.scorer.network import BlockScorer, ScorerShape
from sentei.kernels.scorer.selection import TRITON_SCORES


class PooledCache:
    """Encoded pooled keys of one layer of one KV cache; only new full pools are ever computed.

    Everything here is a function of the cached keys, so it can be rebuilt from them at any time. `follow`
    notices whatever happened to a cache since: it compares the tensor itself and its version. Without it a
    crop, a swap or a reordering is only seen where it changed the length or the last key. On a GPU, where
    nobody waits for that key, what inference mode writes in place goes unseen: it counts no version.
    """

    def __init__(self, scorer: BlockScorer, backend: str = "auto") -> None:
        self._scorer = scorer
        self._backend = backend
        self._keys: torch.Tensor | None = None  # a view of the first pools of `_room`
        self._room: torch.Tensor | None = None
        self._bytes: BytePanels | None = None  # in place of both
        self._tokens = 0
        self._last_key: torch.Tensor | None = None
        self._is_followed = False  # the keys that came before `update` are those that it took in last
        self._seen: ReferenceType[torch.Tensor] | None = None
        self._version = 0

    def follow(self, keys: torch.Tensor | None) -> None:
        """Start anew unless `keys`, the cache's own before it grows, is what was last taken in, unwritten.

        A cache that hands out copies (offloaded, quantised) is pooled anew at each call: slower, never stale.
        """
        is_same = keys is not None and self._seen is not None and self._seen() is keys
        self._is_followed = is_same
        if not is_same or (keys is not None and _version(keys) != self._version):
            self._last_key = None

    def update(self, k: torch.Tensor, num_new: int, rotary: Rotary) -> EncodedKeys:
        """Take in the KV cache's keys [B, Hkv, T, D], of which `num_new` are new; return all pooled keys.

        Where they are scored in bytes, those of full blocks alone: no other block can be chosen.
        """
        kv_len = k.shape[2]
        if not self._is_continued_by(k, kv_len - num_new):
            self._keys = self._room = self._bytes = None
        found = self._update_bytes(k, rotary) if self._is_in_bytes(k) else self._update_pools(k, rotary)
        self._is_followed = False
        self._tokens = kv_len
        self._last_key = k[:, :, kv_len - 1].detach().clone()
        self._seen, self._version = ref(k), _version(k)
        return found

    def _is_in_bytes(self, k: torch.Tensor) -> bool:
        return self._bytes is not None or (self._backend == "auto" and takes_bytes(self._scorer, k.device))

    def _update_bytes(self, k: torch.Tensor, rotary: Rotary) -> BytePanels:
        block, panels = self._scorer.shape.block_tokens, self._bytes
        first = 0 if panels is None else panels.blocks * block
        last = k.shape[2] // block * block
        if panels is None or last > first:
            features = self._encode(k[:, :, first:last], first, rotary)
            panels = self._bytes = add_blocks(self._scorer, features, k.dtype, panels)
        return panels

    def _update_pools(self, k: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        size = self._scorer.shape.pool_tokens
        done = 0 if self._keys is None else self._keys.shape[2]
        first, last = done * size, k.shape[2] // size * size
        if self._keys is None or last > first:
            self._keys = self._append(self._encode(k[:, :, first:last], first, rotary), done)
        return self._keys

    def _is_continued_by(self, k: torch.Tensor, past: int) -> bool:
        if self._last_key is None or past != self._tokens or self._last_key.shape[0] != k.shape[0]:
            return False
        # Comparing keys would make a GPU's decode step wait in each layer; there `follow` has to have looked.
        if self._is_followed and k.device.type != "cpu":
            return True
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

    def _encode(self, k: torch.Tensor, first: int, rotary: Rotary) -> torch.Tensor:
        """Return the features of the full pools of k [B, Hkv, n, D], whose first token sits at `first`."""
        scorer, shape = self._scorer, self._scorer.shape
        table = rotary.between(first, max(first + k.shape[2], first + 1))
        if scorer.has_native_program and takes_triton(self._backend, k.device):
            from sentei.kernels.scorer.launches import encode_pools

            work = partial(encode_pools, scorer, k, first, table)
            found = attempt(TRITON_SCORES, work, must_work=self._backend != "auto")
            if found is not None:
                return found
        last = first + k.shape[2]
        is_native = scorer.has_native_program and is_native_usable(k.device.type, shape.block_tokens)
        if is_native and shape.is_single and last > first:
            from sentei.kernels.ops.native.calls import encode_native

            cos, sin = table.rows(first, last)
            maps = scorer.frozen("key maps", lambda: scorer.key_map.detach().float().contiguous())
            return encode_native(k, cos, sin, maps)
        pooled, plain = pool_keys(k, first, table, shape)
        return self._scorer.encode_keys(pooled.to(k.dtype), plain.to(k.dtype))


def _version(keys: torch.Tensor) -> int:
    """How often a tensor was written in place; tensors of inference mode do not count it."""
    return 0 if keys.is_inference() else keys._version


def pool_keys(
    k: torch.Tensor, first: int, table: RotaryTable, shape: ScorerShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean keys of each pool with and without rotation; k [B, Hkv, T, D] starts at `first`."""
    last = first + k.shape[2]
    if is_native_usable(k.device.type, shape.block_tokens):
        from sentei.kernels.ops.native.calls import pool_native

        cos, sin = table.rows(first, last)
        return pool_native(k, cos, sin, shape.pool_tokens)
    plain = unrotate(k, torch.arange(first, last, device=k.device), table)
    return pool_tokens(k, shape.pool_tokens), pool_tokens(plain, shape.pool_tokens)
