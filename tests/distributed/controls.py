"""Deliberately layout-dependent behaviour: what the layout tests must be able to tell from the real thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.decision.target import NM, Shape, StructuredTarget
from megatron_prune.decision.units import Units
from megatron_prune.kernels.gumbel import Position
from megatron_prune.methods.base import PruningMethod, register, select_nm
from megatron_prune.methods.structured import Refitted, keep_neurons
from megatron_prune.model.prunable import LocalLinear, PrunableModel
from megatron_prune.training.gates import Gates


@register("layout_dependent")
@dataclass(frozen=True)
class LayoutDependent(PruningMethod):
    """Scores drawn from each rank's own generator: right on one process, wrong on any other number."""

    paper: ClassVar[str] = "none: a negative control"
    targets: ClassVar[Mapping[type, str]] = {NM: "N:M"}
    needs: ClassVar[tuple[str, ...]] = ()

    def decide(self, work: Any, target: Any) -> Any:
        """Random masks."""
        assert isinstance(target, NM)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for linear in work.linears(None):
            score = torch.rand(linear.weight().shape, generator=generator)
            linear.keep(select_nm(score, target.n, target.m))
        return work.masks()


@register("layout_dependent_units")
@dataclass(frozen=True)
class LayoutDependentUnits(Refitted):
    """Keeps MLP neurons that depend on the number of processes."""

    paper: ClassVar[str] = "none: a negative control"
    targets: ClassVar[Mapping[type, str]] = {Shape: "ffn_hidden_size=N"}

    def choose(self, config: Any, passes: Any, target: StructuredTarget) -> Units:
        """Random neurons."""
        assert isinstance(target, Shape)
        generator = torch.Generator().manual_seed(dist.get_world_size())
        scores = [torch.rand(config.ffn_hidden_size, generator=generator) for _ in range(config.num_layers)]
        return keep_neurons(Units.all(config), scores, target.ffn_hidden_size, range(config.num_layers))


def draw_noise_by_local_position() -> None:
    """Number the groups of a shard as if it were the whole weight: the mistake that counter-based noise prevents."""

    def position(self: PrunableModel, linear: LocalLinear, m: int) -> Position:
        rows, inputs = linear.module.weight.shape
        return Position(row_ids=torch.arange(rows), first_group=0, groups_per_row=inputs // m)

    PrunableModel.position = position  # type: ignore[method-assign]


def leave_unit_gradients_unreduced() -> None:
    """Each rank's masks follow its own part of the batch, of the layers and of the units."""

    def gradients(self: Gates) -> dict[str, Tensor]:
        return {kind: torch.zeros_like(z) if z.grad is None else z.grad for kind, z in self.z.items()}

    Gates.gradients = gradients  # type: ignore[method-assign]
