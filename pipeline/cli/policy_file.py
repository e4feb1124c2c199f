"""A policy file as text, and held against the adapter that it is meant for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sentei.pipeline.cli.extras import check_extras

if TYPE_CHECKING:
    from sentei.policies.schema.policy import Policy


def read_policy_file(path: Path) -> str:
    """The text of a policy file; ValueError for one that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8 text") from error


def check_coverage(policy: Policy, text: str, source: str, adapter: Path) -> None:
    """PolicyError where the adapter's ladder lacks a rung, or does not cover a slice to its end.

    Reading an adapter takes the extra `train`; MissingExtraError without it.
    """
    check_extras("train")
    from sentei.kernels.hf.adapter import read_ladder
    from sentei.policies.review.coverage import find_uncovered
    from sentei.policies.schema.load import PolicyError, PolicyFault, find_line
    from sentei.policies.schema.rules import dotted_path

    rungs = [rung for rung in read_ladder(adapter).rungs if not rung.is_dense]
    uncovered = find_uncovered(policy, {rung.id: rung.verified_tokens for rung in rungs})
    faults = []
    for item in uncovered:
        path = ("spec", *item.path)
        faults.append(PolicyFault(source, find_line(text, path), dotted_path(path), item.value, item.message))
    if faults:
        raise PolicyError(faults)
