"""The rotary embedding of a model as it is now, read without calling it.

Dynamic types (NTK, LongRoPE) choose their frequencies anew when called, by the last position they see. A call
for our own table would change what the model does next, so only its buffers are read here.
"""

from typing import Any

import torch
from torch import nn

from sentei.kernels.hf.models import find_family, text_decoder
from sentei.kernels.scorer.features import RotaryTable

_ROWS_MIN = 1024


class RotaryReader:
    """Tables of the full-attention layers; read anew when the model has changed its frequencies."""

    def __init__(self, model: nn.Module) -> None:
        self._rotary: Any = text_decoder(model).rotary_emb
        self._prefix = "full_attention_" if find_family(model).rotary_takes_layer_type else ""
        self._table: RotaryTable | None = None
        self._source: torch.Tensor | None = None
        self._version = 0
        self._seen: tuple[torch.Tensor, float] | None = None

    def table(self, length: int, device: torch.device | str = "cpu") -> RotaryTable:
        """Return cosines and sines, in fp32, for at least the positions 0 to length - 1."""
        is_known = self._is_unchanged()
        if self._table is None or not is_known or self._table.length < length:
            self._table = self._make(max(_ROWS_MIN, 1 << (length - 1).bit_length()), device)
        return self._table

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

    def _make(self, rows: int, device: torch.device | str) -> RotaryTable:
        frequencies, scaling = self._read()
        positions = torch.arange(rows, device=device)[:, None].float()
        angles = positions * frequencies.to(device=device, dtype=torch.float32)
        both = torch.cat((angles, angles), dim=-1)
        return RotaryTable(both.cos() * scaling, both.sin() * scaling)
