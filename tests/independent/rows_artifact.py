"""A6: which altered adapters are loaded; the loader is the product's, the alterations are not."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.independent.counting import Count, Progress, Row, count

Alter = Callable[[Path, np.random.Generator], None]


def rows() -> tuple[Row, ...]:
    """All that a folder can show."""
    return (
        Row(
            "A6",
            "ladder or weights of an adapter changed, in five ways: loaded without a word",
            "never",
            _swaps,
            50,
            key="folder",
        ),
    )


def _ladder_of_another(folder: Path, rng: np.random.Generator) -> None:
    _change_thresholds(folder, lambda x: float(rng.uniform(0.001, 0.6)))


def _thresholds_times_50(folder: Path, _rng: np.random.Generator) -> None:
    _change_thresholds(folder, lambda x: x * 50)


def _change_thresholds(folder: Path, change: Callable[[float], float]) -> None:
    path = folder / "ladder.json"
    ladder = json.loads(path.read_text(encoding="utf-8"))

    def walk(node: Any, key: str = "") -> Any:
        if isinstance(node, dict):
            return {
                name: walk(value, "thresholds" if key == "thresholds" else name)
                for name, value in node.items()
            }
        if isinstance(node, list):
            return [walk(value, key) for value in node]
        is_number = isinstance(node, float) and key == "thresholds"
        return change(node) if is_number else node

    path.write_text(json.dumps(walk(ladder)), encoding="utf-8")


def _weights_zeroed(folder: Path, _rng: np.random.Generator) -> None:
    path = folder / "scorer.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path)


def _weights_of_another(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "scorer.safetensors"
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    save_file(
        {n: torch.randn(v.shape, generator=generator).to(v.dtype) for n, v in load_file(path).items()}, path
    )


def _one_bit(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "scorer.safetensors"
    data = bytearray(path.read_bytes())
    place = int(rng.integers(len(data) // 2, len(data)))
    data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


WAYS: tuple[Alter, ...] = (
    _ladder_of_another,
    _thresholds_times_50,
    _weights_zeroed,
    _weights_of_another,
    _one_bit,
)


@lru_cache
def _model() -> Any:
    return import_module("sentei.pipeline.models").resolve_model("pocket").model


def _make(folder: Path) -> None:
    adapters, ladders = import_module("sentei.kernels.hf.adapter"), import_module("sentei.kernels.hf.ladder")
    adapter = adapters.new_adapter(_model(), "independent", rank=4)
    shapes = adapter.manifest.shapes
    thresholds = {index: ((0.01,),) * shape.kv_heads for index, shape in shapes.items()}
    rungs = (ladders.Rung(ladders.DENSE), ladders.Rung("mild", thresholds, bound_dropped_mass=1.0))
    ladder = ladders.Ladder(rungs, (), max(shape.block_tokens for shape in shapes.values()))
    adapters.save_adapter(adapter.with_ladder(ladder), folder)


def _swaps(trials: int, progress: Progress) -> Count:
    load = import_module("sentei.kernels.hf.adapter").load_adapter
    with tempfile.TemporaryDirectory() as parent:
        own = Path(parent) / "own"
        _make(own)
        load(own, _model())  # as it was saved it is loaded

        def is_wrong(seed: int) -> bool:
            rng, folder = np.random.default_rng((seed, 66)), Path(parent) / f"copy-{seed}"
            shutil.copytree(own, folder)
            WAYS[seed % len(WAYS)](folder, rng)
            try:
                load(folder, _model())
            except Exception:  # whatever the version calls a refusal
                return False
            return True

        return count(trials, progress, is_wrong)
