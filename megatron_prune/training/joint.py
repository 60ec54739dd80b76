"""Weights that train together with the logits of their masks.

Both are in one Adam. The weights have a learning rate, an epsilon and a limit of their gradients' norm of their own,
since gradients of logits are as large as scale and temperature make them. What the masks leave out decays towards zero,
apart from Adam (Loshchilov and Hutter 2019, arXiv:1711.05101) as in CAST (Huang et al. 2025, arXiv:2509.25996), at a
rate that rises over the first steps as in AST (Huang et al. 2024, arXiv:2407.20584):

    W <- W - learning rate * decay * min(1, step / warm-up) * (1 - M) * W          M: each group's best pattern

on the float32 masters, before the optimizer's step. So what a mask removes has lost its part in the model by the time
that it is cut, and a weight that comes back is small.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import megatron_prune.backend as backend  # isort: skip  # noqa: F401  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Training
from megatron_prune.training.hard_concrete import ramp
from megatron_prune.training.state import slots_of


@dataclass(frozen=True)
class WeightTraining:
    """How weights train beside the logits of their masks."""

    lr_factor: float = 1.0
    """Their learning rate, in units of the base learning rate."""
    eps: float = 0.0
    """Adam's epsilon for them; 0: that of the logits."""
    clip: float = 0.0
    """Largest norm of their gradients; 0: they are clipped together with the logits'."""
    decay: float = 0.0
    """Of what the masks leave out, in units of their learning rate."""
    decay_warmup: float = 0.5
    """Share of the steps in which the decay rises from 0."""
    norms: bool = False
    """Whether the norms train, too."""

    def settle(self, optimizer: Any, training: Training) -> None:
        """Give the optimizer's groups of weights what is theirs; before the schedule is made."""
        for group in groups_of(optimizer, mask_logits=False):
            group["max_lr"], group["min_lr"] = training.lr * self.lr_factor, training.min_lr * self.lr_factor
            group["eps"] = self.eps or training.adam_eps

    def update(self, optimizer: Any, clip_logits: float) -> tuple[bool, float]:
        """The optimizer's step: whether all gradients were numbers, and their norm before they were clipped."""
        if not self.clip:
            ok, norm, _zeros = optimizer.step()
            return ok, float(norm or 0.0)
        if optimizer.prepare_grads():
            return False, math.nan
        norms = [
            clip(optimizer, [main for group in groups_of(optimizer, mask_logits) for main in group["params"]], limit)
            for mask_logits, limit in ((True, clip_logits), (False, self.clip))
        ]
        return optimizer.step_with_ready_grads(), math.hypot(*norms)

    def decay_at(self, step: int, steps: int, learning_rate: float) -> float:
        """What removed weights lose of themselves in a step, number `step` from 0."""
        return learning_rate * self.decay * ramp(step, steps, self.decay_warmup)


def holds_mask_logits(group: dict[str, Any]) -> bool:
    """By what megatron-core calls a group without settings of its own; a group's tensors may be nameless shards."""
    return not group["default_config"]


def groups_of(optimizer: Any, mask_logits: bool) -> list[dict[str, Any]]:
    """The optimizer's groups of mask logits, or the others."""
    return [group for group in optimizer.param_groups if holds_mask_logits(group) == mask_logits]


@torch.no_grad()
def clip(optimizer: Any, parameters: Sequence[Tensor], limit: float) -> float:
    """The norm of these parameters' gradients, which are scaled to `limit` where it is larger; 0: none. Collective."""
    with _alone(optimizer, parameters):
        norm = float(optimizer.get_grad_norm() or 0.0)
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if found and 0 < limit < norm:
        torch._foreach_mul_(found, limit / norm)
    return norm


@contextlib.contextmanager
def _alone(optimizer: Any, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Hide the gradients of all others: megatron-core knows which ones are copies, and where to add squares up."""
    own = {id(parameter) for parameter in parameters}
    hidden = [(other, other.grad) for other in optimizer.get_parameters() if id(other) not in own]
    for other, _gradient in hidden:
        other.grad = None
    yield
    for other, gradient in hidden:
        other.grad = gradient


class MaskedDecay:
    """Decay of what the masks of a model leave out, on what the optimizer updates."""

    def __init__(self, model: PrunableModel, optimizer: Any) -> None:
        slots = slots_of(optimizer)
        pairs = ((linear.module, slots.get(linear.module.weight)) for linear in model.masked_linears())
        self.pairs = [(module, slot) for module, slot in pairs if slot is not None]

    @torch.no_grad()
    def apply(self, share: float) -> None:
        """Take this share of themselves from removed weights."""
        if not share:
            return
        for module, slot in self.pairs:
            removed = ~module.decided_mask()
            if slot.part is not None:
                removed = removed.flatten()[slot.part]
            slot.main.addcmul_(slot.main, removed.to(slot.main.dtype), value=-share)
