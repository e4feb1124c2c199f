"""Triton kernels for NVIDIA and AMD GPUs; they run on CPU tensors in the interpreter only."""
