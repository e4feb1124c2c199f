"""What the C library does with memory that a pass frees: it keeps it for the next layer.

By default glibc gives the end of its heap back to the operating system when it is free, and takes it again a
moment later: layers whose temporary tensors are some megabytes each paid a page fault per 4 KiB of them. How
often depends on what happens to lie at the end of the heap: none of them in one pass, 424,000 in another that
computes the same (docs/measured/2026-11-28.md).
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 256 << 20  # free at the end of the heap before any of it is given back
# Longer pieces come from the operating system and go back to it each time: the most that mallopt(3) takes.
# It has to be told, because what mallopt is told of one threshold ends glibc's own choice of the other.
_LONG_BYTES = 32 << 20


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for the whole process; False where it is not glibc, or told otherwise.

    The environment's MALLOC_* and GLIBC_TUNABLES go before us, and so does another allocator, which has no
    use for this.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ)
    if told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LONG_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
