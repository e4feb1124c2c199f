"""The record of one prompt's choices and its page: what is kept and why, bounded, with the text escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sentei.kernels.hf.models import LayerInfo
from sentei.kernels.hf.observe import Selection
from sentei.kernels.scorer.selection import Thresholds, per_head_thresholds, select_blocks
from sentei.pipeline.measure.choices import (
    Explanation,
    block_chars,
    pick_query_blocks,
    ranks_of,
    record_choices,
)
from sentei.pipeline.reports.choices_page import render_page

SIZE, BLOCKS, HEADS, KV_HEADS = 16, 5, 4, 2
TOKENS = SIZE * (BLOCKS - 1) + 5  # the last block is ragged
SCRIPT = Path(__file__).parents[2] / "pipeline" / "reports" / "templates" / "choices.js"


def make_selection(share: float = 0.15) -> Selection:
    """Random shares of one layer; the second KV group keeps everything."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, TOKENS, 8, generator=generator) for heads in (HEADS, KV_HEADS))
    shares = torch.rand(1, HEADS, BLOCKS, BLOCKS, generator=generator).mul(0.3).log()
    row, column = torch.arange(BLOCKS)[:, None], torch.arange(BLOCKS)
    shares = shares.masked_fill((column < 1) | (column >= row), -math.inf)
    thresholds = Thresholds(torch.tensor([[share], [1e-30]]).log(), ())
    starts = torch.arange(BLOCKS) * SIZE
    sizes = {"q_len": TOKENS, "kv_len": TOKENS, "q_offset": 0, "block_q": SIZE, "block_k": SIZE}
    mask = select_blocks(shares, thresholds, starts=starts, **sizes)
    layer = LayerInfo(3, torch.nn.Identity(), HEADS, KV_HEADS, 8, 8**-0.5)
    return Selection(layer, query, key, shares, per_head_thresholds(thresholds, starts, HEADS)[..., 0], mask)


def make_explanation(text: str = "x" * TOKENS, **changes: Any) -> Explanation:
    """One layer, all query blocks recorded, the last one in focus."""
    recorded = tuple(range(BLOCKS))
    offsets = [(i, i + 1) for i in range(TOKENS)]
    values: dict[str, Any] = {
        "model": "tiny",
        "adapter": "/adapters/tiny",
        "rung": "bold",
        "prompt_sha256": "0" * 64,
        "prompt_tokens": TOKENS,
        "block_tokens": SIZE,
        "query_block": BLOCKS - 1,
        "recorded": recorded,
        "block_chars": block_chars(offsets, TOKENS, SIZE, len(text)),
        "layers": (record_choices(make_selection(), recorded, BLOCKS - 1),),
        "dense_layers": (),
        "window_layers": (0, 1),
    }
    return Explanation(**{**values, **changes})


