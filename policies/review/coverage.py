"""Whether a ladder covers what a policy sends to it: the rungs, and the lengths they were verified at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sentei.policies.review.advice import Advice
from sentei.policies.schema.budget import rungs_in_reach
from sentei.policies.schema.policy import Policy
from sentei.policies.schema.sections import Slice


def find_uncovered(policy: Policy, verified_tokens: Mapping[str, int | None]) -> tuple[Advice, ...]:
    """Every rung that the ladder lacks, and every routed slice longer than what a rung was verified at.

    `verified_tokens` has the ladder's rungs, each with the longest prompt that it was verified at; None is a
    ladder that names none, which covers nothing. Past that length a rung runs dense, so what is proven of
    such a slice would be of dense in part.
    """
    return (*_missing_rungs(policy, verified_tokens), *_long_slices(policy, verified_tokens))


def _missing_rungs(policy: Policy, verified_tokens: Mapping[str, int | None]) -> Iterator[Advice]:
    for index, rung in enumerate(policy.spec.ladder):
        if rung.id not in verified_tokens:
            known = ", ".join(verified_tokens) or "none"
            yield Advice(("ladder", index, "id"), rung.id, f"is no rung of the adapter; it has {known}")


def _long_slices(policy: Policy, verified_tokens: Mapping[str, int | None]) -> Iterator[Advice]:
    for index, item in enumerate(policy.spec.slices.buckets):
        if item.is_pinned:
            continue
        lengths = {
            rung: verified_tokens[rung] or 0 for rung in _rungs_of(policy, item) if rung in verified_tokens
        }
        if not lengths:
            continue
        rung = min(lengths, key=lambda name: lengths[name])
        if item.range[1] - 1 > lengths[rung]:
            path = ("slices", "buckets", index, "range")
            yield Advice(path, list(item.range), _message(item, rung, lengths[rung]))


def _rungs_of(policy: Policy, item: Slice) -> tuple[str, ...]:
    """The rungs that this slice may come to, within its own limit."""
    place = policy.rung_ids.index
    most = len(policy.rung_ids) - 1 if item.max_rung is None else place(item.max_rung)
    return tuple(dict.fromkeys(policy.rung_ids[min(place(rung), most)] for rung in rungs_in_reach(policy)))


def _message(item: Slice, rung: str, verified: int) -> str:
    low, high = item.range[0], item.range[1] - 1
    text = f'slice "{item.id}" takes prompts of {low:,} to {high:,} tokens, but rung "{rung}"'
    command = f"sentei calibrate --tokens {high}"
    if not verified:
        return f"{text} names no length that it was verified at; calibrate again: {command}"
    longer = f"calibrate on longer text ({command})"
    text += f" was verified up to {verified:,}, and runs dense beyond"
    if verified < low:
        return f"{text}; pin the slice (pin: control), or {longer}"
    return f"{text}; end the slice at {verified + 1} and pin what is longer (pin: control), or {longer}"
