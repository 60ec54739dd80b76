"""Libraries that other libraries load on the way, and that cost more than they are worth here."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import torch

from megatron_prune.kernels.compiled import cache_directory

TORCH_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch's compiler keeps what it makes; torch reads it from the environment."""


def keep_temporary_folder_clean() -> None:
    """Importing torch's compiler makes its cache, by default in the temporary folder: let it be beside our own."""
    os.environ.setdefault(TORCH_CACHE, str(cache_directory() / "torch"))


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
