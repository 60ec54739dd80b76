"""What `verify` counts as keeping to a pattern."""

from __future__ import annotations

import pytest
import torch

from megatron_prune.decision.target import parse_target
from megatron_prune.evaluation.verify import _kept_too_many, count_zeros
from megatron_prune.kernels.selection import select_rows


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6])
def test_counts_rounded_by_row_hold_and_denser_weights_do_not(sparsity: float) -> None:
    target = parse_target(sparsity)
    score = torch.rand(40, 33, generator=torch.Generator().manual_seed(0)) + 0.1
    pruned = score * select_rows(score, sparsity)
    assert not _kept_too_many(count_zeros(pruned, target), target)
    assert _kept_too_many(count_zeros(score * select_rows(score, sparsity - 0.1), target), target)


def test_a_dense_weight_is_noticed_whatever_the_others_are() -> None:
    target = parse_target("2:4")
    assert _kept_too_many(count_zeros(torch.ones(4, 8), target), target)
    assert not _kept_too_many(count_zeros(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), target), target)
