"""One training loop for every method that learns: megatron-core's schedules, DDP, optimizer and checkpoints.

The caller freezes what must not move, says what each micro-batch needs (`on_microbatch`) and pulls steps one by one.
Data is a pure function of the step, so resuming needs nothing but the step's number (and the shares of domains, where
they change), and the order of samples over micro-batches and replicas is the same in every layout:

    sample of step t, local micro-batch i, replica d, row j:   t * global_batch + (i * replicas + d) * micro_batch + j
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import tee
from typing import Any, NamedTuple, Protocol

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.log import say
from megatron_prune.model import context
from megatron_prune.model.forward import sequence_parts, window_losses
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.model.sizes import ModelConfig
from megatron_prune.option_groups import Training
from megatron_prune.training.joint import WeightTraining, holds_mask_logits
from megatron_prune.training.state import adam_of, load_training_state, training_state, use_fused_kernel


class Samples(Protocol):
    """Training data: sample `index` is a pure function of the index."""

    def sample(self, index: int) -> Tensor:
        """`[seq_length + 1]` int64 token ids."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """Mean next-token loss of the global batch, in nats per token, before the step."""
    grad_norm: float
    learning_rates: dict[str, float]
    tokens: int
    parts: dict[str, float] = field(default_factory=dict)
    """The losses that `loss` is a weighted sum of, when there are several."""


MASK_LOGITS, WEIGHTS = "mask_logits", "weights"
"""What learning rates are named after."""
BALANCED = "seq_aux_loss"
"""megatron-core's loss of the router's load (Fedus et al. 2021, arXiv:2101.03961, section 2.2), sequence by sequence:
the same however sequences are spread.
"""
RECOMPUTE: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
"""Megatron-core's settings for recomputing every layer in the backward pass."""
LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Output of the last pipeline stage -> what is differentiated, and the losses to log, by name."""


class MicroBatch(NamedTuple):
    """This rank's part of a micro-batch's sequences, int64 `[b, s / cp]` each."""

    tokens: Tensor
    positions: Tensor
    labels: Tensor


def micro_batch(windows: Tensor) -> MicroBatch:
    """Inputs and labels from windows `[b, s + 1]`."""
    tokens, labels = context.part(windows[:, :-1]).contiguous(), context.part(windows[:, 1:]).contiguous()
    positions = context.part(torch.arange(windows.shape[1] - 1, device=windows.device).expand(len(windows), -1))
    return MicroBatch(tokens, positions, labels)


class NextToken:
    """What training lowers: the mean next-token loss. Subclasses add other losses."""

    names: tuple[str, ...] = ("loss",)
    """The losses that are logged."""

    def begin(self, batches: Iterator[Tensor], count: int) -> None:
        """Called before the `count` micro-batches of a step, windows `[b, s + 1]`, go through the pipeline."""

    def forward(self, model: Any, windows: Tensor) -> tuple[Tensor, LossFunction]:
        """One micro-batch through this rank's chunk of the model."""
        tokens, positions, labels = micro_batch(windows)
        return model(tokens, positions, None, labels=labels), _mean

    def elsewhere(self) -> dict[str, float]:
        """Sums over the step's micro-batches of losses that are not the last stage's; their sum over ranks counts."""
        return {}

    def total(self, losses: dict[str, float]) -> float:
        """The loss from its parts."""
        return losses["loss"]


class Diverged(UserError):
    """The loss or the gradients are no numbers any more."""


def check_loss(step: int, loss: float) -> None:
    """Diverged when the loss of a step, before its update, is no number."""
    if not math.isfinite(loss):
        raise Diverged(
            f"the loss of step {step} is {loss}; nothing was updated and the last checkpoint is kept: lower the "
            "learning rate, or resume from that checkpoint with other settings"
        )


def check_norm(step: int, norm: float) -> None:
    """Diverged when the norm of a step's gradients is no number."""
    if not math.isfinite(norm):
        raise Diverged(
            f"the gradient norm of step {step} is {norm}; the last checkpoint is kept: lower the learning rate"
        )


class Steps(Protocol):
    """What takes optimizer steps, for a `TrainingSession`; every method is collective."""

    def step(self, step: int) -> StepResult:
        """One optimizer step, number `step` from 0; Diverged when the loss is not a number."""

    def evaluate(self, windows: Tensor) -> float:
        """Mean next-token loss over held-out windows `[n, seq_length]`."""

    def state(self, is_loading: bool) -> dict[str, Any]:
        """What is trained, as a sharded state dict to save or to fill."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state(is_loading=True)` described and a checkpoint filled."""


