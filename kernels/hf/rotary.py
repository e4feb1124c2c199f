"""The rotary embedding of a model as it is now, read without calling it.

Dynamic types (NTK, LongRoPE) choose their frequencies anew when called, by the last position they see. A call
for our own table would change what the model does next, so only its buffers are read here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sentei.kernels.hf.models import find_family, text_decoder
from sentei.kernels.scorer.features import Rotary, RotaryTable

_STEP_ROWS = 256  # of a table that decode steps read
_NUM_STEPS = 16  # such tables that are kept: requests at other positions take turns
_NUM_TABLES = 2  # of other lengths
_ROWS_MIN = 1024  # on a GPU


class RotaryReader:
    """Tables of the full-attention layers; made anew when the model has changed its frequencies.

    On a CPU one table is of the rows that are asked for: of all positions it would be longer than their
    keys, which are bf16 (67 MiB for 32,768 positions and heads of 256).
    """

    def __init__(self, model: nn.Module) -> None:
        self._rotary: Any = text_decoder(model).rotary_emb
        self._prefix = "full_attention_" if find_family(model).rotary_takes_layer_type else ""
        self._tables: list[
            RotaryTable
        ] = []  # of more rows than a step's: a layer encodes some, scores others
        self._steps: dict[int, RotaryTable] = {}
        self._source: torch.Tensor | None = None
        self._version = 0
        self._seen: tuple[torch.Tensor, float] | None = None

    def on(self, device: torch.device) -> Rotary:
        """Return what makes tables on a device."""
        return _Placed(self, device)

    def between(self, first: int, last: int, device: torch.device | str = "cpu") -> RotaryTable:
        """Return cosines and sines, in fp32, of at least the positions `first` to `last` - 1."""
        if not self._is_unchanged():
            self._tables.clear()
            self._steps.clear()
        if torch.device(device).type != "cpu":  # its programs read tables from position 0 on
            first, last = 0, max(_ROWS_MIN, 1 << (last - 1).bit_length())
        elif first // _STEP_ROWS == (last - 1) // _STEP_ROWS:
            return self._step_table(first // _STEP_ROWS, device)
        for table in self._tables:
            if table.first <= first and last <= table.length and table.cos.device == torch.device(device):
                return table
        self._tables = [*self._tables[1 - _NUM_TABLES :], self._make(first, last, device)]
        return self._tables[-1]

    def _step_table(self, index: int, device: torch.device | str) -> RotaryTable:
        found = self._steps.pop(index, None) or self._make(
            index * _STEP_ROWS, (index + 1) * _STEP_ROWS, device
        )
        self._steps[index] = found  # behind those that were not asked for since
        if len(self._steps) > _NUM_STEPS:
            del self._steps[next(iter(self._steps))]
        return found

    def _read(self) -> tuple[torch.Tensor, float]:
        frequencies: torch.Tensor = getattr(self._rotary, f"{self._prefix}inv_freq")
        return frequencies, float(getattr(self._rotary, f"{self._prefix}attention_scaling"))

    def _is_unchanged(self) -> bool:
        """Whether the frequencies are those of the table; values are compared only where they may differ."""
        frequencies, scaling = self._read()
        version = -1 if frequencies.is_inference() else frequencies._version
        # Writing in inference mode counts no version: on a CPU the values say whether it happened. A GPU's
        # are not waited for: the dynamic types put a new tensor in the old one's place.
        is_telling = version != -1 or frequencies.device.type != "cpu"
        if frequencies is self._source and version == self._version and is_telling:
            return True
        is_same = (
            self._seen is not None
            and self._seen[1] == scaling
            and self._seen[0].device == frequencies.device == torch.device("cpu")
            and torch.equal(self._seen[0], frequencies)
        )
        self._source, self._version = frequencies, version
        self._seen = (frequencies.detach().clone(), scaling)
        return is_same

    def _make(self, first: int, last: int, device: torch.device | str) -> RotaryTable:
        frequencies, scaling = self._read()
        positions = torch.arange(first, last, device=device)[:, None].float()
        angles = positions * frequencies.to(device=device, dtype=torch.float32)
        both = torch.cat((angles, angles), dim=-1)
        return RotaryTable(both.cos() * scaling, both.sin() * scaling, first)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A reader's tables on one device."""

    reader: RotaryReader
    device: torch.device

    def between(self, first: int, last: int) -> RotaryTable:
        """Return a table of at least the positions `first` to `last` - 1."""
        return self.reader.between(first, last, self.device)
