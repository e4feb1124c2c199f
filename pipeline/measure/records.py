"""Records of what layers saw: on disk while they wait, in memory one at a time.

A model of some billion parameters fills tens of gigabytes with them, and a step of training needs one.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import overload

import torch
from safetensors.torch import load_file, save_file

from sentei.kernels.scorer.features import RotaryTable, pool_tokens, unrotate
from sentei.kernels.scorer.selection import QueryBlocks


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What one layer saw in some query blocks of one text, and where its attention truly went: on the CPU."""

    q: torch.Tensor  # [1, Hq, n, rows, D], bf16
    starts: torch.Tensor  # [n]
    keys: torch.Tensor  # [1, Hkv, T, D], in the model's own precision
    lse: torch.Tensor  # [1, Hq, n, rows], exact log weight of the forced blocks
    mass: torch.Tensor  # [1, Hq, n, rows, blocks], true share of each key block, fp16
    is_asking: torch.Tensor  # [n], whether the block lies among a recall text's questions
    table: RotaryTable  # the model's, shared by all records

    @property
    def is_open(self) -> torch.Tensor:
        """[n, blocks]: blocks a scorer may choose, that is, neither sink nor diagonal nor ahead."""
        index = torch.arange(self.mass.shape[-1])
        own = self.starts // (self.mass.shape[3])
        return (index >= 1) & (index < own[:, None])

    def query_blocks(self, query_pool: int = 1) -> QueryBlocks:
        """Return the queries with and without rotation, in fp32, pooled."""
        q = self.q.float()
        positions = self.starts[:, None] + torch.arange(q.shape[3])
        return QueryBlocks(q, unrotate(q, positions, self.table), self.starts).pool(query_pool)

    def pool_keys(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the means over `size` keys with and without rotation, in fp32: [1, Hkv, P, D]."""
        keys = self.keys.float()
        plain = unrotate(keys, torch.arange(keys.shape[2]), self.table)
        return pool_tokens(keys, size), pool_tokens(plain, size)


LayerRecords = Mapping[int, Sequence[LayerRecord]]


class StoredRecords(Sequence[LayerRecord]):
    """One layer's records in a folder, each read when it is asked for."""

    def __init__(self, folder: Path, table: RotaryTable) -> None:
        self._folder = folder
        self._table = table
        self._num = 0

    def __len__(self) -> int:
        return self._num

    @overload
    def __getitem__(self, at: int) -> LayerRecord: ...
    @overload
    def __getitem__(self, at: slice) -> list[LayerRecord]: ...
    def __getitem__(self, at: int | slice) -> LayerRecord | list[LayerRecord]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self._num))]
        if not -self._num <= at < self._num:
            raise IndexError(f"record {at} of {self._num}")
        return LayerRecord(**load_file(self._path(at % self._num)), table=self._table)

    def append(self, record: LayerRecord) -> None:
        """Write a record behind the others."""
        named = {field.name: getattr(record, field.name) for field in fields(record)}
        tensors = {name: x.contiguous() for name, x in named.items() if isinstance(x, torch.Tensor)}
        save_file(tensors, self._path(self._num))
        self._num += 1

    def _path(self, at: int) -> Path:
        return self._folder / f"{at}.safetensors"


class Records(Mapping[int, Sequence[LayerRecord]]):
    """The records of each layer, in a temporary folder (TMPDIR) that goes when these records do."""

    def __init__(self, layers: Iterable[int], table: RotaryTable) -> None:
        folder = Path(tempfile.mkdtemp(prefix="sentei-records-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._by_layer: dict[int, StoredRecords] = {}
        for layer in layers:
            (folder / str(layer)).mkdir()
            self._by_layer[layer] = StoredRecords(folder / str(layer), table)

    def __getitem__(self, layer: int) -> StoredRecords:
        return self._by_layer[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_layer)

    def __len__(self) -> int:
        return len(self._by_layer)

    def add(self, layer: int, record: LayerRecord) -> None:
        """Keep another record of a layer."""
        self._by_layer[layer].append(record)
