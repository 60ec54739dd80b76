"""Huge pages under large fresh tensors of the CPU.

First touching memory costs one page fault every 4 KiB, which takes as long as what is written there: 40% of a learned
mask's forward and backward at 4096 x 4096, a quarter of SparseGPT's factor. Linux gives pages of 2 MiB to those who
ask.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

HUGE = 1 << 21
"""Bytes of a huge page on x86-64 and, with the usual pages of 4 KiB, on Arm."""


def expect_writes(fresh: Tensor) -> Tensor:
    """`fresh` itself, a contiguous tensor nobody has written to yet, with huge pages asked for under it.

    Only a hint: a refusal costs nothing but time, so the answer is not looked at.
    """
    advise = _madvise() if fresh.device.type == "cpu" else None
    if advise is not None:
        first = -(-fresh.data_ptr() // HUGE) * HUGE
        last = (fresh.data_ptr() + fresh.nbytes) // HUGE * HUGE
        if last > first:
            advise(first, last - first, mmap.MADV_HUGEPAGE)
    return fresh


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    advise.restype = ctypes.c_int
    return advise  # type: ignore[no-any-return]
