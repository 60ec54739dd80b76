"""MaskLLM (Fang et al. 2024, arXiv:2409.17481): N:M masks learned by Gumbel-softmax over whole patterns.

Every group of M weights has one logit for each of the C(M, N) patterns that keep N of them. Training samples

    p = softmax((scale * logits + gumbel) / temperature)          mask = p @ patterns  in [0, 1]^M

and lowers the language-model loss of the model with weights W * mask. At the end each group takes its best pattern.

Where this differs from the paper, and why:
- The start. The paper adds `strength * std(logits) * (overlap - N/2)` to random logits, which leaves 5.5% of the groups
  of SmolLM2-135M off their prior (perplexity 175 becomes 831 before the first step). Here the logits start at
  `strength * std * (overlap - N)` exactly: they decode to the prior, and every pattern with equal overlap starts equal.
- Few steps. What decides how a mask behaves is `scale * logits / temperature` (how soft) and `1 / temperature` (how
  noisy). The paper starts soft and noisy, far from the prior, and has 2000 steps to come back. With tens to hundreds of
  steps it pays to start near the prior with little noise (a high temperature and a scale to match), to let the scale
  grow geometrically at constant temperature, and to give Adam an epsilon of the size of the clipped gradients, so that
  only groups with large gradients move (`benchmarks/maskllm_*.yaml`).
- The noise is counter-based: the same for every parallel layout, and redrawn in backward instead of stored.
- What is lowered may be the divergence from the dense model (`--teacher`) in place of the next-token loss. Where the
  teacher is the model itself and its weights are frozen, it is the same model without masks, not a second one.
- A share of each weight may stay dense (`2:4@0.75`), in tiles that are learned with the masks: `training/tiles.py`.
- Weights may train together with their masks (`train_weights`), with what masks remove decaying to zero: AST (Huang et
  al. 2024, arXiv:2407.20584) and CAST (Huang et al. 2025, arXiv:2509.25996) do so with masks made of magnitudes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron_prune.decision.masks import Kept
from megatron_prune.decision.target import NM, parse_any_target
from megatron_prune.errors import UserError
from megatron_prune.kernels.definition import SCHEDULES, linear_schedule
from megatron_prune.kernels.gumbel import patterns
from megatron_prune.methods.base import (
    CALIBRATION,
    DATA,
    LOSSES,
    PRIOR,
    PruningMethod,
    Workbench,
    hyperparameter,
    looks_at_text,
    register,
)
from megatron_prune.option_groups import Calibration
from megatron_prune.options import entries

if TYPE_CHECKING:
    from megatron_prune.model.masked_linear import MaskDraw
    from megatron_prune.training.joint import WeightTraining


SHORT = {
    "schedule_shape": "geometric",
    "scale_start": 1280.0,
    "scale_end": 21333.0,
    "temperature_start": 12.8,
    "temperature_end": 12.8,
    "weight_regularization": 0.0,
    "lr_multiplier": 1.0,
    "lr": 1.8e-3,
    "min_lr": 1.8e-4,
    "adam_eps": 1e-4,
}
"""The recipe for few steps, as the docstring has it: those of the learned masks of SmolLM2-135M in docs/results.md."""
DRAWS = ("microbatch", "step")
GRADIENTS = ("masked", "dense")
WEIGHT_OPTIONS = (
    *("train_norms", "weight_lr_multiplier", "weight_eps", "weight_clip", "weight_gradient"),
    *("masked_decay", "decay_warmup"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prior_logits(mask: Tensor, n: int, m: int, strength: float, std: float) -> Tensor:
    """Logits `[out, in / m, patterns]` that decode exactly to an N:M mask `[out, in]` (paper, section 3.4).

    A pattern that shares `k` kept weights with the prior gets `strength * std * (k - n)`: 0 for the prior itself, one
    step of `strength * std` less for each weight that differs.
    """
    table = patterns(n, m).to(device=mask.device, dtype=torch.float32)
    overlap = mask.view(mask.shape[0], -1, m).float() @ table.t()
    return strength * std * (overlap - n)


@register("maskllm")
@dataclass(frozen=True)
class MaskLLM(PruningMethod):
    """Learnable N:M masks; defaults are the paper's (section 4.1 and appendix) for 2000 steps of 256 x 4096 tokens."""

    paper: ClassVar[str] = "Fang et al. 2024, arXiv:2409.17481"
    targets: ClassVar[Mapping[type, str]] = {NM: "N:M: one logit per pattern of each group"}
    needs: ClassVar[tuple[str, ...]] = (DATA,)
    takes: ClassVar[tuple[str, ...]] = (PRIOR, CALIBRATION, LOSSES)
    resumable: ClassVar[bool] = True

    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "short": SHORT}

    recipe: str = hyperparameter("paper", "of defaults: the paper's, or short, for tens to hundreds of steps")
    scale_start: float = hyperparameter(1e2, "factor of the logits against the Gumbel noise, first step")
    scale_end: float = hyperparameter(5e2, "the same, last step")
    temperature_start: float = hyperparameter(4.0, "softmax temperature, first step")
    temperature_end: float = hyperparameter(0.05, "the same, last step")
    schedule_shape: str = hyperparameter("linear", "of scale and temperature: linear (the paper's) or geometric")
    prior_strength: float = hyperparameter(3.0, "logit step between the prior and its neighbours, in std")
    std: float = hyperparameter(0.01, "unit of the start's logits; also their spread without a prior")
    lr_multiplier: float = hyperparameter(10.0, "learning rate of the mask logits, in units of --lr")
    tile_lr_multiplier: float = hyperparameter(4.0, "learning rate of tiles (2:4@0.75), in units of the mask logits'")
    weight_regularization: float = hyperparameter(1e-5, "weight of -sum((W * mask)^2), falling to 0")
    hard: bool = hyperparameter(False, "sample whole patterns, straight-through gradient")
    mask_draw: str = hyperparameter("microbatch", "a new mask for each micro-batch (the paper's), or one for a step")
    logits_dtype: str = hyperparameter("float32", "or bfloat16, with float32 masters: less with a shared optimizer")
    train_weights: bool = hyperparameter(False, "train the weights too; the paper freezes them")
    train_norms: bool = hyperparameter(False, "with the weights, the norms")
    weight_lr_multiplier: float = hyperparameter(1.0, "learning rate of the weights (and norms), in units of --lr")
    weight_eps: float = hyperparameter(0.0, "Adam's epsilon for the weights; 0: --adam-eps, as for the logits")
    weight_clip: float = hyperparameter(0.0, "largest norm of the weights' gradients; 0: --clip-grad of all together")
    weight_gradient: str = hyperparameter("masked", "of a weight: masked as the weight is, or dense (straight-through)")
    masked_decay: float = hyperparameter(0.0, "decay of what a mask removes, in units of the weights' learning rate")
    decay_warmup: float = hyperparameter(0.5, "share of the steps in which that decay rises from 0")

    def __post_init__(self) -> None:
        positive = "scale_start scale_end temperature_start temperature_end prior_strength std lr_multiplier".split()
        for name in (*positive, "weight_lr_multiplier"):
            if not getattr(self, name) > 0:
                raise UserError(f"maskllm: {name} {getattr(self, name)} was given; allowed: above 0")
        if self.recipe not in self.recipes:
            raise UserError(f"maskllm: recipe {self.recipe!r} was given; allowed: {', '.join(self.recipes)}")
        for name in ("tile_lr_multiplier", "weight_regularization", "weight_eps", "weight_clip", "masked_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"maskllm: {name} {getattr(self, name)} was given; allowed: 0 or more")
        if not 0 <= self.decay_warmup <= 1:
            raise UserError(f"maskllm: decay_warmup {self.decay_warmup} was given; allowed: 0 to 1")
        if self.weight_gradient not in GRADIENTS:
            raise UserError(
                f"maskllm: weight_gradient {self.weight_gradient!r} was given; allowed: {', '.join(GRADIENTS)}"
            )
        if self.schedule_shape not in SCHEDULES:
            raise UserError(
                f"maskllm: schedule_shape {self.schedule_shape!r} was given; allowed: {', '.join(SCHEDULES)}"
            )
        if self.mask_draw not in DRAWS:
            raise UserError(f"maskllm: mask_draw {self.mask_draw!r} was given; allowed: {', '.join(DRAWS)}")
        if self.logits_dtype not in DTYPES:
            raise UserError(f"maskllm: logits_dtype {self.logits_dtype!r} was given; allowed: {', '.join(DTYPES)}")

    @property
    def weights_stay(self) -> bool:
        """Unless they are trained too."""
        return not self.train_weights

    def decide(self, work: Workbench, target: NM) -> Kept:
        """Learn the mask logits of every prunable linear and keep each group's best pattern, the best tiles whole."""
        if self.mask_draw != "step" and work.model.layout.replicas_together > 1:
            raise UserError(
                f"maskllm: mask_draw {self.mask_draw} was given and with --expert-model-parallel-size "
                f"{work.model.layout.expert} the tokens of several micro-batches pass through an expert at a time: "
                "give --mask-draw step, which draws one mask for all of them in every layout"
            )
        runner = work.learn()
        draw = runner.learn_masks(
            target,
            self._weights(),
            hard=self.hard,
            straight=self.weight_gradient == "dense",
            per_step=self.mask_draw == "step",
            logits_dtype=DTYPES[self.logits_dtype],
        )
        if target.share != 1:
            runner.learn_tiles(target, self.tile_lr_multiplier)
        runner.start_logits(
            lambda mask: prior_logits(mask, target.n, target.m, self.prior_strength, self.std),
            self.std,
            self.prior_strength * self.std / 2,
        )
        runner.optimize(
            multipliers={"*mask_logits": self.lr_multiplier},
            on_step=lambda step, steps: self.schedule(draw, step, steps, runner.microbatches),
        )
        return runner.keep()

    def _weights(self) -> WeightTraining | None:
        """How the weights train, if they do."""
        from megatron_prune.training.joint import WeightTraining

        if not self.train_weights:
            return None
        return WeightTraining(
            lr_factor=self.weight_lr_multiplier,
            eps=self.weight_eps,
            clip=self.weight_clip,
            decay=self.masked_decay,
            decay_warmup=self.decay_warmup,
            norms=self.train_norms,
        )

    def idle(self, settings: Mapping[str, Any]) -> Mapping[str, str]:
        """What the start of the logits and frozen weights do not need, and calibration text where no method makes the
        prior of it.
        """
        prior, found = settings["prior"], {}
        if settings["initial_logits"]:
            found = dict.fromkeys(("prior_strength", "std"), "with --initial-logits, which are taken as they are")
        elif prior is None:
            found = {"prior_strength": "without --prior"}
        if not looks_at_text(prior):
            keys = [entry.key for entry in entries(Calibration)]
            found |= dict.fromkeys(keys, "unless --prior names a method that looks at it, such as sparsegpt")
        target = parse_any_target(settings["target"])
        if not isinstance(target, NM) or target.share == 1:
            found |= {"tile_lr_multiplier": "without tiles that stay dense, such as --target 2:4@0.75"}
        if not self.train_weights:
            found |= dict.fromkeys(WEIGHT_OPTIONS, "without --train-weights")
        elif not self.masked_decay:
            found |= {"decay_warmup": "without --masked-decay"}
        return found

    def schedule(self, draw: MaskDraw, step: int, steps: int, microbatches: int) -> dict[str, float]:
        """Move scale, temperature and regularisation to their values at `step`; returns them for the log."""
        between = SCHEDULES[self.schedule_shape]
        draw.scale = between(self.scale_start, self.scale_end, step, steps)
        draw.temperature = between(self.temperature_start, self.temperature_end, step, steps)
        strength = linear_schedule(self.weight_regularization, 0.0, step, steps)
        draw.regularization = strength / microbatches
        return {"scale": draw.scale, "temperature": draw.temperature, "weight_regularization": strength}
