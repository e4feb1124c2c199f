"""What the server asks a worker process: vLLM mixes this class into its worker (`worker_extension_cls`)."""

from __future__ import annotations

from typing import Any

import torch

from sentei.serving.replica.loading import make_fault
from sentei.serving.vllm.state import WorkerState, find_state


class WorkerDesk:
    """Answers remote calls between two steps, in plain values; `self` is vLLM's worker."""

    vllm_config: Any
    device: torch.device

    def sentei_read_use(self, ticket: str) -> dict[str, Any]:
        """Say what a request has used so far."""
        return self._sentei_state().meter.read(ticket).to_dict()

    def sentei_take_use(self, ticket: str) -> dict[str, Any]:
        """Say it for the last time, and forget the request."""
        return self._sentei_state().meter.take(ticket).to_dict()

    def sentei_plant(self, fault: dict[str, Any] | None) -> None:
        """Plant a fault, or take it out; the caller empties the prefix cache."""
        self._sentei_state().fault = make_fault(fault)

    def _sentei_state(self) -> WorkerState:
        state = find_state(self.vllm_config, self.device)
        assert state is not None, "this engine was built without Sentei's options"
        return state
