"""Optimizer steps on a model that FSDP2 shards: data, schedule, clipping and losses are those of the Megatron engine.

Each micro-batch's gradients are summed over the processes as they come, so that what accumulates is sharded, too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from megatron_prune.fsdp.model import ShardedModel, ShardedZeros, local
from megatron_prune.option_groups import Training
from megatron_prune.training.loop import Samples, StepResult, check_loss, check_norm, make_scheduler, micro_batches
from megatron_prune.training.losses import divergence, hidden_distance, next_token
from megatron_prune.training.state import MOMENTS
from megatron_prune.training.weighting import Weighting, teacher_layer


class Objective:
    """The weighted sum of next-token loss, distillation and the distance of hidden states."""

    def __init__(self, student: ShardedModel, weighting: Weighting, teacher: ShardedModel | None) -> None:
        """Hidden states need a teacher as wide and at least as deep."""
        self.student = student
        self.weighting = weighting
        self.teacher = teacher
        self.pairs: list[tuple[int, int]] = []
        self.outputs: dict[tuple[str, int], Tensor] = {}
        """Of the layers that are compared, in the present micro-batch."""
        if teacher is not None and weighting.hidden:
            count, of = len(student.layers), len(teacher.layers)
            self.pairs = [(layer, teacher_layer(layer, count, of)) for layer in range(count)]
            for own, other in self.pairs:
                student.layers[own].register_forward_hook(partial(self._keep, ("student", own)))
                teacher.layers[other].register_forward_hook(partial(self._keep, ("teacher", other)))

    def _keep(self, key: tuple[str, int], _module: Any, _inputs: Any, output: Any) -> None:
        self.outputs[key] = output[0] if isinstance(output, tuple) else output

    def losses(self, windows: Tensor) -> dict[str, Tensor]:
        """Means over the tokens of a micro-batch's windows `[b, s + 1]`, float32, of the losses that have a weight."""
        tokens, labels = windows[:, :-1], windows[:, 1:]
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher.logits(tokens)
        logits = self.student.logits(tokens)
        parts = {}
        if self.weighting.lm:
            parts["lm_loss"] = next_token(logits, labels).mean()
        if taught is not None and self.weighting.distillation:
            parts["distillation_loss"] = divergence(logits, taught, self.weighting.temperature).mean()
        if self.pairs:
            parts["hidden_loss"] = torch.stack([self._distance(*pair) for pair in self.pairs]).mean()
        self.outputs.clear()
        return parts

    def _distance(self, own: int, other: int) -> Tensor:
        return hidden_distance(self.outputs["student", own], self.outputs["teacher", other], self.weighting.hidden_kind)


class FsdpTrainer:
    """Trains all weights of a model; those of `zeros` stay. A `Steps`."""

    def __init__(
        self,
        model: ShardedModel,
        training: Training,
        data: Samples,
        objective: Objective,
        zeros: ShardedZeros | None,
    ) -> None:
        self.model = model
        self.training = training
        self.data = data
        self.objective = objective
        self.zeros = zeros
        self.optimizer = torch.optim.AdamW(
            model.parameters.values(),
            lr=training.lr,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            weight_decay=0.0,
            fused=True,
        )
        self.scheduler = make_scheduler(self.optimizer, training)

    def step(self, step: int) -> StepResult:
        """As `Steps` says."""
        t, weighting = self.training, self.objective.weighting
        rate = float(self.optimizer.param_groups[0]["lr"])
        parts = self._accumulate(step)
        loss = weighting.total(parts)
        check_loss(step, loss)
        if self.zeros is not None:
            self.zeros.clear_gradients()
        norm = self._clip()
        check_norm(step, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step(increment=1)
        return StepResult(loss, norm, {"weights": rate}, t.global_batch_size * t.seq_length, parts)

    def _accumulate(self, step: int) -> dict[str, float]:
        """The gradients of a global batch's mean loss, and its losses, the same on every rank."""
        rank, world = dist.get_rank(), dist.get_world_size()
        count = self.training.num_microbatches(world)
        weights = self.objective.weighting.parts
        sums = torch.zeros(len(weights), dtype=torch.float64, device=backend.device())
        for windows in micro_batches(self.data, self.training, step, rank, world):
            losses = self.objective.losses(windows)
            total = torch.stack([weight * losses[name] for name, weight in weights.items()]).sum()
            (total / count).backward()  # FSDP2 takes the mean over ranks
            sums += torch.stack([losses[name].detach() for name in weights])
        dist.all_reduce(sums)
        return dict(zip(weights, (sums / (count * world)).tolist(), strict=True))

    def _clip(self) -> float:
        """Scale the gradients down to the largest norm allowed; the norm that they had."""
        parameters = self.model.parameters.values()
        square = backend.square_sum(local(parameter.grad) for parameter in parameters)
        dist.all_reduce(square)
        norm = square.sqrt().float()
        if self.training.clip_grad:
            clip_grads_with_norm_(parameters, self.training.clip_grad, norm)
        return float(norm)

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> float:
        """As `Steps` says; a rank without a window left reads the last one again, for nothing."""
        rank, world = dist.get_rank(), dist.get_world_size()
        totals = torch.zeros(2, dtype=torch.float64, device=backend.device())
        for first in range(0, len(windows), world):
            number = min(first + rank, len(windows) - 1)
            tokens = windows[number : number + 1].to(backend.device())
            logits = self.model.logits(tokens)[:, :-1]
            if first + rank < len(windows):
                losses = next_token(logits, tokens[:, 1:]).double()
                totals += torch.stack([losses.sum(), totals.new_tensor(losses.numel())])
        self.objective.outputs.clear()
        dist.all_reduce(totals)
        return float(totals[0] / totals[1])

    def state(self, is_loading: bool) -> dict[str, Any]:
        """As `Steps` says: by kind and Hugging Face name, sharded tensors that share the memory of what is trained."""
        state: dict[str, Any] = {"model": {}, "optimizer": {kind: {} for kind in MOMENTS}}
        for name, parameter in self.model.parameters.items():
            state["model"][name] = parameter.detach()
            for kind in MOMENTS:
                own = self.optimizer.state[parameter]
                state["optimizer"][kind][name] = torch.zeros_like(parameter.detach()) if is_loading else own[kind]
        return {**state, "updates": self.scheduler.num_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """As `Steps` says; the parameters have been filled where they are."""
        done = state["updates"]
        for name, parameter in self.model.parameters.items():
            moments = {kind: state["optimizer"][kind][name] for kind in MOMENTS}
            step = torch.tensor(float(done), device=parameter.device)
            self.optimizer.state[parameter] = {"step": step, **moments}
        self.scheduler.num_steps = done
        self.scheduler.step(increment=0)
