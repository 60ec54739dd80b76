"""Sheared LLaMA (Xia et al. 2023, arXiv:2310.06694): a smaller shape found by training masks and weights together.

Every layer, head, neuron and channel that the target may remove has a hard-concrete mask. Lagrange multipliers push the
expected share of closed masks to the target's, which rises over the first steps; the weights learn at the same time
what the closing masks take away. At the end exactly the target's counts stay, and their masks become part of the
weights. Continued pretraining, the longer half of the recipe, is the `train` verb on the trimmed model.

Ours: with grouped queries whole groups have masks and so have the heads within each, which keep equal numbers; masks
are drawn once for an optimizer step, from counters, so that layouts and resumed runs agree; they are decided at their
median; a tied embedding takes its masks once. A unit that stays with a closed mask, which only a run that has not
reached its target has, counts with 0.001.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_prune.decision.target import Shape
from megatron_prune.errors import UserError
from megatron_prune.methods.base import DATA, hyperparameter, register
from megatron_prune.methods.structured import Refitted
from megatron_prune.options import Share

if TYPE_CHECKING:
    from megatron_prune.decision.units import Units
    from megatron_prune.methods.base import Workbench


@register("sheared_llama")
@dataclass(frozen=True)
class ShearedLLaMA(Refitted):
    """Learn which units stay while the weights train; defaults are the paper's (appendix A) for 3,200 steps of 32
    windows, which there have 4,096 tokens.
    """

    paper: ClassVar[str] = "Xia et al. 2023, arXiv:2310.06694"
    targets: ClassVar[Mapping[type, str]] = {Shape: "sizes: any of them, together; every layer comes out equal"}
    needs: ClassVar[tuple[str, ...]] = (DATA,)
    takes: ClassVar[tuple[str, ...]] = ()
    resumable: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "train_iters": 3200,
        "global_batch_size": 32,
        "lr": 1e-4,
        "min_lr": Share("lr", 0.1),
        "lr_warmup_iters": Share("train_iters", 0.1),
        "adam_eps": 1e-8,
    }

    mask_start: float = hyperparameter(5.0, "log_alpha of all masks before the first step; 5: nearly all are open")
    mask_lr: float = hyperparameter(1.0, "learning rate of masks and multipliers, with the schedule of --lr")
    target_warmup: float = hyperparameter(0.2, "share of the steps in which the sparsity asked for rises")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_lr < float("inf"):
            raise UserError(f"sheared_llama: mask_lr {self.mask_lr} was given; allowed: above 0")
        if not abs(self.mask_start) <= 10:
            raise UserError(f"sheared_llama: mask_start {self.mask_start} was given; allowed: -10 to 10")
        if not 0 <= self.target_warmup <= 1:
            raise UserError(f"sheared_llama: target_warmup {self.target_warmup} was given; allowed: 0 to 1")
        if self.refit != "local" or not self.norm_gain:
            raise UserError("sheared_llama: refit or norm_gain was given; weights are trained instead: leave them out")

    def check(self, config: Any, target: Any) -> None:
        """All layers are equal, and something is to go."""
        from megatron_prune.training.unit_masks import axes

        axes(config, target)

    def decide(self, work: Workbench, target: Shape) -> Units:
        """The units that stay, whose weights are then in the model."""
        return work.shear().shear(target, self.mask_start, self.mask_lr, self.target_warmup)
