"""Huge pages under fresh tensors, where whole ones fit; freed memory used again; nothing else changes."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prune.kernels import memory
from megatron_prune.kernels.memory import HUGE, c_function, expect_writes, keep_freed_memory

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


SIZE = SETTING.parent / "hpage_pmd_size"


@pytest.mark.skipif(not SIZE.exists(), reason="this system does not tell the size of its huge pages")
def test_a_huge_page_is_as_large_as_the_systems() -> None:
    assert int(SIZE.read_text()) % HUGE == 0 and HUGE == 2 * 1024**2


@pytest.mark.parametrize("offset", [0, 1, HUGE // 2, HUGE - 1])
@pytest.mark.parametrize("size", [0, 1, HUGE, HUGE + 5, 3 * HUGE])
def test_only_whole_pages_inside_the_tensor_are_asked_for(
    offset: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them: the addresses between the first and the last multiple of the size."""
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(memory, "c_function", lambda *_: lambda *given: asked.append(given))
    fresh: Any = SimpleNamespace(device=torch.device("cpu"), data_ptr=lambda: 7 * HUGE + offset, nbytes=size)
    assert expect_writes(fresh) is fresh
    start, end = 7 * HUGE + offset, 7 * HUGE + offset + size
    pages = [page for page in range(12) if start <= page * HUGE and (page + 1) * HUGE <= end]
    assert asked == ([(pages[0] * HUGE, len(pages) * HUGE, mmap.MADV_HUGEPAGE)] if pages else [])


def test_nothing_is_asked_for_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, or where the C library has no such function."""
    monkeypatch.setattr(memory, "c_function", lambda *_: lambda *given: pytest.fail("asked"))
    expect_writes(torch.empty(2 * HUGE, device="meta"))
    monkeypatch.setattr(memory, "c_function", lambda *_: None)
    expect_writes(torch.empty(2 * HUGE))


def test_what_the_c_library_lacks_is_none() -> None:
    assert c_function("no_such_function_anywhere") is None
    found = c_function("abs", ctypes.c_int)
    assert found is None or found(-3) == 3


@pytest.mark.parametrize("answers", [(1, 1), (1, 0), (0, 1)])
def test_memory_is_kept_when_both_settings_are_taken(answers: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc's numbers of M_TRIM_THRESHOLD and M_MMAP_THRESHOLD; the largest int, and a GiB."""
    asked: dict[int, int] = {}

    def mallopt(setting: int, value: int) -> int:
        asked[setting] = value
        return answers[len(asked) - 1]

    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory, "c_function", lambda *_: mallopt)
    assert keep_freed_memory() is (answers == (1, 1))
    assert asked == ({-1: 2147483647, -3: 1073741824} if answers[0] else {-1: 2147483647})
    monkeypatch.setattr(memory, "c_function", lambda *_: None)
    assert keep_freed_memory() is False


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
