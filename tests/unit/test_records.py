"""Records of activations: on disk until they are asked for."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch

from sentei.kernels.scorer.features import RotaryTable
from sentei.pipeline.measure.records import LayerRecord, Records

TABLE = RotaryTable(torch.ones(64, 8), torch.zeros(64, 8))


def make_record(seed: int) -> LayerRecord:
    """One query block of 16 rows over four blocks of keys."""
    generator = torch.Generator().manual_seed(seed)
    return LayerRecord(
        q=torch.randn(1, 2, 1, 16, 8, generator=generator).bfloat16(),
        starts=torch.tensor([48]),
        keys=torch.randn(1, 1, 64, 8, generator=generator).bfloat16(),
        lse=torch.zeros(1, 2, 1, 16),
        mass=torch.rand(1, 2, 1, 16, 4, generator=generator).half(),
        is_asking=torch.tensor([True]),
        table=TABLE,
    )


def test_what_was_added_is_read_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor keeps its type and its values, also by slices and from the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    records = Records([3, 5], TABLE)
    for seed in range(3):
        records.add(5, make_record(seed))

    found = records[5][-1]

    assert len(records[3]) == 0
    assert len(records[5]) == 3
    assert len(records[5][::2]) == 2
    assert all(
        torch.equal(getattr(found, name), getattr(make_record(2), name))
        for name in LayerRecord.__slots__
        if name != "table"
    )
    with pytest.raises(IndexError, match="record 3 of 3"):
        records[5][3]


def test_the_folder_goes_when_the_records_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of gigabytes must not stay behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    records = Records([0], TABLE)
    records.add(0, make_record(0))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1

    del records
    gc.collect()

    assert list(tmp_path.iterdir()) == []


def test_keys_are_pooled_on_demand() -> None:
    """Any form is trained from the same record."""
    record = make_record(0)

    pooled, plain = record.pool_keys(4)

    assert pooled.shape == (1, 1, 16, 8)
    torch.testing.assert_close(pooled[0, 0, 0], record.keys[0, 0, :4].float().mean(dim=0))
    torch.testing.assert_close(plain, pooled)  # the table rotates nothing
