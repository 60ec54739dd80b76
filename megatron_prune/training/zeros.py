"""Pruned weights stay zero while the others train.

A gradient of exactly zero never moves a weight: Adam's means stay zero, and so do the float32 master and the bf16 copy
that is made from it. So gradients of pruned weights are cleared before each optimizer step, in one place for every kind
of optimizer; the norm that clipping looks at is then that of the weights that can move.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.model.prunable import LocalLinear, PrunableModel


class Zeros:
    """The weights of a model's prunable linears that are zero when this is made; each becomes +0.0."""

    @torch.no_grad()
    def __init__(self, model: PrunableModel) -> None:
        self.model = model
        self.linears = model.linears()
        self.masks = {linear.name: linear.module.weight == 0 for linear in self.linears}
        for linear in self.linears:
            linear.module.weight.masked_fill_(self.masks[linear.name], 0.0)

    def clear_gradients(self) -> None:
        """Between the backward pass and the optimizer's step."""
        for linear in self.linears:
            if linear.module.weight.requires_grad:
                gradient: Tensor = linear.module.weight.main_grad  # type: ignore[attr-defined]
                gradient.mul_(~self.masks[linear.name])  # on a CPU six times as fast as masked_fill_

    @torch.no_grad()
    def check(self, when: str) -> int:
        """Their number, over the whole model; UserError when one is not +0.0 any more. Collective."""
        found = ((_used(x)[self.masks[x.name]], self.model.counts(x.map)) for x in self.linears)
        return check_zeros(found, when)


class Checked(Protocol):
    """Weights that must stay zero, in either engine."""

    def check(self, when: str) -> int:
        """Their number; UserError when one is not +0.0 any more. Collective."""


def counted(zeros: Checked | None, when: str) -> dict[str, float]:
    """For the log: their number, where there are any; a smaller model has none to keep. Collective."""
    count = zeros.check(when) if zeros is not None else 0
    return {"zeros": count} if count else {}


def check_zeros(found: Iterable[tuple[Tensor, bool]], when: str) -> int:
    """The number, over all ranks, of the weights `found` that must be +0.0, those of copies (False) not counted.

    UserError when one of them is not. Collective.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=backend.device())
    for weights, counted in found:
        counts[0] += weights.numel() if counted else 0
        counts[1] += ((weights != 0) | torch.signbit(weights)).sum()
    dist.all_reduce(counts)
    zeros, wrong = counts.tolist()
    if wrong:
        raise UserError(
            f"{wrong} of the {zeros} weights that must stay zero are not +0.0 {when}: nothing is saved from there; "
            "resume from an earlier checkpoint, or begin a new run"
        )
    return zeros


def _used(linear: LocalLinear) -> Tensor:
    """The weight as the forward pass uses it, adapters included."""
    changed = linear.module.changed_weight
    return linear.module.weight if changed is None else changed(linear.module.weight)
