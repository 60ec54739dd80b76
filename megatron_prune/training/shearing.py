"""Masks of units and weights trained together, under constraints that close as many masks as the target removes.

A step's masks are drawn once and hold for all its micro-batches. They are leaves outside megatron-core's buffers: their
gradients are added up between the backward pass and the optimizer, and the masks' own optimizer follows, the same on
every rank. Its learning rate has the schedule of the weights'; gradients are clipped for the weights only, since Adam
divides by their size.
"""

from __future__ import annotations

from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from torch import Tensor

from megatron_prune.decision.target import Shape
from megatron_prune.decision.units import Units
from megatron_prune.model.cost import forward_flops
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Training
from megatron_prune.ranks import from_leader
from megatron_prune.training import hard_concrete
from megatron_prune.training.gates import Gates, fold
from megatron_prune.training.loop import Samples, StepResult, Steps, Trainer
from megatron_prune.training.session import TrainingSession
from megatron_prune.training.unit_masks import UnitMasks, units_of


class ShearingTrainer(Trainer):
    """Trains all weights of a model, and the masks that multiply its activations."""

    def __init__(
        self,
        model: PrunableModel,
        training: Training,
        data: Samples,
        masks: UnitMasks,
        mask_lr: float,
        warmup: float,
    ) -> None:
        """`warmup`: share of the steps in which the asked sparsity rises."""
        super().__init__(model, training, data, before_update=self._update_masks)
        self.masks = masks
        self.gates = Gates(model)
        self.mask_lr = mask_lr
        self.warmup = warmup
        self.now = 0
        self.penalty = 0.0

    def step(self, step: int) -> StepResult:
        """As the base class, with masks drawn for this step."""
        self.now = step
        self.gates.set(self.masks.draw(step))
        return super().step(step)

    @property
    def progress(self) -> float:
        """Share of the target's sparsity that is asked for in this step."""
        return hard_concrete.ramp(self.now, self.training.train_iters, self.warmup)

    def _update_masks(self) -> None:
        rate = self.mask_lr * float(self.optimizer.param_groups[0]["lr"]) / self.training.lr
        self.penalty = self.masks.update(self.now, self.gates.gradients(), self.progress, rate)

    def state(self, is_loading: bool) -> dict[str, Any]:
        """As the base class, with masks, multipliers and their optimizer."""
        return {**super().state(is_loading), "masks": self.masks.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """As the base class."""
        super().load_state(state)
        self.masks.load(state["masks"])


class ShearingRunner(TrainingSession):
    """Trains a model towards a smaller shape; the model then has the weights of the units that stay."""

    model: PrunableModel
    trainer: ShearingTrainer

    def shear(self, target: Shape, mask_start: float, mask_lr: float, warmup: float) -> Units:
        """Train, decide, and multiply the masks of what stays into the weights. Collective; raises Stopped."""
        config, t = self.model.config, self.training
        masks = UnitMasks(config, target, mask_start, t.seed, backend.device())
        self.trainer = ShearingTrainer(self.model, t, self.data, masks, mask_lr, warmup)
        self.flops = 3 * forward_flops(config, t.seq_length)
        self.take_steps(self.trainer, lambda step, steps: {})
        decided = masks.decided()
        units = from_leader(units_of(config, decided))
        self.trainer.gates.remove()
        fold(self.model, decided)
        return units

    def measure(self) -> dict[str, float]:
        """Sparsities expected and asked for."""
        masks, progress = self.trainer.masks, self.trainer.progress
        asked = {f"target_sparsity/{kind}": progress * axis.sparsity for kind, axis in masks.axes.items()}
        return {"lagrangian": self.trainer.penalty, **masks.report(), **asked}

    def held_out_loss(self, trainer: Steps, windows: Tensor) -> float:
        """Of the model that would come out now."""
        self.trainer.gates.set(self.trainer.masks.decided())
        return super().held_out_loss(trainer, windows)

    def domain_loss(self, trainer: Steps, windows: Tensor) -> float:
        """With the masks as they are now: the smaller model is bad at everything while much of it is being closed."""
        self.trainer.gates.set(self.trainer.masks.median())
        return trainer.evaluate(windows)
