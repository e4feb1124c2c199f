"""An adapter on disk: scorer.safetensors, ladder.json and manifest.json, bound to one base model.

Low-rank weights, where there are any, lie beside them in low_rank.safetensors. The manifest seals the other
files by their hashes: what was calibrated and proven is what is loaded, or nothing is.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import nn

from sentei.kernels.hf.ladder import Ladder, dense_ladder, ladder_from_dict
from sentei.kernels.hf.low_rank import LowRank, LowRankInfo, info_from_dict, low_rank_from_tensors
from sentei.kernels.hf.models import AdapterError, Fingerprint, fingerprint, thinnable_layers
from sentei.kernels.ops.block_mask import BLOCK_MIN
from sentei.kernels.scorer.network import BlockScorer, Form, ScorerShape

SCORER_FILE, LADDER_FILE, MANIFEST_FILE = "scorer.safetensors", "ladder.json", "manifest.json"
LOW_RANK_FILE = "low_rank.safetensors"
FORMAT = 1
PRIVATE = 0o600


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an adapter belongs to and where it comes from."""

    base: Fingerprint
    shapes: Mapping[int, ScorerShape]
    tokenizer_sha256: str = ""
    corpus_sha256: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    low_rank: LowRankInfo | None = None
    files: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of each file beside the manifest


