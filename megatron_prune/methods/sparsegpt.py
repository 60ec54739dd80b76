"""SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774): prune by columns; the rest makes up for it.

The solver is in `kernels/second_order.py`; here it meets the model. With `update_weights=False` only the mask
is taken and the weights that stay keep their dense values: another method, with other numbers, and the prior
of mask learning. `descent_passes` goes on from either, see `kernels/descent.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from megatron_prune.decision.masks import Kept
from megatron_prune.decision.target import NM, Target, Unstructured
from megatron_prune.errors import UserError
from megatron_prune.kernels.descent import MOST_PATTERNS, descend, fits
from megatron_prune.kernels.second_order import (
    Factor,
    SelectBlock,
    SingularHessian,
    factorise,
    scores,
    solve_nm,
    solve_unstructured,
)
from megatron_prune.methods.allocation import sparsity_of
from megatron_prune.methods.base import (
    Linear,
    PruningMethod,
    Workbench,
    dense_part,
    finite,
    hyperparameter,
    register,
    select_blocks,
)
from megatron_prune.methods.magnitude import kept_of
from megatron_prune.model.families import get_family
from megatron_prune.statistics.hessian import Hessian

if TYPE_CHECKING:
    from megatron_prune.model.sizes import ModelConfig

UNSTRUCTURED_GROUP = 4
"""Neighbours among which descent moves what stays, where a target has no groups."""


@register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT(PruningMethod):
    """Second-order pruning with compensation; defaults are the paper's."""

    paper: ClassVar[str] = "Frantar and Alistarh 2023, arXiv:2301.00774"
    targets: ClassVar[Mapping[type, str]] = {
        NM: "N:M",
        Unstructured: "unstructured sparsity, counted in each block of columns over all rows of a matrix",
    }
    mask_only: ClassVar[Mapping[str, Any]] = {"update_weights": False}

    update_weights: bool = hyperparameter(True, "change the weights that stay, to make up for those removed")
    percdamp: float = hyperparameter(0.01, "damping, as a share of the mean diagonal of the Hessian")
    block_size: int = hyperparameter(128, "columns between updates of the columns to their right", 1048576)
    descent_passes: int = hyperparameter(
        0, "passes of descent on mask and weights afterwards; the paper has none", 1000
    )
    true_sequential: bool = hyperparameter(False, "calibrate each matrix on the pruned ones before it in its layer too")

    def __post_init__(self) -> None:
        if not 0 < self.percdamp < float("inf"):
            raise UserError(f"sparsegpt: percdamp {self.percdamp} was given; allowed: above 0")
        if self.block_size < 1:
            raise UserError(f"sparsegpt: block_size {self.block_size} was given; allowed: 1 or more")
        if self.descent_passes < 0:
            raise UserError(f"sparsegpt: descent_passes {self.descent_passes} was given; allowed: 0 or more")

    def check(self, config: ModelConfig, target: Target) -> None:
        """Descent goes through groups: those of a pattern, of which all choices are tried."""
        if self.descent_passes:
            check_descent(config, target, self.name)

    def decide(self, work: Workbench, target: Target) -> Kept:
        """Decide every prunable weight, layer by layer; later layers see the pruned ones."""
        sparsity = sparsity_of(work, target)
        for linear in work.linears(Hessian, sequential=self.true_sequential):
            weight = finite(linear.name, linear.weight(), "weights")
            mask, compensated = self._solve(weight, self._factor(linear), linear, target, sparsity(linear))
            if self.descent_passes:
                start = compensated if self.update_weights else weight
                how = (group_size(target), self.descent_passes, self.percdamp, self.update_weights)
                mask, compensated = descend(weight, start, mask, linear.statistic.value(), *how)
            linear.keep(mask, compensated if self.update_weights else None)
        return work.masks()

    def _factor(self, linear: Linear) -> Factor:
        hessian = finite(linear.name, linear.statistic.value(), "inputs")
        try:
            return factorise(hessian, self.percdamp)
        except SingularHessian:
            raise UserError(
                f"sparsegpt: the Hessian of {linear.name} is singular: its inputs are linearly dependent "
                f"over the {int(linear.statistic.tokens)} calibration tokens seen and percdamp {self.percdamp} "
                "does not mend it: give more calibration text (--calibration-samples) or a larger --percdamp"
            ) from None

    def _solve(
        self, weight: Tensor, factor: Factor, linear: Linear, target: Target, sparsity: float
    ) -> tuple[Tensor, Tensor]:
        if isinstance(target, NM):
            dense = dense_part(linear, lambda: scores(weight, factor, 0, weight.shape[1]).clamp_(min=0), target)
            return solve_nm(weight, factor, target.n, target.m, self.block_size, dense)
        return solve_unstructured(weight, factor, block_selection(linear, sparsity), self.block_size)


def group_size(target: Target) -> int:
    """Weights that descent takes at a time."""
    return target.m if isinstance(target, NM) else UNSTRUCTURED_GROUP


def check_descent(config: ModelConfig, target: Target, method: str) -> None:
    """UserError where descent has too many choices, or groups do not divide the model's widths."""
    if isinstance(target, NM):
        if not fits(target.n, target.m):
            raise UserError(
                f"{method}: descent_passes was given and {target} has {math.comb(target.m, target.n)} patterns; "
                f"allowed: at most {MOST_PATTERNS}, as of 4:8"
            )
        return
    for map in get_family(config.family).weights(config):
        if map.prunable and map.shape[1] % UNSTRUCTURED_GROUP:
            raise UserError(
                f"{method}: descent_passes was given and {map.megatron} has {map.shape[1]} inputs; allowed: multiples "
                f"of {UNSTRUCTURED_GROUP}"
            )


def block_selection(linear: Linear, sparsity: float) -> SelectBlock:
    """Selects in one block of columns over all rows of each Hugging Face matrix, on whichever ranks they are.

    The weights removed up to the end of a block are counted exactly, so the whole matrix is exact too.
    """

    def select(scores: Tensor, first: int) -> Tensor:
        last = first + scores.shape[1]
        to_first, to_last = kept_of(first, sparsity), kept_of(last, sparsity)
        whole = linear.gather(scores)
        return linear.local(select_blocks(whole, linear.blocks, lambda rows: to_last(rows) - to_first(rows)))

    return select
