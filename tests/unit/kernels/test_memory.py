"""Huge pages under fresh tensors: asked for where whole ones fit, and nothing else changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_prune.kernels.memory import HUGE, expect_writes

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes() -> int:
    """Of this process, that lie on huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="this system does not give huge pages to those who ask and to nobody else",
)
def test_large_tensors_lie_on_huge_pages() -> None:
    before = huge_bytes()
    plain = torch.empty(16 * HUGE, dtype=torch.uint8).fill_(1)
    assert huge_bytes() - before < HUGE
    fresh = expect_writes(torch.empty(16 * HUGE, dtype=torch.uint8)).fill_(1)
    assert huge_bytes() - before >= HUGE
    assert plain.equal(fresh)


@pytest.mark.parametrize("x", [torch.zeros(0), torch.ones(3), torch.ones(2 * HUGE), torch.empty(4, device="meta")])
def test_the_tensor_is_returned_as_it_was(x: torch.Tensor) -> None:
    copy = x.clone()
    assert expect_writes(x) is x
    assert x.is_meta or x.equal(copy)
