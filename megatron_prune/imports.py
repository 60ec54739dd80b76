"""Libraries that other libraries load on the way, and that cost more than they are worth here."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_triton() -> Iterator[None]:
    """While active, on a machine without CUDA, Triton counts as not installed: 70 MB of compiler for GPUs.

    What is imported meanwhile finds its own way without; Triton itself can still be imported afterwards.
    """
    if "triton" in sys.modules or torch.cuda.is_available():  # loaded already, hidden already, or of use
        yield
        return
    sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["triton"]
