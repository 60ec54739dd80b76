"""Huge pages under fresh tensors, where whole ones fit; freed memory used again; nothing else changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_prune.kernels.memory import HUGE, c_function, expect_writes

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

HUGE_PAGES = """
import torch
from megatron_prune.kernels.memory import HUGE, expect_writes
def huge_bytes():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))
before = huge_bytes()
plain = torch.empty(16 * HUGE, dtype=torch.uint8).fill_(1)
between = huge_bytes()
fresh = expect_writes(torch.empty(16 * HUGE, dtype=torch.uint8)).fill_(1)
print(between - before, huge_bytes() - between, plain.equal(fresh))
"""
"""Bytes on huge pages that a plain tensor and one that asked for them brought."""


def run(program: str, *arguments: str, **environment: str) -> list[str]:
    """The words that a process of its own prints: another test's freed memory would be used again here."""
    clean = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.check_output([sys.executable, "-c", program, *arguments], text=True, env=clean).split()


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="this system does not give huge pages to those who ask and to nobody else",
)
def test_large_tensors_lie_on_huge_pages() -> None:
    plain, asked, equal = run(HUGE_PAGES)
    assert int(plain) < HUGE
    assert int(asked) >= HUGE
    assert equal == "True"


@pytest.mark.parametrize("x", [torch.zeros(0), torch.ones(3), torch.ones(2 * HUGE), torch.empty(4, device="meta")])
def test_the_tensor_is_returned_as_it_was(x: torch.Tensor) -> None:
    copy = x.clone()
    assert expect_writes(x) is x
    assert x.is_meta or x.equal(copy)


REUSE = """
import resource, sys, torch
from megatron_prune.kernels.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    before = faults()
    for _ in range(8):
        torch.empty(3 * 2**24, dtype=torch.uint8).fill_(1)
print(kept, faults() - before)
"""
"""Faults of eight times 48 MiB; the heap needs up to a dozen of them to settle, hence the last of six rounds."""


def reuse(choice: str, **environment: str) -> tuple[str, int]:
    """What `keep_freed_memory` answered, and the page faults of using memory again."""
    kept, count = run(REUSE, choice, **environment)
    return kept, int(count)


@pytest.mark.skipif(c_function("mallopt") is None, reason="this C library has no mallopt, by which it is asked to keep")
def test_freed_memory_is_used_again() -> None:
    kept, count = reuse("keep")
    assert kept == "True"
    assert count < reuse("give back")[1] / 3


def test_the_users_own_settings_are_left_alone() -> None:
    assert reuse("keep", MALLOC_MMAP_THRESHOLD_="65536")[0] == "False"
