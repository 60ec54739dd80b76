"""Counter-based noise: published known answers, distribution, and independence of places."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_prune.kernels.philox import gumbel_from_bits, gumbel_noise, philox4x32

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    """The vectors published with Salmon et al. 2011: zeros, ones, digits of pi."""
    assert tuple(philox4x32(torch.tensor(counter), key).tolist()) == expected


def test_extreme_words_are_finite_and_exact() -> None:
    """u = 2^-25 and u = 1 - 2^-25, which fp32 would round to 1."""
    low, high = gumbel_from_bits(torch.tensor([0, ONES])).tolist()
    assert low == pytest.approx(-math.log(25 * math.log(2)), rel=1e-6)
    assert high == pytest.approx(-math.log(-math.log1p(-(2.0**-25))), rel=1e-6)


def test_distribution() -> None:
    """Mean, variance and the largest distance to the Gumbel distribution function over 600,000 draws."""
    noise = gumbel_noise(torch.arange(100_000), 6, (7, 9)).double().flatten()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.006)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    exact = torch.exp(-torch.exp(-noise.sort().values))
    empirical = torch.arange(1, len(noise) + 1) / len(noise)
    assert (exact - empirical).abs().max().item() < 1.63 / math.sqrt(len(noise))  # Kolmogorov-Smirnov, 1%


def test_patterns_and_neighbours_are_uncorrelated() -> None:
    noise = gumbel_noise(torch.arange(50_000), 6, (1, 2)).double()
    correlation = torch.corrcoef(torch.cat((noise, noise.roll(1, 0)), dim=1).T) - torch.eye(12)
    assert correlation.abs().max().item() < 0.025


def test_block_index_uses_both_counter_words() -> None:
    """Beyond 2^32 blocks the high word counts on instead of repeating the first numbers."""
    near, far = gumbel_noise(torch.tensor([5, 5 + 2**31]), 6, (1, 2))
    assert not torch.equal(near, far)
