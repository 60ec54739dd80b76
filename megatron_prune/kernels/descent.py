"""Group-wise descent on the error of a layer's output, after any one-shot mask; ours, in the line of SparseSwaps
(arXiv:2512.10922), which swaps single weights of a mask.

With Hessian H of the layer's inputs a row w that becomes w' costs E = (w - w') H (w - w')^T. A pass goes through the
groups of M neighbouring inputs of a row from left to right. In each, with everything outside it held, the best of all
patterns that keep as many weights is found exactly: with `update` together with the best values of what it keeps,
v = b_S H_SS^-1, where -2 b is the derivative of E by the group's weights were they zero; else with the dense values. So
no step raises E, N:M stays N:M, and rows never meet: each comes out the same whichever are with it, up to the rounding
of float64 sums.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

BLOCK = 128
"""Columns between updates of the residual of all others."""
MOST_PATTERNS = 70
"""Of a group, as many as 4:8 has."""


def fits(n: int, m: int) -> bool:
    """Whether groups of `m` of which `n` stay have few enough patterns to be tried one by one."""
    return math.comb(m, n) <= MOST_PATTERNS


def descend(
    weight: Tensor, start: Tensor, mask: Tensor, hessian: Tensor, m: int, passes: int, damping: float, update: bool
) -> tuple[Tensor, Tensor]:
    """A mask of lower E that keeps as many weights in each group of `m`, and the weights under it.

    `weight` and `start` float32 `[rows, in]`, the dense weights and those to begin with (zero where the mask is False;
    the dense ones without `update`); `mask` bool; `hessian` `[in, in]`, to which `damping` times its mean diagonal is
    added. Returns (mask bool, weights float32, zero where it is False). The inputs must divide into groups.
    """
    dense, columns = weight.double(), weight.shape[1]
    gram = hessian.to(torch.float64, copy=True)
    gram.diagonal().add_(damping * gram.diagonal().mean())
    current = torch.where(mask, start.double() if update else dense, 0.0)
    mask = mask.clone()
    residual = (dense - current) @ gram
    width = max(m, BLOCK // m * m)
    for _ in range(passes):
        for first in range(0, columns, width):
            part = slice(first, min(first + width, columns))
            inner, block = residual[:, part].clone(), gram[part, part]
            before = current[:, part].clone()
            for start_of_group in range(0, inner.shape[1], m):
                group = slice(start_of_group, start_of_group + m)
                whole = slice(first + start_of_group, first + start_of_group + m)
                old, local = current[:, whole], block[group, group]
                slope = inner[:, group] + old @ local
                chosen, new = _best(dense[:, whole], slope, mask[:, whole], local, update)
                inner -= (new - old) @ block[group]
                mask[:, whole], current[:, whole] = chosen, new
            residual -= (current[:, part] - before) @ gram[part]
    return mask, current.float()


def _best(dense: Tensor, slope: Tensor, mask: Tensor, gram: Tensor, update: bool) -> tuple[Tensor, Tensor]:
    """The pattern of lowest E in a group, and its weights `[rows, m]`, of those that keep as many as `mask` does.

    `slope` `[rows, m]`: b of the module's docstring.
    """
    counts = mask.sum(1)
    kept, new = torch.zeros_like(mask), torch.zeros_like(dense)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()
        sets = _sets(mask.shape[1], count, dense.device)
        own, local = slope[rows[:, 0]][:, sets], gram[sets[:, :, None], sets[:, None, :]]  # [rows, sets, count]
        if update:
            values = torch.einsum("rsi,sij->rsj", own, torch.linalg.inv(local))
            cost = -(values * own).sum(2)
        else:
            values = dense[rows[:, 0]][:, sets]
            cost = ((torch.einsum("rsi,sij->rsj", values, local) - 2 * own) * values).sum(2)
        best = cost.argmin(1)
        places = sets[best]
        kept[rows, places] = True
        new[rows, places] = values[torch.arange(len(best), device=best.device), best]
    return kept, new


@functools.lru_cache(maxsize=64)
def _sets(m: int, count: int, device: torch.device) -> Tensor:
    """Places of what stays, int64 `[sets, count]`: of equal sets the first is taken, in which the last weights stay."""
    found = sorted(itertools.combinations(range(m), count), reverse=True)
    return torch.tensor(found, dtype=torch.int64, device=device).view(len(found), count)
