"""What a draw is: published known answers of its keys, the order of patterns, schedules."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_prune.kernels import definition
from megatron_prune.kernels.definition import hash_key, pattern_table, splitmix64

FIRST, SECOND = 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4
"""The first outputs of SplitMix64 from state 0, as published; its state moves on by the golden ratio."""
GOLDEN = 0x9E3779B97F4A7C15
ONES = 0xFFFFFFFF


def test_splitmix64_known_answer() -> None:
    assert [splitmix64(0), splitmix64(GOLDEN)] == [FIRST, SECOND]


def test_keys_are_a_chain_of_splitmix64() -> None:
    """The words of a key, low before high; values count modulo 2^64."""
    assert hash_key(0) == (FIRST & ONES, FIRST >> 32)
    assert hash_key(0, FIRST ^ GOLDEN) == hash_key(-(2**64), (FIRST ^ GOLDEN) - 2**64) == (SECOND & ONES, SECOND >> 32)


def test_key_depends_on_every_value_and_their_order() -> None:
    keys = {hash_key(*values) for values in [(1, 2, 3), (2, 1, 3), (1, 2, 4), (1, 2), (0, 2, 3), (-1, 2, 3)]}
    assert len(keys) == 6
    assert all(0 <= word <= ONES for key in keys for word in key)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 4), (2, 3), (8, 8)])
def test_patterns_are_all_and_in_order(n: int, m: int) -> None:
    kept = [tuple(row.nonzero()[0].tolist()) for row in pattern_table(n, m)]
    assert kept == list(itertools.combinations(range(m), n))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (4, 9)])
def test_other_patterns_are_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"pattern {n}:{m} is not supported: allowed are 1 <= N <= M <= 8"):
        pattern_table(n, m)


def test_schedules_are_linear_and_end_where_they_should() -> None:
    steps = 5
    values = [definition.linear_schedule(4.0, 0.0, step, steps) for step in range(steps)]
    assert values == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert [definition.linear_schedule(4.0, 0.0, step, steps) for step in (5, 7, 100)] == [0.0] * 3
    assert definition.linear_schedule(1.0, 9.0, 0, 1) == definition.linear_schedule(1.0, 9.0, 0, 0) == 1.0
    assert [definition.linear_schedule(1.0, 9.0, step, 2) for step in (0, 1, 2)] == [1.0, 9.0, 9.0]


def test_geometric_schedule_grows_by_equal_factors() -> None:
    values = [definition.geometric_schedule(1.0, 16.0, step, 5) for step in range(5)]
    assert values == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0])


def test_moments_of_the_noise_are_those_of_its_density() -> None:
    """exp(-x - exp(-x)), by the trapezoidal rule."""
    x = np.linspace(-6, 60, 2_000_001)
    density = np.exp(-x - np.exp(-x)) * (x[1] - x[0])
    mean = float((x * density).sum())
    assert mean == pytest.approx(definition.GUMBEL_MEAN, abs=1e-9)
    assert float(((x - mean) ** 2 * density).sum()) ** 0.5 == pytest.approx(definition.GUMBEL_STD, abs=1e-9)


def test_a_draw_is_named_by_all_that_it_has() -> None:
    """And a random start by a step that is the last of 32 bits."""
    assert definition.Draw(1, 2, 3, 4).key() == hash_key(1, 2, 3, 4)
    assert definition.INITIAL_STEP == 0xFFFFFFFF
    assert set(definition.SCHEDULES) == {"linear", "geometric"}
    assert definition.SCHEDULES["linear"](2.0, 8.0, 1, 3) == 5.0
    assert definition.SCHEDULES["geometric"](2.0, 8.0, 1, 3) == pytest.approx(4.0)
