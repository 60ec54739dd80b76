"""Magnitude pruning (Han et al. 2015, arXiv:1506.02626): the smallest weights go; no data is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatron_prune.decision.masks import Kept
from megatron_prune.decision.target import NM, StructuredTarget, Target, Unstructured
from megatron_prune.errors import UserError
from megatron_prune.kernels.selection import pruned_count
from megatron_prune.methods.base import PruningMethod, Workbench, finite, register, select_blocks, select_pattern


def magnitude_score(weight: Tensor) -> Tensor:
    """|W|: importance of weight `[rows, in]`."""
    return weight.abs()


def kept_of(columns: int, sparsity: float) -> Callable[[int], int]:
    """How many weights of a matrix with so many columns stay, by its number of rows."""
    return lambda rows: rows * columns - pruned_count(rows * columns, sparsity)


@register("magnitude")
@dataclass(frozen=True)
class Magnitude(PruningMethod):
    """Keep the largest |W|: per group for N:M, per Hugging Face matrix for unstructured sparsity."""

    paper: ClassVar[str] = "Han et al. 2015, arXiv:1506.02626"
    targets: ClassVar[Mapping[type, str]] = {
        NM: "N:M",
        Unstructured: "unstructured sparsity, counted in each matrix",
    }
    needs: ClassVar[tuple[str, ...]] = ()

    def accept(self, target: Target | StructuredTarget) -> None:
        """No spread and no share of weights to choose: text says what is an outlier, and what the loss needs."""
        super().accept(target)
        if isinstance(target, Unstructured) and target.spread:
            raise UserError(
                f"method {self.name} cannot prune to {target}; it looks at no text: leave spread= out, or use wanda"
            )
        if isinstance(target, NM | Unstructured) and target.dense_share:
            raise UserError(
                f"method {self.name} cannot prune to {target}; it looks at no text: name the weights, or use wanda"
            )

    def decide(self, work: Workbench, target: Target) -> Kept:
        """Decide every prunable weight."""
        for linear in work.linears(None):
            score = magnitude_score(finite(linear.name, linear.weight(), "weights"))
            if isinstance(target, NM):
                mask = select_pattern(linear, score, target)
            else:
                whole = select_blocks(linear.gather(score), linear.blocks, kept_of(score.shape[1], target.sparsity))
                mask = linear.local(whole)
            linear.keep(mask)
        return work.masks()
