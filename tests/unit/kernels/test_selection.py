"""Exact counts and the tie rule: of equal scores the lowest index is removed first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_prune.kernels.selection import keep_largest, pruned_count, select_matrix, select_nm, select_rows


def by_sorting(score: Tensor, kept: int) -> Tensor:
    """Independent oracle: a stable rising sort of each row, its beginning removed."""
    order = torch.sort(score, dim=1, stable=True).indices[:, : score.shape[1] - kept]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order, False)


@st.composite
def tied_scores(draw: st.DrawFn) -> Tensor:
    """Small whole numbers, so that most groups tie."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 30))
    values = draw(st.lists(st.integers(0, 4), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.float32).view(rows, columns)


@given(tied_scores(), st.data())
def test_keep_largest_is_a_stable_sort(score: Tensor, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, score.shape[1]))
    assert keep_largest(score, kept).equal(by_sorting(score, kept))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_keep_largest_of_any_dtype(dtype: torch.dtype) -> None:
    score = torch.randint(0, 50, (7, 301), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert keep_largest(score, 100).equal(by_sorting(score, 100))


@settings(max_examples=60)
@given(st.integers(2, 16), st.data())
def test_nm_is_a_stable_sort_of_each_group(m: int, data: st.DataObject) -> None:
    n, groups = data.draw(st.integers(1, m - 1)), data.draw(st.integers(1, 4))
    size = 2 * groups * m
    values = data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    score = torch.tensor(values, dtype=torch.float32).view(2, groups * m)
    expected = by_sorting(score.view(-1, m), n).view(score.shape)
    assert select_nm(score, n, m).equal(expected)


@given(tied_scores(), st.floats(0.01, 0.99))
def test_exact_counts(score: Tensor, sparsity: float) -> None:
    removed = (~select_rows(score, sparsity)).sum(dim=1)
    assert (removed == pruned_count(score.shape[1], sparsity)).all()
    assert (~select_matrix(score, sparsity)).sum() == pruned_count(score.numel(), sparsity)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8), (1, 16)])
def test_ties_keep_the_highest_index_and_n_counts_kept(n: int, m: int) -> None:
    mask = select_nm(torch.ones(3, 2 * m), n, m)
    assert mask.view(-1, m)[:, m - n :].all()
    assert not mask.view(-1, m)[:, : m - n].any()