class Trainer:
    """Trains the parameters of a model that require gradients.

    `multipliers` gives parameters whose name matches a pattern a multiple of the base learning rate.
    `on_microbatch(step, number)` is called before each forward pass with the micro-batch's global number in its step,
    `before_update` between the last backward pass of a step and the optimizer.
    """

    def __init__(
        self,
        model: PrunableModel,
        training: Training,
        data: Samples,
        multipliers: dict[str, float] | None = None,
        on_microbatch: Callable[[int, int], None] = lambda step, number: None,
        objective: NextToken | None = None,
        before_update: Callable[[], None] = lambda: None,
        weights: WeightTraining | None = None,
    ) -> None:
        """`weights`: how weights train that do so beside mask logits."""
        self.model = model
        self.training = training
        self.data = data
        self.on_microbatch = on_microbatch
        self.objective = objective or NextToken()
        self.before_update = before_update
        self.weights = weights or WeightTraining()
        self.replicas = parallel_state.get_data_parallel_world_size()
        self.replica = parallel_state.get_data_parallel_rank()
        self.microbatches = training.num_microbatches(self.replicas)
        check_interleaving(model.layout, self.microbatches)
        if model.chunks[0].config.recompute_granularity == "full":
            _let_gradients_reach_frozen_layers(model.chunks[0])
        self.chunks = [self._wrap(chunk, number) for number, chunk in enumerate(model.chunks)]
        if training.overlap_grad_reduce:
            self._reduce_early()
        self.optimizer = self._make_optimizer(multipliers or {})
        self.scheduler = make_scheduler(self.optimizer, training)

    def _wrap(self, chunk: Any, number: int) -> DistributedDataParallel:
        chunk.config.finalize_model_grads_func = self._finish
        return DistributedDataParallel(
            config=chunk.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=self.training.overlap_grad_reduce,
                use_distributed_optimizer=self.training.use_distributed_optimizer,
            ),
            module=chunk,
            disable_bucketing=number > 0,  # later chunks of an interleaved pipeline have others' passes to hide behind
        )

    def _reduce_early(self) -> None:
        """Have buckets of gradients reduced as soon as they are whole, in a step's last micro-batch."""
        hold = [chunk.no_sync for chunk in self.chunks]
        for chunk in self.model.chunks:
            chunk.config.no_sync_func = hold if len(hold) > 1 else hold[0]
        for linear in self.model.linears():
            linear.module.passes = self.microbatches

    def _finish(self, *chunks: Any, **more: Any) -> None:
        """What gradients want after a step's last backward pass."""
        for linear in self.model.linears():
            linear.module.finish_step()
        finalize_model_grads(*chunks, **more)

    def _make_optimizer(self, multipliers: dict[str, float]) -> Any:
        t = self.training
        core = self.model.chunks[0].config
        config = OptimizerConfig(
            optimizer="adam",
            lr=t.lr,
            min_lr=t.min_lr,
            weight_decay=0.0,
            adam_beta1=t.adam_beta1,
            adam_beta2=t.adam_beta2,
            adam_eps=t.adam_eps,
            clip_grad=t.clip_grad,
            bf16=core.bf16,
            params_dtype=core.params_dtype,
            use_distributed_optimizer=t.use_distributed_optimizer,
        )
        overrides = dict(get_standard_config_overrides(config))
        for pattern, factor in multipliers.items():
            # lr_mult changes nothing by itself here; it keeps the group apart from others when a checkpoint is loaded.
            overrides[ParamKey(name=pattern)] = dict(
                max_lr=t.lr * factor, min_lr=t.min_lr * factor, wd_mult=0.0, lr_mult=factor
            )
        optimizer = get_megatron_optimizer(
            config, self.chunks, config_overrides=overrides, use_gloo_process_groups=False
        )
        use_fused_kernel(optimizer)
        self.weights.settle(optimizer, t)
        if backend.has_cuda():
            say(f"Adam: {adam_of(optimizer)}")
        return optimizer

    def step(self, step: int) -> StepResult:
        """One optimizer step, number `step` from 0; UserError naming the step when the loss is not a number."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        rates = self.learning_rates()
        self.objective.begin(self._batches(step), self.microbatches)
        parts = self._mean_losses(self._pass(self._batches(step), step))
        loss = self.objective.total(parts)
        check_loss(step, loss)
        self.before_update()
        ok, grad_norm = self.weights.update(self.optimizer, self.training.clip_grad)
        check_norm(step, grad_norm if ok else math.nan)
        self.scheduler.step(increment=1)
        tokens = self.training.global_batch_size * self.training.seq_length
        return StepResult(loss, grad_norm, rates, tokens, parts)

    def learning_rates(self) -> dict[str, float]:
        """Those of the coming step."""
        groups = self.optimizer.param_groups
        return {MASK_LOGITS if holds_mask_logits(g) else WEIGHTS: float(g["lr"]) for g in groups}

    def evaluate(self, windows: Tensor) -> float:
        """Mean next-token loss over held-out windows `[n, seq_length]`, which are spread over the replicas."""
        total, count = window_losses(self.model, windows)
        return total / count

    def _batches(self, step: int) -> Iterator[Tensor]:
        """This replica's micro-batches of a step: `[micro_batch, seq_length + 1]`."""
        return micro_batches(self.data, self.training, step, self.replica, self.replicas)

    def _pass(self, batches: Iterator[Tensor], step: int) -> list[dict[str, Tensor]]:
        """A step's micro-batches forward and backward through the pipeline; losses on the last stage only."""

        def forward_step(batches: Iterator[tuple[int, Tensor]], model: Any) -> tuple[Tensor, LossFunction]:
            number, batch = next(batches)
            self.on_microbatch(step, number * self.replicas + self.replica)
            return self.objective.forward(model, batch)

        iterators = [enumerate(each) for each in tee(batches, len(self.chunks))]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if self.model.layout.virtual_pipeline else iterators[0],
            model=self.chunks,
            num_microbatches=self.microbatches,
            seq_length=self.training.seq_length,
            micro_batch_size=self.training.micro_batch_size,
            forward_only=False,
        )

    def _mean_losses(self, losses: list[dict[str, Tensor]]) -> dict[str, float]:
        """The global batch's mean losses on every rank."""
        names, sums = self.objective.names, self.objective.elsewhere()
        count = 0
        if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
            sums |= {name: sum(float(x[name]) for x in losses) for name in names if name not in sums}
            count = len(losses)
        values = [*(sums.get(name, 0.0) for name in names), count]
        total = torch.tensor(values, dtype=torch.float64, device=backend.device())
        dist.all_reduce(total)
        *means, _ones = (total / total[-1]).tolist()
        return dict(zip(names, means, strict=True))

    def state(self, is_loading: bool) -> dict[str, Any]:
        """The sharded state dict of what is trained: trainable parameters, optimizer and schedule."""
        return training_state(self.model.chunks, self.optimizer, self.scheduler, is_loading)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state(is_loading=True)` described and a checkpoint filled."""
        load_training_state(self.model.chunks, self.optimizer, self.scheduler, state)


def micro_batches(data: Samples, t: Training, step: int, replica: int, replicas: int) -> Iterator[Tensor]:
    """The micro-batches of a step, `[micro_batch, seq_length + 1]`, of one of the model's replicas."""
    for i in range(t.num_microbatches(replicas)):
        first = step * t.global_batch_size + (i * replicas + replica) * t.micro_batch_size
        windows = torch.stack([data.sample(first + j) for j in range(t.micro_batch_size)])
        yield to_device(windows)


def to_device(windows: Tensor) -> Tensor:
    """Windows where the model is, from pinned memory: any other copy waits until the GPU has done all it was given."""
    return windows.pin_memory().to(backend.device(), non_blocking=True) if backend.has_cuda() else windows


def make_scheduler(optimizer: Any, t: Training) -> OptimizerParamScheduler:
    """Learning rates of the optimizer's groups, from now on set by `step(1)`."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=t.lr,
        min_lr=t.min_lr,
        lr_warmup_steps=t.lr_warmup_iters,
        lr_decay_steps=t.train_iters,
        lr_decay_style=t.lr_decay_style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=t.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a run may be resumed with another learning rate
    )


def model_options(training: Training) -> dict[str, Any]:
    """Of megatron-core's configuration, what training asks for."""
    found = dict(RECOMPUTE) if training.recompute else {}
    if training.moe_aux_loss_coeff:
        found |= {"moe_router_load_balancing_type": BALANCED, "moe_aux_loss_coeff": training.moe_aux_loss_coeff}
    return found


def check_learning(training: Training, layout: backend.Layout, config: ModelConfig) -> None:
    """Refuse what cannot be trained, before anything is loaded."""
    if training.moe_aux_loss_coeff and not config.num_moe_experts:
        raise UserError(
            f"--moe-aux-loss-coeff {training.moe_aux_loss_coeff} was given and the model has no experts: leave it out"
        )
    if config.num_moe_experts and layout.tensor > 1 and not layout.sequence_parallel:
        raise UserError(
            f"--tensor-model-parallel-size {layout.tensor} was given without --sequence-parallel, and the model has "
            "experts, whose tokens would be counted several times in training: give --sequence-parallel"
        )
    parts = sequence_parts(layout)
    if training.seq_length % parts:
        raise UserError(
            f"--seq-length {training.seq_length} was given; with this layout it must be a multiple of {parts} "
            "(2 x --context-parallel-size above 1, times --tensor-model-parallel-size with --sequence-parallel)"
        )
    check_interleaving(layout, training.num_microbatches(layout.data))


def check_interleaving(layout: backend.Layout, microbatches: int) -> None:
    """UserError when an interleaved pipeline could not be filled."""
    if layout.virtual_pipeline and microbatches % layout.pipeline:
        raise UserError(
            f"a step has {microbatches} micro-batches on each replica; with --virtual-pipeline-model-parallel-size it "
            f"must be a multiple of --pipeline-model-parallel-size {layout.pipeline}: change --global-batch-size"
        )


def _let_gradients_reach_frozen_layers(model: Any) -> None:
    """Make the embedding's output require a gradient.

    Recomputation runs a layer's backward only when one of its inputs asks for a gradient; with a frozen embedding the
    first layer's does not, and its mask logits would silently get none.
    """
    if model.pre_process:
        model.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))


def mean_part(losses: Tensor) -> Tensor:
    """Mean of this rank's per-token losses, as the schedule wants it: it multiplies by the number of parts of a
    sequence, and divides in place.
    """
    return losses.float().mean() / context.size()


def _mean(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a micro-batch from per-token losses `[b, s]` of this rank's part of the sequence."""
    loss = mean_part(output)
    return loss, {"loss": loss.detach() * context.size()}
