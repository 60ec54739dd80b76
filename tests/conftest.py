"""Before any test imports Triton: without a GPU, its kernels run in its interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

from megatron_prune.device import has_cuda

settings.register_profile("patient", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("patient")
if not has_cuda():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
