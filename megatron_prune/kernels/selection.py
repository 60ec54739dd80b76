"""Which weights to keep, given one score per weight: exact counts, one tie rule.

Tie rule, here and everywhere: of equal scores the lowest index is removed first, as by a stable sort in rising order.
Ties are common in weights that were once quantised (15% of the 2:4 groups of one such model): left to the sort, masks
are irreproducible.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


def select_nm(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the ``n`` highest of every ``m`` consecutive scores of a row: [rows, in] -> bool [rows, in].

    Every score is ranked by the comparisons it loses inside its group; a sort of many tiny groups is slower.
    """
    group = score.reshape(-1, m).t().contiguous()
    losses = torch.zeros(group.shape, dtype=torch.int8, device=score.device)
    for low in range(m):
        for high in range(low + 1, m):
            beaten = group[high] >= group[low]
            losses[low] += beaten
            losses[high] += ~beaten
    return (losses < n).t().reshape(score.shape)


def select_rows(score: Tensor, sparsity: float) -> Tensor:
    """Remove the lowest ``sparsity`` of each row, rounded down: [rows, in] -> bool [rows, in]."""
    return keep_largest(score, score.shape[1] - pruned_count(score.shape[1], sparsity))


def select_matrix(score: Tensor, sparsity: float) -> Tensor:
    """Remove the lowest ``sparsity`` of the whole matrix, rounded down: [rows, in] -> bool [rows, in]."""
    kept = score.numel() - pruned_count(score.numel(), sparsity)
    return keep_largest(score.reshape(1, -1), kept).reshape(score.shape)


def keep_largest(score: Tensor, kept: int) -> Tensor:
    """Mark the ``kept`` highest scores of each row, of equal ones the last: [rows, k] -> bool [rows, k]."""
    if kept <= 0 or kept >= score.shape[1]:
        return torch.full(score.shape, kept > 0, dtype=torch.bool, device=score.device)
    cut = kth_smallest(score, score.shape[1] - kept)
    at_least = score >= cut
    if (at_least.sum(dim=1) == kept).all():
        return at_least
    above, equal = score > cut, score == cut
    room = kept - above.sum(dim=1, keepdim=True)
    position = equal.cumsum(dim=1)
    return above | (equal & (position > position[:, -1:] - room))


def kth_smallest(score: Tensor, k: int) -> Tensor:
    """The element with `k` others before it in rising order, of each row: [rows, n] -> [rows, 1].

    On a CPU by NumPy, whose vectorised selection takes a tenth of the time of `torch.kthvalue`.
    """
    if score.device.type != "cpu" or score.dtype not in (torch.float32, torch.float64):
        with torch_deterministic(False):  # its indices, which may differ between runs, are not looked at
            return torch.kthvalue(score, k + 1, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(score.detach().numpy(), k, axis=1)[:, k : k + 1].copy())


@contextlib.contextmanager
def torch_deterministic(wanted: bool) -> Iterator[None]:
    """While active torch takes only operations that give the same bits in every run, or any; afterwards as before."""
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)


def pruned_count(size: int, sparsity: float) -> int:
    """Number of the ``size`` weights that ``sparsity`` removes, rounded down.

    The sparsity is read as the decimal that was written: 0.29 of 100 is 29, though ``100 * 0.29 < 29``.
    """
    return math.floor(as_written(sparsity) * size)


def as_written(share: float) -> Fraction:
    """The decimal that was written."""
    return Fraction(repr(float(share)))
