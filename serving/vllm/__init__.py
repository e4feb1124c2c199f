"""Sentei inside vLLM: the entry point `vllm.general_plugins`, which vLLM loads in each of its processes."""

OPTIONS = "sentei"  # the key of vLLM's `additional_config` under which our options travel
BACKEND = "sentei.serving.vllm.backend.SenteiBackend"


def register() -> None:
    """Put our attention backend in the place of the CPU's; without our options it is the stock one."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # The CPU platform takes this path whatever backend was asked for; the registry's override is the way in.
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
