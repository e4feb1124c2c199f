"""Adapters on disk: what is written comes back, and only onto the model it belongs to."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sentei.kernels.hf.adapter import (
    LADDER_FILE,
    MANIFEST_FILE,
    SCORER_FILE,
    load_adapter,
    new_adapter,
    save_adapter,
    save_ladder,
    seal_adapter,
)
from sentei.kernels.hf.ladder import DENSE, Ladder, Rung, Verified
from sentei.kernels.hf.models import AdapterError, fingerprint
from tests.fakes_models import make_gemma, make_llama
from tests.trial_ladders import uncalibrated_ladder


def test_an_adapter_survives_the_disk(tmp_path: Path) -> None:
    """Weights, thresholds and verified figures come back as they were."""
    model = make_llama()
    adapter = new_adapter(model, "tiny", rank=4)
    verified = Verified(0.01, 0.2, 0.003, (-0.001, 0.007), 0.2)
    rung = Rung("mild", {0: ((0.1,), (0.2,)), 1: ((0.3,), (0.4,))}, 0.05, 256, verified)
    with torch.no_grad():
        adapter.scorers[1].query_map.normal_()

    save_adapter(adapter.with_ladder(Ladder((Rung(DENSE), rung), ())), tmp_path)
    loaded = load_adapter(tmp_path, model)

    assert loaded.ladder.find("mild") == rung
    assert replace(loaded.manifest, files={}) == adapter.manifest
    torch.testing.assert_close(loaded.scorers[1].query_map, adapter.scorers[1].query_map)
    assert {path.name for path in tmp_path.iterdir()} == {SCORER_FILE, LADDER_FILE, MANIFEST_FILE}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize("other", [make_gemma, lambda: make_llama(seed=1)])
def test_an_adapter_of_another_model_is_refused_by_name(tmp_path: Path, other) -> None:  # type: ignore[no-untyped-def]
    """Another architecture, or the same with other weights, is told whose adapter this is."""
    save_adapter(new_adapter(make_llama(), "tiny-llama"), tmp_path)

    with pytest.raises(AdapterError, match=r"belongs to model 'tiny-llama'.*loaded onto"):
        load_adapter(tmp_path, other())


def test_loading_in_another_precision_is_the_same_model() -> None:
    """The fingerprint knows weights, not the precision that a bf16 checkpoint was loaded in."""
    half = make_llama().to(torch.bfloat16)
    full = make_llama()
    full.load_state_dict(half.state_dict())

    assert fingerprint(half, "x").weights_sha256 == fingerprint(full, "x").weights_sha256


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (MANIFEST_FILE, None, "is no adapter"),
        (MANIFEST_FILE, "{", "is not JSON"),
        (MANIFEST_FILE, '{"format": 99}', "format is 99"),
        (MANIFEST_FILE, b"\xff", "is not JSON"),
        (LADDER_FILE, '{"rungs": []}', "ladder.json is not the file that was sealed"),
        (SCORER_FILE, "zeroed", "scorer.safetensors is not the file that was sealed"),
        (SCORER_FILE, None, "has no scorer.safetensors"),
    ],
)
def test_a_broken_folder_says_what_is_broken(
    tmp_path: Path, name: str, text: str | bytes | None, message: str
) -> None:
    """Each missing or damaged file has its own message."""
    model = make_llama()
    save_adapter(new_adapter(model, "tiny"), tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path, model)


def test_a_ladder_that_is_broken_is_said_even_if_it_is_sealed(tmp_path: Path) -> None:
    """A seal says that a file was not changed, not that it is any good."""
    model = make_llama()
    save_adapter(new_adapter(model, "tiny"), tmp_path)
    (tmp_path / LADDER_FILE).write_text('{"rungs": []}')
    seal_adapter(tmp_path)

    with pytest.raises(AdapterError, match="the ladder is broken"):
        load_adapter(tmp_path, model)


def test_an_adapter_without_hashes_names_the_command_that_gives_it_some(tmp_path: Path) -> None:
    """A folder of before is refused until somebody says that these are the right files."""
    model = make_llama()
    save_adapter(new_adapter(model, "tiny"), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    del manifest["files"]
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))

    with pytest.raises(AdapterError, match=f"not sealed.*sentei seal {tmp_path}"):
        load_adapter(tmp_path, model)
    seal_adapter(tmp_path)

    assert load_adapter(tmp_path, model).digest != ""


def test_the_digest_names_scorers_ladder_and_model(tmp_path: Path) -> None:
    """Saved twice it is the same; another ladder, other weights or another model make another one."""
    model, digests = make_llama(), list[str]()
    adapter = new_adapter(model, "tiny", rank=4)
    for folder in ("a", "b"):
        digests.append(save_adapter(adapter, tmp_path / folder).digest)
    save_ladder(uncalibrated_ladder(adapter, {"mild": 0.25}), tmp_path / "a")
    digests.append(load_adapter(tmp_path / "a", model).digest)
    with torch.no_grad():
        adapter.scorers[0].query_map.fill_(1.0)
    digests.append(save_adapter(adapter, tmp_path / "b").digest)
    digests.append(save_adapter(new_adapter(make_llama(seed=1), "tiny", rank=4), tmp_path / "c").digest)

    assert digests[0] == digests[1]
    assert len(set(digests[1:])) == 4


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """A NaN in the file is found on loading, not while serving."""
    model = make_llama()
    adapter = new_adapter(model, "tiny")
    with torch.no_grad():
        adapter.scorers[0].key_map[0, 0, 0] = float("inf")
    save_adapter(adapter, tmp_path)

    with pytest.raises(AdapterError, match=r"0\.key_map is missing or not finite"):
        load_adapter(tmp_path, model)


def test_single_keys_without_steps_for_their_bytes_are_refused(tmp_path: Path) -> None:
    """An adapter of before 2026-11-28: its bytes would be none, or others in each text."""
    model = make_llama()
    save_adapter(new_adapter(model, "tiny", form="low_rank", pool_tokens=1), tmp_path)
    weights = {k: v for k, v in load_file(tmp_path / SCORER_FILE).items() if not k.endswith("key_steps")}
    save_file(weights, tmp_path / SCORER_FILE)
    seal_adapter(tmp_path)

    with pytest.raises(AdapterError, match=r"0\.key_steps is missing or not finite.*distill again"):
        load_adapter(tmp_path, model)


def test_a_ladder_must_start_dense_and_repeat_no_id() -> None:
    """Rung 0 is dense, always."""
    with pytest.raises(AdapterError, match="first must be 'dense'"):
        Ladder((Rung("mild"),), ())
    with pytest.raises(AdapterError, match="no id may repeat"):
        Ladder((Rung(DENSE), Rung("mild"), Rung("mild")), ())


def test_an_uncalibrated_ladder_has_one_threshold_everywhere() -> None:
    """It serves trials before calibration and claims no bound."""
    adapter = new_adapter(make_llama(), "tiny")

    rung = uncalibrated_ladder(adapter, {"mild": 0.25}).find("mild")

    assert rung.thresholds == {0: ((0.25,), (0.25,)), 1: ((0.25,), (0.25,))}
    assert rung.verified is None
    assert json.loads(json.dumps(rung.bound_dropped_mass)) == 1.0


@pytest.mark.parametrize("rows", [8, 48, 128])
def test_query_blocks_that_do_not_fit_into_key_blocks_are_refused(rows: int) -> None:
    """The message names both sizes, the least there is, and the option."""
    adapter = new_adapter(make_llama(), "tiny")
    ladder = Ladder(uncalibrated_ladder(adapter, {"mild": 0.25}).rungs, (), rows)

    with pytest.raises(AdapterError, match=rf"query_block_tokens is {rows}, .* blocks of 64; .* at least 16"):
        adapter.with_ladder(ladder)


def test_a_ladder_of_before_query_blocks_keeps_those_it_was_calibrated_for(tmp_path: Path) -> None:
    """A file without the size is read with query blocks as long as the adapter's key blocks."""
    model = make_llama()
    adapter = new_adapter(model, "tiny", block_tokens=32)
    save_adapter(adapter.with_ladder(uncalibrated_ladder(adapter, {"mild": 0.25})), tmp_path)
    data = json.loads((tmp_path / LADDER_FILE).read_text())
    assert data.pop("query_block_tokens") == 32
    sizes = list[int]()
    for size in ({}, {"query_block_tokens": 16}):
        (tmp_path / LADDER_FILE).write_text(json.dumps(data | size))
        seal_adapter(tmp_path)
        sizes.append(load_adapter(tmp_path, model).ladder.query_block_tokens)

    assert sizes == [32, 16]
