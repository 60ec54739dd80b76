"""The CPU's memory: fewer page faults.

First touching memory costs one page fault every 4 KiB, which takes as long as what is written there: 40% of a learned
mask's forward and backward at 4096 x 4096, a quarter of SparseGPT's factor. Linux gives pages of 2 MiB to those who
ask. And the C library gives every large block back when it is freed, so that each tensor of each training step pays
again: a fifth to a quarter of a step, a tenth of a one-shot method (measured, SmolLM2-135M).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

HUGE = 1 << 21
"""Bytes of a huge page on x86-64 and, with the usual pages of 4 KiB, on Arm."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Settings of glibc's mallopt(3)."""
KEEP_FREE, KEEP_BLOCKS = 2**31 - 1, 2**30
"""Bytes that may be free at the end of the heap; bytes of a block that is taken from the system and given back."""
ALLOCATOR_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def expect_writes(fresh: Tensor) -> Tensor:
    """`fresh` itself, a contiguous tensor nobody has written to yet, with huge pages asked for under it.

    Only a hint: a refusal costs nothing but time, so the answer is not looked at.
    """
    advise = c_function("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if advise is not None and hasattr(mmap, "MADV_HUGEPAGE") and fresh.device.type == "cpu":
        first = -(-fresh.data_ptr() // HUGE) * HUGE
        last = (fresh.data_ptr() + fresh.nbytes) // HUGE * HUGE
        if last > first:
            advise(first, last - first, mmap.MADV_HUGEPAGE)
    return fresh


def keep_freed_memory() -> bool:
    """Let this process use freed memory again instead of giving it back; whether the C library can and was asked to.

    Peaks grew by 2% at most where it was looked at. Who has set glibc's own variables for this is left alone, as are
    other C libraries.
    """
    option = c_function("mallopt", ctypes.c_int, ctypes.c_int)
    if option is None or any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return False
    return bool(option(M_TRIM_THRESHOLD, KEEP_FREE) and option(M_MMAP_THRESHOLD, KEEP_BLOCKS))


@functools.cache
def c_function(name: str, *arguments: Any) -> Callable[..., int] | None:
    """This function of the C library, with an int for result; None where it has none, or elsewhere than on Linux."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
    if function is not None:
        function.argtypes, function.restype = arguments, ctypes.c_int
    return function
