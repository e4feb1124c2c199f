"""The heat map of an explained prompt: one HTML page that needs no network, with the prompt's text escaped.

The page's one script is named by its hash in the page's own content policy, so that nothing else may run in
it, whatever the prompt says.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from sentei.pipeline.measure.choices import Explanation, LayerChoices
from sentei.pipeline.reports.pages import render_template

RECORD_FILE, PAGE_FILE = "choices.json", "choices.html"
_TEMPLATES = Path(__file__).parent / "templates"


def save_explanation(explanation: Explanation, text: str, folder: Path) -> tuple[Path, Path]:
    """Write the record and the page of a prompt; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    record, page = folder / RECORD_FILE, folder / PAGE_FILE
    record.write_text(json.dumps(explanation.to_dict(), separators=(",", ":")), encoding="utf-8")
    page.write_text(render_page(explanation, text), encoding="utf-8")
    return record, page


def render_page(explanation: Explanation, text: str) -> str:
    """Return the page; `text` is the prompt that was explained."""
    script = (_TEMPLATES / "choices.js").read_text(encoding="utf-8")
    votes, most = explanation.votes()
    shares = [vote / most if most else 1.0 for vote in votes]
    return render_template(
        "choices.html",
        e=explanation,
        summary=explanation.summary(),
        blocks=[
            (text[begin:end], shares[i] if i < len(shares) else 0.0)
            for i, (begin, end) in enumerate(explanation.block_chars)
        ],
        data=_page_data(explanation),
        script=Markup(script),
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _page_data(explanation: Explanation) -> dict[str, Any]:
    """What the script reads: numbers only, arrays packed as base64."""
    return {
        "block_tokens": explanation.block_tokens,
        "prompt_tokens": explanation.prompt_tokens,
        "query_block": explanation.query_block,
        "recorded": list(explanation.recorded),
        "layers": [_layer_data(layer) for layer in explanation.layers],
    }


def _layer_data(layer: LayerChoices) -> dict[str, Any]:
    """Rows in the order of the recorded query blocks, heads within a row, key blocks within a head."""
    kept = np.concatenate([rows.ravel() for rows in layer.kept])
    return {
        "index": layer.index,
        "heads": layer.query_heads,
        "group": layer.query_heads // layer.kv_heads,
        "thresholds": _pack(layer.log_thresholds.T.ravel()),
        "shares": _pack_all(layer.log_shares),
        "kept": base64.b64encode(np.packbits(kept, bitorder="little").tobytes()).decode(),
        "true_shares": _pack(layer.focus.true_shares.ravel()),
    }


def _pack_all(rows: Sequence[NDArray[np.float32]]) -> str:
    return _pack(np.concatenate([row.ravel() for row in rows]))


def _pack(values: NDArray[np.float32]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()