class PageReader(HTMLParser):
    """Reads a page as a browser does: its tags, its attributes, and the text of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.shown = ""
        self._is_inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self._is_inside |= tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self._is_inside &= tag != "pre"

    def handle_data(self, data: str) -> None:
        self.shown += data if self._is_inside else ""


def test_every_kept_block_has_its_reason() -> None:
    """Sink and diagonal are kept unasked, and of the others just those above the threshold."""
    selection = make_selection()
    document = make_explanation().to_dict()

    (layer,) = document["layers"]
    for head in layer["heads"]:
        for row in head["query_blocks"]:
            own = row["query_block"]
            shares = selection.log_shares[0, head["head"], own]
            chosen = [j for j in range(1, own) if shares[j] > selection.log_thresholds[head["head"], own]]
            assert row["kept"] == sorted({0, own, *chosen})
            for block, why, share, rank in zip(
                row["kept"], row["why"], row["log_share"], row["rank"], strict=True
            ):
                if why == "score":
                    assert share == pytest.approx(float(shares[block]), abs=1e-6)
                    assert share > row["log_threshold"]
                    assert rank == 1 + sum(float(shares[j]) > float(shares[block]) for j in range(1, own))
                else:
                    assert (why, share, rank) == ("diagonal" if block == own else "sink", None, None)


def test_figures_are_those_of_the_mask() -> None:
    """Density by head, kept by all, and the dropped attention of the focus agree with plain arithmetic."""
    selection = make_selection()
    kept = selection.mask.to_dense()[0]
    (found,) = make_explanation().summary()["layers"]

    causal = BLOCKS * (BLOCKS + 1) / 2
    assert found["density_by_head"] == pytest.approx((kept.sum((1, 2)) / causal).tolist(), abs=1e-6)
    assert found["density_by_head"][2:] == [1.0, 1.0]
    there = found["at_query_block"]
    assert there["kept_by_all_heads"] == int(kept[:, -1].all(0).sum())
    keys = selection.key.repeat_interleave(2, dim=1)
    rows = torch.arange(SIZE * (BLOCKS - 1), TOKENS)
    scores = selection.query[:, :, rows] @ keys.mT * selection.layer.scale
    scores = scores.masked_fill(torch.arange(TOKENS) > rows[:, None], -math.inf).softmax(-1)[0]
    dropped = (scores * ~kept[:, -1].repeat_interleave(SIZE, dim=-1)[:, None, :TOKENS]).sum(-1)
    assert there["dropped_mass_mean"] == pytest.approx(float(dropped.mean()), abs=1e-5)
    assert there["dropped_mass_worst"] == pytest.approx(float(dropped.max()), abs=1e-5)
    shares = selection.log_shares[0].exp() * ~kept
    expected = float(shares.sum(-1).clamp_max(1).mean())
    assert found["dropped_share_at_most"] == pytest.approx(expected, abs=1e-6)
    expected = float(shares.sum(-1).clamp_max(1)[:, -1].mean())
    assert there["dropped_share_at_most"] == pytest.approx(expected, abs=1e-6)


def test_ranks_leave_forced_blocks_out() -> None:
    """The largest share is first, of equals the earlier; sink and diagonal have no place."""
    ranks = ranks_of(np.array([-np.inf, -2.0, -1.0, -2.0, -np.inf], dtype=np.float32))

    assert ranks.tolist() == [0, 2, 1, 3, 0]
    assert ranks_of(np.array([-np.inf], dtype=np.float32)).tolist() == [0]


def test_the_record_is_bounded_and_keeps_the_focus() -> None:
    """A long prompt has every n-th query block recorded, the last and the one in focus among them."""
    heads, blocks, limit = 32, 512, 200_000

    chosen = pick_query_blocks(blocks, heads, 77, limit)

    assert heads * sum(i + 1 for i in chosen) <= limit
    assert {77, blocks - 1} <= set(chosen)
    assert pick_query_blocks(8, heads, 3, limit) == tuple(range(8))
    assert pick_query_blocks(8, heads, 3, 1) == (3, 7)


def test_blocks_cut_the_text_without_loss() -> None:
    """The blocks' pieces add up to the prompt, with special tokens at both ends and without any offsets."""
    text = "αβγδε" * 4
    offsets = [(0, 0), *((i, i + 1) for i in range(20)), (0, 0)]

    for found in (block_chars(offsets, 22, 7, 20), block_chars(None, 22, 7, 20)):
        assert "".join(text[begin:end] for begin, end in found) == text
        assert len(found) == 4


