"""Libraries that other libraries load on the way, and that cost more than they are worth here."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import sys
import tempfile
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


@contextlib.contextmanager
def without_compiler_folder() -> Iterator[None]:
    """PyTorch's compiler makes a folder for its cache as soon as it is imported; an empty one of now goes again."""
    folder = _compiler_folder()
    was_there = folder is None or os.path.lexists(folder)
    try:
        yield
    finally:
        if folder is not None and not was_there:
            with contextlib.suppress(OSError):  # it is not there, or something is in it
                os.rmdir(folder)


def _compiler_folder() -> str | None:
    try:
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError):  # a user without a name
        return None
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")
