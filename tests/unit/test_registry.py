"""Which backend is picked, and what the others say."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sentei.kernels.ops import flex, registry
from sentei.kernels.ops.attention import attend
from sentei.kernels.ops.block_mask import BlockMask
from sentei.kernels.ops.errors import BackendError
from sentei.kernels.ops.native import build
from sentei.kernels.ops.registry import Request, pick_backend

PREFILL = Request("cpu", torch.float32, 512)


@pytest.fixture(autouse=True)
def _compiler_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_why_no_cpu_flex", lambda: None)
    monkeypatch.setattr(registry, "_broken", {})
    build.load_native.cache_clear()


def test_the_native_program_comes_first() -> None:
    """Prefill and decode on the CPU go to Sentei's own program."""
    assert pick_backend(PREFILL).backend.name == "native"
    assert pick_backend(Request("cpu", torch.float32, 1)).backend.name == "native"


def test_without_native_prefill_takes_flex_and_decode_takes_gather() -> None:
    """Where the native program refuses, long calls go to FlexAttention and few rows to gather."""
    prefill, decode = replace(PREFILL, block_k=48), Request("cpu", torch.float32, 1, block_k=48)

    assert pick_backend(prefill).backend.name == "flex"
    assert pick_backend(decode).backend.name == "gather"
    assert pick_backend(prefill).refusals == (
        ("native", "it takes key blocks of a multiple of 32 tokens, not 48"),
    )


def test_native_takes_neither_half_precision_nor_another_device() -> None:
    """What the program has no code for is refused by name."""
    with pytest.raises(BackendError, match="'native' refuses: it takes float32 or bfloat16, not torch"):
        pick_backend(Request("cpu", torch.float16, 512), "native")
    with pytest.raises(BackendError, match="'native' refuses: it is a CPU program"):
        pick_backend(Request("cuda", torch.float32, 512), "native")


def test_flex_refuses_the_lse_on_the_cpu() -> None:
    """A call that wants the LSE goes to gather, and the choice tells why."""
    choice = pick_backend(Request("cpu", torch.float16, 512, needs_lse=True))

    assert choice.backend.name == "gather"
    assert choice.refusals[1] == ("flex", "compiled FlexAttention cannot return the LSE on the CPU")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C++ compiler flex refuses, and says what to install."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(registry, "_why_no_cpu_flex", registry.why_no_compiler)

    choice = pick_backend(PREFILL)

    assert choice.backend.name == "gather"
    for _, reason in choice.refusals:
        assert "'no-such-compiler' is not on the path (install g++" in reason
    with pytest.raises(BackendError, match="backend 'flex' refuses: it needs a C\\+\\+ compiler"):
        pick_backend(PREFILL, "flex")


def test_an_unknown_name_lists_the_known() -> None:
    """A typo is an error, never a default."""
    known = "auto, native, triton, flex, gather, reference"
    with pytest.raises(BackendError, match=f"'flux' is unknown; choose {known}"):
        pick_backend(PREFILL, "flux")


def test_triton_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU triton is first; CPU tensors need the interpreter; without the package it says so."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(registry, "find_spec", lambda name: object())

    assert pick_backend(Request("cuda", torch.bfloat16, 512)).backend.name == "triton"
    with pytest.raises(BackendError, match=r"'triton' refuses: it runs on GPUs.*TRITON_INTERPRET=1"):
        pick_backend(PREFILL, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert pick_backend(PREFILL, "triton").backend.name == "triton"
    assert pick_backend(PREFILL).backend.name == "native"
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="the package triton, which is not installed"):
        pick_backend(PREFILL, "triton")


def test_softcap_and_sinks_pass_flex_over() -> None:
    """What flex was not compiled for goes to gather."""
    for request in (replace(PREFILL, needs_softcap=True), replace(PREFILL, needs_sinks=True)):
        assert pick_backend(request).backend.name == "gather"


def test_a_failed_compile_falls_back_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer still comes, from gather; the reason is told once, and stays with the registry."""

    def fail(signature: flex.Signature) -> flex.Program:
        raise RuntimeError("g++: out of memory\nand more")

    monkeypatch.setattr(flex, "_compile", fail)
    monkeypatch.setattr(flex, "_programs", {})
    q = torch.randn(1, 2, 70, 32)
    mask = BlockMask.causal(70, block_k=16)

    with pytest.warns(
        RuntimeWarning, match="'flex' is off for this process, it failed here: RuntimeError: g\\+\\+"
    ):
        out, _ = attend(q, q, q, mask)

    assert torch.equal(out, attend(q, q, q, mask, backend="gather")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(q, q, q, mask)
    assert pick_backend(replace(PREFILL, block_k=16)).refusals[1][1].startswith("it failed here")


def test_a_failed_build_leaves_the_answer_to_flex(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that fails is told once, with its own words, and another backend answers."""
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("SENTEI_CACHE", str(tmp_path))
    build.load_native.cache_clear()
    q = torch.randn(1, 2, 70, 32)

    with pytest.warns(RuntimeWarning, match="'native' is off for this process.*exit code 1: no space left"):
        assert not registry.is_native_usable("cpu", 64)

    assert not registry.is_native_usable("cpu", 64)
    assert pick_backend(PREFILL).refusals[0][1].startswith("it failed here: BackendError")
    assert attend(q, q, q, BlockMask.causal(70), backend="gather")[1] is None
    assert list((tmp_path / "native").iterdir()) == []


def test_a_cache_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No program is loaded from a folder that somebody else can write."""
    monkeypatch.setenv("SENTEI_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)

    with pytest.raises(BackendError, match="belongs to another user: set SENTEI_CACHE"):
        build.cache_folder()


def test_a_backend_asked_for_by_name_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who names a backend gets it, or its error."""

    def fail(signature: flex.Signature) -> flex.Program:
        raise RuntimeError("no")

    monkeypatch.setattr(flex, "_compile", fail)
    monkeypatch.setattr(flex, "_programs", {})
    q = torch.randn(1, 2, 70, 32)

    with pytest.raises(RuntimeError, match="no"):
        attend(q, q, q, BlockMask.causal(70), backend="flex")
