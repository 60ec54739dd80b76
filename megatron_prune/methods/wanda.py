"""Wanda (Sun et al. 2023, arXiv:2306.11695): a weight counts by its size times that of its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.decision.masks import Kept
from megatron_prune.decision.target import NM, Target, Unstructured
from megatron_prune.methods.allocation import sparsity_of
from megatron_prune.methods.base import PruningMethod, Workbench, register, select_pattern, select_rows
from megatron_prune.methods.scores import wanda_scores
from megatron_prune.statistics.activations import InputNorm


@register("wanda")
@dataclass(frozen=True)
class Wanda(PruningMethod):
    """Compare |W| * ||X||_2 within each output row (or each N:M group); later layers see the pruned ones."""

    paper: ClassVar[str] = "Sun et al. 2023, arXiv:2306.11695"
    targets: ClassVar[Mapping[type, str]] = {
        NM: "N:M",
        Unstructured: "unstructured sparsity, counted in each output row",
    }

    def decide(self, work: Workbench, target: Target) -> Kept:
        """Decide every prunable weight, layer by layer; the weights that stay are not changed."""
        sparsity = sparsity_of(work, target)
        for linear in work.linears(InputNorm):
            score = wanda_scores(linear)
            if isinstance(target, NM):
                linear.keep(select_pattern(linear, score, target))
            else:
                linear.keep(select_rows(score, sparsity(linear)))
        return work.masks()
