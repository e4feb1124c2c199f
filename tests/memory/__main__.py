"""How much memory does distilling a model of some billion parameters take? Llama 3.1 8B's widths, few layers.

    python -m tests.memory --layers 2 --tokens 32768

Random weights at the real widths (hidden 4,096, 32 query heads on 8 of 128, MLP 14,336); the vocabulary is
the pocket model's, 2,048 of 128,256 words, as distilling reads no logits. Peaks of resident memory are taken
while activations are recorded and while scorers are trained. What 32 layers take is reckoned from it: weights
grow with the layers, records wait on disk, and training holds as many layers' tensors as there are threads.
One JSON document goes to stdout; the exit code is 1 where the peak is above `--most-gib`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sentei.kernels.hf.models import fingerprint
from sentei.pipeline.ladder.distill import DistillOptions, distill
from sentei.pipeline.models import POCKET, LoadedModel, load_tokenizer
from sentei.pipeline.text.corpus import load_corpus

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GIB = 2**30
FULL_LAYERS, FULL_VOCABULARY = 32, 128_256


@dataclass(slots=True)
class Peaks:
    """Highest resident memory of each phase in GiB, by the label that the step reports; and bytes on disk."""

    gib: dict[str, float] = field(default_factory=dict)
    disk_bytes: int = 0
    _label: str = "make the model"

    def begin(self, label: str) -> None:
        """Close the running phase and begin another."""
        reached = max(self.gib.get(self._label, 0.0), _resident("VmHWM") / GIB)
        self.gib[self._label] = round(reached, 2)
        print(f"{self._label}: {reached:.2f} GiB at its peak", file=sys.stderr, flush=True)
        self._label = label
        CLEAR.write_text("5", encoding="ascii")  # the mark begins again at what is resident now

    def follow(self, label: str, done: int, total: int) -> None:
        """Take a step's progress: a label that is new is another phase."""
        print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)
        folders = Path(tempfile.gettempdir()).glob("sentei-records-*/*/*")
        self.disk_bytes = max(self.disk_bytes, sum(path.stat().st_size for path in folders))
        if label != self._label:
            self.begin(label)


def make_model(layers: int, tokens: int) -> LoadedModel:
    """Return a model of Llama 3.1 8B's widths in bf16, random, with the pocket model's tokenizer."""
    tokenizer = load_tokenizer(POCKET)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=len(tokenizer),
        max_position_embeddings=max(tokens, 8192),
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    return LoadedModel("llama-8b-shape", model, tokenizer, fingerprint(model, "llama-8b-shape"))


def measure(layers: int, options: DistillOptions) -> dict[str, object]:
    """Distil such a model and return what was measured, and what 32 layers are reckoned to take."""
    peaks = Peaks()
    with tempfile.TemporaryDirectory(prefix="sentei-memory-") as folder:
        tempfile.tempdir = folder  # so that the records of no other run are counted
        loaded = make_model(layers, options.window_tokens)
        weights, per_layer = _bytes_of(loaded.model), _bytes_of(loaded.model.model.layers[0])
        distill(loaded, load_corpus(), Path(folder) / "adapter", options, peaks.follow)
        peaks.begin("done")
        tempfile.tempdir = None
    most = max(peaks.gib.values())
    texts = options.num_windows + options.num_held_out
    full = FULL_LAYERS * per_layer + 2 * FULL_VOCABULARY * 4096 * 2
    return {
        "layers": layers,
        "threads": torch.get_num_threads(),
        "options": asdict(options),
        "peak_gib_by_phase": peaks.gib,
        "peak_gib": most,
        "weights_gib": round(weights / GIB, 2),
        "peak_beyond_weights_gib": round(most - weights / GIB, 2),
        "records_mib_per_layer_and_text": round(peaks.disk_bytes / layers / texts / 2**20, 1),
        "reckoned_32_layers": {
            "weights_gib": round(full / GIB, 2),
            "peak_gib": round(full / GIB + most - weights / GIB, 2),
            "records_on_disk_gib": round(peaks.disk_bytes / layers * FULL_LAYERS / GIB, 2),
        },
    }


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in module.parameters())


def _resident(name: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{STATUS} has no {name}")


def main() -> int:
    """Measure, print, and say by the exit code whether it fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--windows", type=int, default=1, help="training texts; as many are held out")
    parser.add_argument("--rank", type=int, help="largest rank [default: distil's own]")
    parser.add_argument("--epochs", type=int, help="[default: distil's own]")
    parser.add_argument("--most-gib", type=float, default=12.0)
    given = parser.parse_args()
    usual = DistillOptions()
    options = replace(
        usual,
        window_tokens=given.tokens,
        num_windows=given.windows,
        num_held_out=given.windows,
        rank=given.rank,
        max_epochs=given.epochs or usual.max_epochs,
    )
    found = measure(given.layers, options)
    print(json.dumps(found, indent=1))
    return 0 if float(str(found["peak_gib"])) <= given.most_gib else 1


if __name__ == "__main__":
    sys.exit(main())
