"""Statistics against float64, and whatever order the windows and ranks come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.statistics.activations import InputNorm
from megatron_prune.statistics.hessian import Hessian


def windows(width: int, dtype: torch.dtype, count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return [(torch.randn(64, width, generator=generator) @ mix).to(dtype) for _ in range(count)]


def collected(kind: type, parts: list[Tensor]) -> Any:
    statistic = kind(parts[0].shape[1])
    for x in parts:
        statistic.update(x)
    return statistic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [24, 300, 520])
def test_against_float64(width: int, dtype: torch.dtype) -> None:
    """Widths of less than a tile, and of several with a remainder."""
    parts = windows(width, dtype)
    x = torch.cat(parts).double()
    hessian = collected(Hessian, parts).value()
    expected = 2 * x.t() @ x / len(x)
    torch.testing.assert_close(hessian.double(), expected, rtol=0, atol=4e-6 * float(expected.max()))
    assert hessian.equal(hessian.t())
    norm = collected(InputNorm, parts).value()
    torch.testing.assert_close(norm, x.norm(dim=0).float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", [InputNorm, Hessian])
def test_order_and_ranks_do_not_matter(kind: type) -> None:
    """Bit for bit: windows backwards, or two ranks summed."""
    parts = windows(96, torch.bfloat16)
    once = collected(kind, parts)
    assert once.value().equal(collected(kind, parts[::-1]).value())
    ranks = [collected(kind, parts[::2]), collected(kind, parts[1::2])]
    for mine, theirs in zip(ranks[0].tensors(), ranks[1].tensors(), strict=True):
        assert mine.dtype == torch.float64
        mine += theirs
    assert once.value().equal(ranks[0].value())
    assert ranks[0].tokens == 5 * 64


def test_input_norm_does_not_depend_on_the_shard() -> None:
    parts = windows(96, torch.float32)
    halves = [collected(InputNorm, [x[:, part] for x in parts]).value() for part in (slice(37), slice(37, None))]
    assert collected(InputNorm, parts).value().equal(torch.cat(halves))


def test_of_no_tokens_no_input_counts_more_than_another() -> None:
    """An expert may get none: methods then prune it by magnitude."""
    for statistic in (Hessian(4), InputNorm(4)):
        statistic.update(torch.zeros(0, 4))
        assert int(statistic.tokens) == 0
    hessian, norm = Hessian(4), InputNorm(4)
    assert torch.equal(hessian.value(), torch.eye(4)) and torch.equal(norm.value(), torch.ones(4))
    hessian.update(torch.zeros(1, 4))
    norm.update(torch.zeros(1, 4))
    assert not hessian.value().any() and not norm.value().any()


def test_precision_setting_is_left_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    collected(Hessian, windows(24, torch.bfloat16))
    assert torch.get_float32_matmul_precision() == before
    x = 1 + 2.0**-12 * torch.eye(64)
    assert (x @ torch.eye(64)).equal(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(2048, 16), (4096, 192), (4096, 576)])
def test_hessian_does_not_depend_on_threads(
    dtype: torch.dtype, tokens: int, width: int, use_threads: Callable[[int], None]
) -> None:
    """One process has all of them and several have few: the decision must be the same."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    for threads in (1, 2, 8):
        use_threads(threads)
        statistic = Hessian(width)
        statistic.update(x)
        found.append(statistic.value())
    assert all(each.equal(found[0]) for each in found)


@pytest.mark.parametrize("width", [1, 255, 257, 600])
def test_hessian_is_the_upper_triangle_mirrored(width: int) -> None:
    """Whatever a product left below the diagonal: a matrix and its rounding must be symmetric for the factor."""
    statistic = Hessian(width)
    statistic.tokens += 2
    statistic._gram += torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    upper = statistic._gram.float().triu()
    assert statistic.value().equal(upper + upper.triu(1).t())
