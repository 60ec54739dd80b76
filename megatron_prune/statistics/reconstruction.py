"""Which inputs of a linear layer are missed least once the others have been refitted to do their work.

Without inputs R the best refit of W leaves the squared error tr(W_R ([G^-1]_RR)^-1 W_R^T), where G is the sum of x x^T
over the layer's inputs x: the block form of the optimal brain surgeon, as ZipLM (Kurtic et al. 2023, arXiv:2302.04089,
section 3.1) uses it on heads. An activation that is large but predictable from the others costs nothing here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_prune.decision.units import channels_of, group_of, heads_of
from megatron_prune.errors import UserError

EXHAUSTIVE = 64
"""Up to so many choices in a layer are all tried; beyond, units go one by one."""


def damped_factor(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor of `gram + penalty`, and the penalty: `damping` in units of the mean diagonal.

    `gram` is float64 `[n, n]`. UserError when it stays singular.
    """
    mean = gram.diagonal().mean()
    penalty = damping * (mean if mean > 0 else torch.ones_like(mean))  # inputs that are always zero: nothing to fit
    damped = gram.clone()
    damped.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise UserError(
            f"--refit-damping {damping} is too little for inputs that depend on each other so much: give more, or more "
            "calibration text"
        )
    return factor, penalty


class Reconstruction:
    """A linear's weight and the inverse of its inputs' second moments, from which inputs are removed.

    weight `[out, in]`; gram `[in, in]`, the sum of x x^T up to a factor; damping in units of its mean diagonal.
    """

    def __init__(self, weight: Tensor, gram: Tensor, damping: float) -> None:
        self.weight = weight.double().clone()
        factor, _ = damped_factor(gram.to(self.weight.device, torch.float64), damping)
        self.inverse = torch.cholesky_inverse(factor)
        self.alive = torch.ones(len(factor), dtype=torch.bool, device=factor.device)
        """Inputs that have not been removed."""

    def error(self, columns: Tensor) -> float:
        """Squared output error that removing these inputs adds, after the best refit of those that are left."""
        gone = self.weight[:, columns]
        factor = torch.linalg.cholesky(self.inverse[columns][:, columns])
        return float(torch.cholesky_solve(gone.t(), factor).mul_(gone.t()).sum())

    def remove(self, columns: Tensor) -> None:
        """Take these inputs out and refit the others."""
        rows = self.inverse[columns]
        factor = torch.linalg.cholesky(rows[:, columns])
        correction = torch.cholesky_solve(rows, factor)
        self.weight -= self.weight[:, columns] @ correction
        self.inverse -= rows.t() @ correction
        self.inverse[columns, columns] = 1.0  # stays invertible, and stays out of everything else
        self.weight[:, columns] = 0.0
        self.alive[columns] = False

    def shrink(self, count: int) -> Tensor:
        """Remove single inputs, each time the one that adds the least error, until `count` are left; their numbers."""
        there = self.alive.nonzero().flatten()
        weight, inverse = self.weight[:, there], self.inverse[there][:, there]
        left = torch.ones(len(there), dtype=torch.bool, device=there.device)
        for _ in range(len(there) - count):
            scores = weight.square().sum(0) / inverse.diagonal()
            j = int(scores.masked_fill_(~left, float("inf")).argmin())
            row, column = inverse[j].clone(), weight[:, j].clone()
            weight.addr_(column, row, alpha=-1.0 / float(row[j]))
            inverse.addr_(row, row, alpha=-1.0 / float(row[j]))
            left[j] = False
            inverse[j], inverse[:, j], weight[:, j] = 0.0, 0.0, 0.0
            inverse[j, j] = 1.0
        kept = there[left]
        self.remove_solved(there[~left], kept, weight[:, left], inverse[left][:, left])
        return kept

    def remove_solved(self, gone: Tensor, kept: Tensor, weight: Tensor, inverse: Tensor) -> None:
        """Take inputs out whose removal has been worked out on the others."""
        self.weight[:, gone] = 0.0
        self.weight[:, kept] = weight
        self.inverse[gone], self.inverse[:, gone] = 0.0, 0.0
        self.inverse[gone, gone] = 1.0
        self.inverse[kept.unsqueeze(1), kept] = inverse
        self.alive[gone] = False


def groups_to_keep(
    config: Any, layer: int, linear: Reconstruction, count: int, among: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The `count` query groups that stay, numbers rising; `linear`, the output projection, loses the others' inputs.

    `among` are those that are there still; left out: all.
    """
    groups = range(config.block(layer).num_query_groups) if among is None else among
    columns = {group: channels_of(heads_of(config, layer, group), config.kv_channels) for group in groups}
    gone: set[int] = set()
    if math.comb(len(groups), count) <= EXHAUSTIVE:
        gone.update(_remove(linear, columns, list(itertools.combinations(groups, len(groups) - count))))
    while len(groups) - len(gone) > count:
        gone.update(_remove(linear, columns, [(group,) for group in groups if group not in gone]))
    return tuple(group for group in groups if group not in gone)


def heads_to_keep(
    config: Any, layer: int, linear: Reconstruction, members: Mapping[int, Sequence[int]], count: int
) -> tuple[int, ...]:
    """The `count` heads of each query group that stay, numbers rising; `linear` loses the others' inputs.

    `members`: heads that are there still, equally many, by group.
    """
    columns = {head: channels_of([head], config.kv_channels) for heads in members.values() for head in heads}
    surplus = len(next(iter(members.values()))) - count
    gone: set[int] = set()
    if math.comb(surplus + count, count) ** len(members) <= EXHAUSTIVE:
        removals = itertools.product(*(itertools.combinations(heads, surplus) for heads in members.values()))
        gone.update(_remove(linear, columns, [tuple(itertools.chain(*removal)) for removal in removals]))
        surplus = 0
    for _ in range(surplus):  # one head of every group in each round, the cheapest first
        waiting = set(members)
        while waiting:
            free = [(head,) for group in waiting for head in members[group] if head not in gone]
            (head,) = _remove(linear, columns, sorted(free))
            gone.add(head)
            waiting.remove(group_of(config, layer, head))
    return tuple(head for head in columns if head not in gone)


def _remove(linear: Reconstruction, columns: dict[int, Tensor], choices: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Of several sets of units the one that costs least, the first of equal ones; `linear` loses its inputs."""
    inputs = [torch.cat([columns[unit] for unit in choice]) for choice in choices if choice]
    if not inputs:
        return ()
    errors = [linear.error(x) for x in inputs] if len(inputs) > 1 else [0.0]
    best = errors.index(min(errors))
    linear.remove(inputs[best])
    return choices[best]
