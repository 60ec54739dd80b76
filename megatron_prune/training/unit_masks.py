"""One learned hard-concrete mask for each unit that a smaller shape may lose, and the units that stay at last.

    layer   [layers]                            its attention and its MLP together
    hidden  [channels]                          of the residual stream, the same in all layers
    group   [layers, groups]                    a query group with all its heads
    head    [layers, groups, heads in a group]  so that every group keeps equally many
    ffn     [layers, neurons]

The last axis is what the target counts: exactly `kept` of it stay. A kind that the shape does not thin has no masks.
Masks are small and whole on every rank, and so is their optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_prune.decision.target import Shape
from megatron_prune.decision.units import BlockUnits, Units, all_of_block
from megatron_prune.errors import UserError
from megatron_prune.kernels.selection import keep_largest
from megatron_prune.model.sizes import ModelConfig
from megatron_prune.training import hard_concrete

KINDS = ("layer", "hidden", "group", "head", "ffn")
SPREAD = 0.01
"""Standard deviation of `log_alpha` before the first step."""
START_STEP = -1
"""Step number under which the start is drawn."""
FLOOR = 1e-3
"""Least z of a unit that stays, also of one that only the count keeps: zero means that it goes."""


@dataclass(frozen=True)
class Axis:
    """The masks of one kind."""

    shape: tuple[int, ...]
    kept: int
    """Masks along the last axis whose units stay."""

    @property
    def sparsity(self) -> float:
        """Share along the last axis that goes."""
        return 1 - self.kept / self.shape[-1]


def axes(config: ModelConfig, target: Shape) -> dict[str, Axis]:
    """The kinds of masks that a target needs; UserError for a model whose layers differ, and when nothing would go."""
    if config.blocks is not None:
        raise UserError(
            "sheared_llama: the layers of this model differ in size; allowed: a model whose layers are equal, since "
            "every layer keeps the same number of units"
        )
    block = config.block(None)
    groups = target.num_query_groups or block.num_query_groups
    heads = (target.num_attention_heads or groups * block.group_heads) // groups
    layers = config.num_layers
    found = {
        "layer": Axis((layers,), target.num_layers or layers),
        "hidden": Axis((config.hidden_size,), target.hidden_size or config.hidden_size),
        "group": Axis((layers, block.num_query_groups), groups),
        "head": Axis((layers, block.num_query_groups, block.group_heads), heads),
        "ffn": Axis((layers, block.ffn_hidden_size), target.ffn_hidden_size or block.ffn_hidden_size),
    }
    found = {kind: axis for kind, axis in found.items() if axis.kept < axis.shape[-1]}
    if not found:
        raise UserError(f"target {target} is the shape that the model has; give a smaller size")
    return found


class UnitMasks:
    """The masks of a model, the multipliers of their constraints, and what updates both."""

    def __init__(
        self, config: ModelConfig, target: Shape, start: float, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        """`start`: mean of `log_alpha` before the first step."""
        self.axes = axes(config, target)
        self.seed = seed
        self.device = device
        self.log_alpha = {kind: self._start(kind, axis, start).requires_grad_() for kind, axis in self.axes.items()}
        self.multipliers = {kind: torch.zeros(2, device=device, requires_grad=True) for kind in self.axes}
        """Of the linear and of the quadratic term."""
        groups: list[dict[str, Any]] = [
            {"params": list(self.log_alpha.values())},
            {"params": list(self.multipliers.values()), "maximize": True},
        ]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))

    def _start(self, kind: str, axis: Axis, mean: float) -> Tensor:
        noise = torch.special.ndtri(self._uniform(kind, axis.shape, START_STEP))
        return (mean + SPREAD * noise).float().to(self.device)

    def _uniform(self, kind: str, shape: tuple[int, ...], step: int) -> Tensor:
        return hard_concrete.uniform(shape, self.seed, step, KINDS.index(kind))

    def draw(self, step: int) -> dict[str, Tensor]:
        """z of every kind for one optimizer step: float32 leaves that collect gradients."""
        drawn = {}
        with torch.no_grad():
            for kind, log_alpha in self.log_alpha.items():
                u = self._uniform(kind, self.axes[kind].shape, step).to(self.device)
                drawn[kind] = hard_concrete.sample(log_alpha.double(), u).float()
        return {kind: z.requires_grad_() for kind, z in drawn.items()}

    def update(self, step: int, gradients: dict[str, Tensor], progress: float, lr: float) -> float:
        """Move masks and multipliers, given the loss's gradients at the z of `draw(step)`; the Lagrangian before.

        `progress`: share of the target's sparsity that is asked for by now.
        """
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        penalty = torch.zeros((), dtype=torch.float64, device=self.device)
        loss = torch.zeros_like(penalty)
        for kind, axis in self.axes.items():
            wide = self.log_alpha[kind].double()
            closed = hard_concrete.sparsity(wide)
            penalty = penalty + hard_concrete.lagrangian(
                closed, progress * axis.sparsity, *self.multipliers[kind].double()
            )
            z = hard_concrete.sample(wide, self._uniform(kind, axis.shape, step).to(self.device))
            loss = loss + (z * gradients[kind].double()).sum()
        (loss + penalty).backward()
        self.optimizer.step()
        with torch.no_grad():
            for log_alpha in self.log_alpha.values():
                log_alpha.clamp_(*hard_concrete.BOUNDS)
        return float(penalty.detach())

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Expected sparsity of every kind, and its multipliers."""
        record: dict[str, float] = {}
        for kind, log_alpha in self.log_alpha.items():
            linear, quadratic = self.multipliers[kind].tolist()
            record |= {
                f"sparsity/{kind}": float(hard_concrete.sparsity(log_alpha).mean()),
                f"multiplier_linear/{kind}": linear,
                f"multiplier_quadratic/{kind}": quadratic,
            }
        return record

    @torch.no_grad()
    def median(self) -> dict[str, Tensor]:
        """z as it is now, at its median, whatever is to stay."""
        return {kind: hard_concrete.median(log_alpha.double()).float() for kind, log_alpha in self.log_alpha.items()}

    @torch.no_grad()
    def decided(self) -> dict[str, Tensor]:
        """z when all is over: of each last axis exactly as many as the target keeps, those most open, at their median.

        The rest are zero.
        """
        found = {}
        for kind, axis in self.axes.items():
            log_alpha = self.log_alpha[kind]
            kept = keep_largest(log_alpha.reshape(-1, axis.shape[-1]), axis.kept).view(axis.shape)
            found[kind] = torch.where(kept, hard_concrete.median(log_alpha.double()).float().clamp(min=FLOOR), 0.0)
        return found

    def _named(self) -> dict[str, Tensor]:
        """All that is learned."""
        return {**self.log_alpha, **{f"multipliers/{kind}": x for kind, x in self.multipliers.items()}}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, plain tensors that all ranks share."""
        return {
            name: {key: value.detach().cpu() for key, value in {"value": x, **self.optimizer.state.get(x, {})}.items()}
            for name, x in self._named().items()
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        for name, x in self._named().items():
            saved = dict(state[name])
            x.copy_(saved.pop("value"))
            for key, value in saved.items():
                self.optimizer.state[x][key] = value.clone() if key == "step" else value.to(self.device, copy=True)


def units_of(config: ModelConfig, decided: dict[str, Tensor]) -> Units:
    """The units whose decided masks are not zero."""
    hidden = _open(decided["hidden"]) if "hidden" in decided else tuple(range(config.hidden_size))
    layers = _open(decided["layer"]) if "layer" in decided else tuple(range(config.num_layers))
    return Units(layers, hidden, tuple(_block(config, decided, layer) for layer in layers))


def _block(config: ModelConfig, decided: dict[str, Tensor], layer: int) -> BlockUnits:
    whole = all_of_block(config, layer)
    groups = _open(decided["group"][layer]) if "group" in decided else whole.groups
    per_group = config.block(layer).group_heads
    within = {
        group: _open(decided["head"][layer, group]) if "head" in decided else range(per_group) for group in groups
    }
    heads = tuple(group * per_group + head for group in groups for head in within[group])
    return BlockUnits(groups, heads, _open(decided["ffn"][layer]) if "ffn" in decided else whole.ffn)


def _open(z: Tensor) -> tuple[int, ...]:
    return tuple(z.nonzero().flatten().tolist())
