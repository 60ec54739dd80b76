"""Libraries that other libraries load on the way, and that cost more than they are worth here."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

from megatron_prune.device import has_cuda
from megatron_prune.kernels.compiled import cache_directory

TORCH_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch's compiler keeps what it makes; torch reads it from the environment."""


def keep_temporary_folder_clean() -> None:
    """Importing torch's compiler makes its cache, by default in the temporary folder: let it be beside our own."""
    os.environ.setdefault(TORCH_CACHE, str(cache_directory() / "torch"))


@contextlib.contextmanager
def without_triton() -> Iterator[None]:
    """While active, where no GPU is used, Triton counts as not installed: 70 MB of compiler for GPUs.

    What is imported meanwhile finds its own way without; Triton itself can still be imported afterwards.
    """
    if "triton" in sys.modules or has_cuda():  # loaded already, hidden already, or of use
        yield
        return
    with _instead(triton=None):
        yield


@contextlib.contextmanager
def without_gpu_kernels() -> Iterator[None]:
    """While active, where no GPU is used, these count as not installed: megatron-core would take their Adam."""
    if has_cuda():
        yield
        return
    with _instead(transformer_engine=None, apex=None):
        yield


@contextlib.contextmanager
def without_megatron() -> Iterator[None]:
    """While active, what is imported finds no megatron-core: libraries that would change its classes leave them."""
    loaded = [name for name in sys.modules if name.startswith("megatron.")]
    with _instead(**dict.fromkeys(["megatron", *loaded])), _own_loading():
        yield


@contextlib.contextmanager
def _own_loading() -> Iterator[None]:
    """megatron-core 0.19 puts its own loading of stored tensors, as data alone, in the place of torch's.

    Copies of tensors name it, and would find it gone.
    """
    import torch

    replaced = torch.storage._load_from_bytes
    if replaced.__module__.startswith("megatron."):
        setattr(torch.storage, "_load_from_bytes", load_from_bytes)
    try:
        yield
    finally:
        setattr(torch.storage, "_load_from_bytes", replaced)


def load_from_bytes(stored: bytes) -> Any:
    """What `torch.storage._load_from_bytes` gives, of data alone."""
    import torch

    return torch.load(io.BytesIO(stored), weights_only=True)


@contextlib.contextmanager
def hollow_triton() -> Iterator[None]:
    """While active, where no GPU is used, `import triton` gives a shell: kernels can be declared and not run."""
    if has_cuda():
        yield
        return
    language = types.ModuleType("triton.language")
    setattr(language, "constexpr", object)
    shell = types.ModuleType("triton")
    setattr(shell, "language", language)
    setattr(shell, "jit", lambda function=None, **_: function if function else lambda kernel: kernel)
    with _instead(**{"triton": shell, "triton.language": language}):
        yield


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """While active, where no GPU is used, `torch.compile` leaves functions as they are.

    megatron-core decorates with it what only its inference on GPUs calls, and loading the compiler takes a second.
    """
    if has_cuda():
        yield
        return
    import torch

    compiler = torch.compile
    setattr(torch, "compile", lambda function=None, **_: function if function else lambda decorated: decorated)
    try:
        yield
    finally:
        setattr(torch, "compile", compiler)


@contextlib.contextmanager
def _instead(**modules: types.ModuleType | None) -> Iterator[None]:
    """While active these stand for modules of their names; None: there is none."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)