def test_the_page_escapes_the_prompt() -> None:
    """Markup in prompt, model or adapter is shown as text; only the page's own script may run."""
    evil = '</span><script>alert(1)</script><img src=x onerror="alert(2)">&amp;\u202e'
    text = evil + "x" * (TOKENS - len(evil))

    page = render_page(make_explanation(text, model='"><b>m', adapter="</code><script>"), text)

    reader = PageReader()
    reader.feed(page)
    assert reader.shown == text
    assert reader.tags.count("script") == 2
    assert not {"img", "b", "link", "iframe"} & set(reader.tags)
    assert not [name for name in reader.attributes if name.startswith("on") or name in ("src", "href")]
    script = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_without_thinned_layers_says_so() -> None:
    """A rung that leaves everything dense gives a page with the text and no picker."""
    page = render_page(make_explanation(layers=(), dense_layers=(3,)), "x" * TOKENS)

    assert "No layer was thinned" in page
    assert "<select" not in page


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's script is checked with node")
def test_the_page_shows_what_the_record_holds() -> None:
    """What the script reads off the page is the record: kept, share, threshold, rank, votes."""
    explanation = make_explanation()
    page = render_page(explanation, "x" * TOKENS)
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page, flags=re.DOTALL)[0])
    program = f"""
    const page = require({json.dumps(str(SCRIPT))});
    const record = page.readRecord(JSON.parse(require("fs").readFileSync(0, "utf8")));
    const pairs = page.lookedAt(record, null, null), rows = [];
    for (const query of record.recorded) for (const [layer, head] of pairs) for (let b = 0; b <= query; b++)
      rows.push([head, query, b, page.describe(record, layer, query, head, b)]);
    console.log(JSON.stringify({{ rows, votes: page.countKept(record, pairs, record.query_block) }}));
    """

    done = subprocess.run(
        ["node", "-e", program], input=json.dumps(data), capture_output=True, text=True, check=True
    )

    found = json.loads(done.stdout)
    assert found["votes"] == explanation.votes()[0]
    heads = explanation.to_dict()["layers"][0]["heads"]
    for head, query, block, seen in found["rows"]:
        row = heads[head]["query_blocks"][query]
        assert seen["kept"] == (block in row["kept"])
        assert seen["threshold"] == pytest.approx(math.exp(row["log_threshold"]), rel=1e-4)
        if seen["kept"]:
            at = row["kept"].index(block)
            assert (seen["forced"] or "score", seen["rank"]) == (row["why"][at], row["rank"][at])
            if not seen["forced"]:
                assert seen["share"] == pytest.approx(math.exp(row["log_share"][at]), rel=1e-4)


def test_short_query_blocks_are_shown_together_and_counted_apart() -> None:
    """Two query blocks to a row: kept is what either keeps; density and dropped mass are those of each."""
    generator = torch.Generator().manual_seed(3)
    block, rows, tokens = 32, 16, 32 * 5 + 9
    query, key = (torch.randn(1, heads, tokens, 8, generator=generator) for heads in (HEADS, KV_HEADS))
    starts = torch.arange(0, tokens, rows)
    shares = torch.rand(1, HEADS, len(starts), 6, generator=generator).mul(0.3).log()
    own = (starts // block)[:, None]
    shares = shares.masked_fill((torch.arange(6) < 1) | (torch.arange(6) >= own), -math.inf)
    thresholds = Thresholds(torch.tensor([[0.15], [0.2]]).log(), ())
    mask = select_blocks(
        shares,
        thresholds,
        starts=starts,
        q_len=tokens,
        kv_len=tokens,
        q_offset=0,
        block_q=rows,
        block_k=block,
    )
    layer = LayerInfo(3, torch.nn.Identity(), HEADS, KV_HEADS, 8, 8**-0.5)
    cuts = per_head_thresholds(thresholds, starts, HEADS)[..., 0]

    choices = record_choices(Selection(layer, query, key, shares, cuts, mask), range(6), 4)

    single = mask.to_dense()[0]
    for i, kept in enumerate(choices.kept):
        either = single[:, 2 * i : 2 * i + 2].any(dim=1)[:, : i + 1]
        assert kept.tolist() == either.tolist()
    assert choices.density == pytest.approx(mask.density())
    grouped = query.view(1, KV_HEADS, 2, tokens, 8)[..., 4 * block : 5 * block, :]
    logits = grouped @ key[:, :, None].transpose(-1, -2) * layer.scale
    seen = torch.arange(tokens) <= torch.arange(4 * block, 5 * block)[:, None]
    weights = logits.masked_fill(~seen, -math.inf).softmax(dim=-1).view(HEADS, block, tokens)
    token_kept = single[:, 8:10].repeat_interleave(rows, dim=1).repeat_interleave(block, dim=2)[..., :tokens]
    dropped = weights.masked_fill(token_kept, 0.0).sum(dim=-1)
    assert choices.focus.dropped_mass_mean == pytest.approx(float(dropped.mean()), abs=1e-4)
    assert choices.focus.dropped_mass_worst == pytest.approx(float(dropped.max()), abs=1e-4)