@dataclass(frozen=True, slots=True)
class Adapter:
    """The learned scorers of a model's thinnable layers and the ladder calibrated for them."""

    manifest: Manifest
    scorers: Mapping[int, BlockScorer]
    ladder: Ladder
    folder: Path | None = None
    low_rank: LowRank | None = None

    def __post_init__(self) -> None:
        rows = self.ladder.query_block_tokens
        if len(self.ladder.rungs) == 1:  # dense alone chooses nothing
            return
        for index, shape in self.manifest.shapes.items():
            if rows < BLOCK_MIN or shape.block_tokens % rows:
                raise AdapterError(
                    f"query_block_tokens is {rows}, but layer {index} has blocks of {shape.block_tokens}; "
                    f"give a divisor of that, at least {BLOCK_MIN}: sentei calibrate --query-block"
                )
            if rows % shape.row_tokens:
                raise AdapterError(
                    f"query_block_tokens is {rows}, but layer {index} scores {shape.row_tokens} queries as "
                    "one; give a multiple of that: sentei calibrate --query-block"
                )

    @property
    def digest(self) -> str:
        """SHA-256 of the base model and of the files in the folder; "" of what was never saved."""
        if not self.manifest.files:
            return ""
        base = self.manifest.base
        parts = [base.weights_sha256, base.config_sha256, *sorted(self.manifest.files.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def with_ladder(self, ladder: Ladder) -> "Adapter":
        """Return the same scorers under another ladder."""
        return replace(self, ladder=ladder)

    def with_low_rank(self, low_rank: LowRank) -> "Adapter":
        """Return the same scorers and ladder with other low-rank weights."""
        return replace(self, low_rank=low_rank, manifest=replace(self.manifest, low_rank=low_rank.info))


def new_adapter(
    model: nn.Module,
    name: str,
    *,
    rank: int = 64,
    pool_tokens: int = 16,
    block_tokens: int = 64,
    form: Form = "residual",
    query_pool: int = 1,
    seed: int = 0,
) -> Adapter:
    """Return an adapter whose scorers have learned nothing yet; its ladder has `dense` only."""
    shapes: dict[int, ScorerShape] = {}
    scorers: dict[int, BlockScorer] = {}
    for layer in thinnable_layers(model):
        shapes[layer.index] = ScorerShape(
            layer.query_heads,
            layer.kv_heads,
            layer.head_dim,
            rank,
            pool_tokens,
            block_tokens,
            form,
            query_pool,
        )
        scorers[layer.index] = BlockScorer(shapes[layer.index], layer.scale, seed=seed + layer.index)
        scorers[layer.index].eval()
    manifest = Manifest(fingerprint(model, name), shapes, versions=library_versions())
    return Adapter(manifest, scorers, dense_ladder())


def save_adapter(adapter: Adapter, folder: Path) -> Adapter:
    """Write the files, each whole or not at all, and return the adapter with its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"{index}.{key}": value.detach().float().contiguous()
        for index, scorer in adapter.scorers.items()
        for key, value in scorer.state_dict().items()
    }
    _write_tensors(folder / SCORER_FILE, weights)
    if adapter.low_rank is not None:
        _write_tensors(folder / LOW_RANK_FILE, adapter.low_rank.tensors())
    else:
        (folder / LOW_RANK_FILE).unlink(missing_ok=True)
    _write_json(folder / LADDER_FILE, adapter.ladder.to_dict())
    sealed = replace(adapter.manifest, files=_hash_files(folder))
    manifest = asdict(sealed) | {
        "format": FORMAT,
        "scales": {index: scorer.scale for index, scorer in adapter.scorers.items()},
    }
    _write_json(folder / MANIFEST_FILE, manifest)
    return replace(adapter, manifest=sealed, folder=folder)


def save_ladder(ladder: Ladder, folder: Path) -> None:
    """Write ladder.json, whole or not at all, and seal it."""
    _write_json(folder / LADDER_FILE, ladder.to_dict())
    seal_adapter(folder)


def seal_adapter(folder: Path) -> Mapping[str, str]:
    """Write the hashes of a folder's files into its manifest: from now on these and no others are loaded."""
    manifest = _read_json(folder / MANIFEST_FILE)
    for name in (SCORER_FILE, LADDER_FILE):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} has no {name}; distill again")
    files = _hash_files(folder)
    _write_json(folder / MANIFEST_FILE, manifest | {"files": files})
    return files


def load_adapter(path: str | Path, model: nn.Module) -> Adapter:
    """Read an adapter for this model; an adapter of another model is refused by name."""
    folder = Path(path)
    manifest = _manifest_from_dict(_read_json(folder / MANIFEST_FILE), folder)
    _check_base(manifest.base, fingerprint(model, manifest.base.name), folder, model)
    adapter = read_adapter(folder, next(model.parameters()).device)
    return replace(adapter, low_rank=_load_low_rank(manifest, folder, model))


def read_adapter(path: str | Path, device: torch.device | str = "cpu") -> Adapter:
    """Read scorers and ladder alone, for a process in which another library holds the model.

    Whoever starts that process checks with `load_adapter` that adapter and model belong together.
    """
    folder = Path(path)
    data = _read_json(folder / MANIFEST_FILE)
    manifest = _manifest_from_dict(data, folder)
    weights = load(_read_sealed(folder, SCORER_FILE, manifest))
    scorers = {
        index: _load_scorer(index, shape, float(data["scales"][str(index)]), weights, folder).to(device)
        for index, shape in manifest.shapes.items()
    }
    return Adapter(manifest, scorers, _read_ladder(folder, manifest), folder)


def read_ladder(path: str | Path) -> Ladder:
    """Read the ladder alone, as it was sealed: to look at it, without weights and without a model."""
    folder = Path(path)
    return _read_ladder(folder, _manifest_from_dict(_read_json(folder / MANIFEST_FILE), folder))


def _read_ladder(folder: Path, manifest: Manifest) -> Ladder:
    # Ladders of before 2026-11-26 do not name their query blocks: they were as long as key blocks.
    ladder_json = _parse_json(_read_sealed(folder, LADDER_FILE, manifest), folder / LADDER_FILE)
    return ladder_from_dict({"query_block_tokens": _block_tokens(manifest)} | ladder_json)


def _block_tokens(manifest: Manifest) -> int:
    return max(shape.block_tokens for shape in manifest.shapes.values())


def library_versions() -> dict[str, str]:
    """Return the versions that an adapter's figures depend on."""
    names = ("torch", "transformers", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _load_scorer(
    index: int, shape: ScorerShape, scale: float, weights: Mapping[str, torch.Tensor], folder: Path
) -> BlockScorer:
    scorer = BlockScorer(shape, scale)
    own = {key: weights.get(f"{index}.{key}") for key in scorer.state_dict()}
    for key, value in own.items():
        if value is None or not torch.isfinite(value).all():
            raise AdapterError(
                f"{folder / SCORER_FILE}: {index}.{key} is missing or not finite; distill again"
            )
    scorer.load_state_dict(own)
    return scorer.eval()


def _load_low_rank(manifest: Manifest, folder: Path, model: nn.Module) -> LowRank | None:
    if manifest.low_rank is None:
        return None
    path = folder / LOW_RANK_FILE
    if not path.is_file():
        raise AdapterError(
            f"{folder} has no {path.name}, which its manifest names; train it again: sentei distill --joint"
        )
    tensors = load(_read_sealed(folder, LOW_RANK_FILE, manifest))
    return low_rank_from_tensors(manifest.low_rank, tensors, model, str(path))


def _check_base(own: Fingerprint, other: Fingerprint, folder: Path, model: nn.Module) -> None:
    if (own.weights_sha256, own.config_sha256) == (other.weights_sha256, other.config_sha256):
        return
    config = model.config
    found = getattr(config, "name_or_path", "") or getattr(config, "model_type", type(model).__name__)
    what = "configuration" if own.config_sha256 != other.config_sha256 else "weights"
    raise AdapterError(
        f"adapter {folder} belongs to model {own.name!r} (weights {own.weights_sha256[:12]}), but it was "
        f"loaded onto {found!r} (weights {other.weights_sha256[:12]}): the {what} differ; "
        "distill an adapter for this model, or load the model it belongs to"
    )


def _manifest_from_dict(data: Mapping[str, Any], folder: Path) -> Manifest:
    if data.get("format") != FORMAT:
        raise AdapterError(f"{folder}: adapter format is {data.get('format')!r}, this version reads {FORMAT}")
    try:
        return Manifest(
            base=Fingerprint(**data["base"]),
            shapes={int(index): ScorerShape(**shape) for index, shape in data["shapes"].items()},
            tokenizer_sha256=data["tokenizer_sha256"],
            corpus_sha256=data["corpus_sha256"],
            figures=data["figures"],
            versions=data["versions"],
            low_rank=info_from_dict(data["low_rank"]) if data.get("low_rank") is not None else None,
            files=data.get("files", {}),
        )
    except (KeyError, TypeError) as error:
        raise AdapterError(f"{folder / MANIFEST_FILE} is broken ({error!r}); distill again") from error


def _hash_files(folder: Path) -> dict[str, str]:
    names = (SCORER_FILE, LADDER_FILE, LOW_RANK_FILE)
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in names
        if (folder / name).is_file()
    }


def _read_sealed(folder: Path, name: str, manifest: Manifest) -> bytes:
    """Return a file's bytes if they are those that the manifest names."""
    path = folder / name
    if not path.is_file():
        raise AdapterError(f"{folder} has no {name}; distill again")
    if not manifest.files:
        raise AdapterError(
            f"adapter {folder} is not sealed: its manifest has no hashes of its files, so nobody can tell "
            f"whether they are what was calibrated; if you trust them: sentei seal {folder}"
        )
    content, sealed = path.read_bytes(), manifest.files.get(name, "none")
    if (found := hashlib.sha256(content).hexdigest()) != sealed:
        raise AdapterError(
            f"{path} is not the file that was sealed (hash {found[:12]}, manifest {sealed[:12]}): "
            f"restore it; or, if the change was meant, run `sentei seal {folder}` and start a new rollout"
        )
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise AdapterError(f"{path.parent} is no adapter: it has no {path.name}") from error
    return _parse_json(content, path)


def _parse_json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(content)
    except ValueError as error:  # not JSON, or not UTF-8
        raise AdapterError(f"{path} is not JSON ({error}); restore or rebuild the adapter") from error
    return data


def _make_private(path: Path) -> None:
    """Let the file be there, readable by its owner alone, before anything is in it."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE))


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    scratch = path.with_name(f".{path.name}")
    _make_private(scratch)
    save_file(dict(tensors), scratch)
    scratch.chmod(PRIVATE)  # the library may write a file of its own and move it there
    os.replace(scratch, path)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    scratch = path.with_name(f".{path.name}")
    _make_private(scratch)
    scratch.write_text(json.dumps(data, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(scratch, path)
