"""Targets as users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.decision.target import MAX_M, NM, Budget, Shape, Unstructured, parse_any_target, parse_target
from megatron_prune.errors import UserError
from megatron_prune.kernels.selection import pruned_count


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2:4", NM(2, 4)),
        (" 1 : 4 ", NM(1, 4)),
        ("0.5", Unstructured(0.5)),
        (0.5, Unstructured(0.5)),
        ({"n": 2, "m": 4}, NM(2, 4)),
        ({"sparsity": 0.7}, Unstructured(0.7)),
        (NM(4, 8), NM(4, 8)),
    ],
)
def test_written_forms(written: object, meant: object) -> None:
    assert parse_target(written) == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("num_layers=24", Shape(num_layers=24)),
        ("ffn-hidden-size = 1152, num_attention_heads=6", Shape(ffn_hidden_size=1152, num_attention_heads=6)),
        ({"hidden_size": 432}, Shape(hidden_size=432)),
        ("parameters=100M", Budget(100_000_000)),
        ("parameters=1.1B", Budget(1_100_000_000)),
        ("kv_cache_bytes=10K", Budget(10_000, "kv_cache_bytes")),
        ({"forward_flops": "2G"}, Budget(2_000_000_000, "forward_flops")),
        (Budget(7), Budget(7)),
    ],
)
def test_sizes_of_a_smaller_model(written: object, meant: object) -> None:
    assert parse_any_target(written) == meant
    assert parse_any_target(str(meant)) == meant
    with pytest.raises(UserError, match="a pattern of weights is needed"):
        parse_target(written)


@pytest.mark.parametrize("written", ["num_layers=0", "num_layers=-1", "ffn_hidden_size=1.5", "num_layer=3", "a=b,c"])
def test_impossible_sizes(written: object) -> None:
    with pytest.raises(UserError, match="give"):
        parse_any_target(written)


@pytest.mark.parametrize(
    "written", ["4:4", "0:4", "5:4", "2:32", "1.0", "0", "-0.5", "nan", "inf", 1.5, {"n": 2.0, "m": 4}]
)
def test_impossible_targets(written: object) -> None:
    with pytest.raises(UserError, match="not possible"):
        parse_target(written)


@pytest.mark.parametrize("written", ["", "2:4:8", "half", "2/4", {"n": 2}, {}, None, ["2:4"]])
def test_not_understood(written: object) -> None:
    with pytest.raises(UserError, match="not understood; give"):
        parse_target(written)


def test_yaml_reads_an_unquoted_pattern_as_minutes() -> None:
    """YAML 1.1 reads 2:4 as 2 * 60 + 4; the message says what to write instead."""
    with pytest.raises(UserError, match="quotes"):
        parse_target(124)


@given(st.integers(2, MAX_M).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))))
def test_patterns_round_trip(pattern: tuple[int, int]) -> None:
    target = NM(*pattern)
    assert parse_target(str(target)) == target
    assert target.density == pattern[0] / pattern[1]


@given(st.floats(0.0, 1.0, exclude_min=True, exclude_max=True))
def test_sparsities_round_trip(sparsity: float) -> None:
    assert parse_target(str(Unstructured(sparsity))) == Unstructured(sparsity)


def test_width_must_divide() -> None:
    NM(2, 4).check(576)
    Unstructured(0.5).check(577)
    with pytest.raises(UserError, match="577 inputs are not a multiple of 4"):
        NM(2, 4).check(577, "decoder.layers.0.mlp.linear_fc1.weight")


def test_count_follows_the_written_decimal() -> None:
    assert 100 * 0.29 < 29
    assert pruned_count(100, 0.29) == 29
    assert pruned_count(7, 0.5) == 3
