"""Column- and row-parallel linears that can multiply their weight by a learned N:M mask.

One mixin serves both: megatron-core's `_forward_impl` is handed `mask * weight` instead of `weight`, so collectives,
sequence parallelism and biases stay megatron-core's own. The mask logits are `[out, in / M, patterns]`, sharded exactly
like the weight they belong to:

    weight        [out, in]          row 0:  w w w w | w w w w | ...      a group is M = 4 consecutive inputs of a row
    mask_logits   [out, in/4, 6]     row 0:   o(6)   |   o(6)  | ...      one logit for each of the C(4, 2) patterns
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import megatron_prune.backend as backend  # isort: skip
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_prune.kernels.gumbel import Draw, Position, decode, masked_weight, patterns
from megatron_prune.kernels.tiles import Shard, blended


@dataclass
class MaskDraw:
    """What one forward pass of a mask-learning model draws; shared by all its linears and moved on by the trainer."""

    n: int
    m: int
    seed: int
    scale: float = 1.0
    temperature: float = 1.0
    regularization: float = 0.0
    """Weight of -sum((W * mask)^2) in the loss of one micro-batch."""
    hard: bool = False
    straight: bool = False
    """Weights that are trained get the gradient of the masked weight as it is, removed ones too."""
    step: int = 0
    microbatch: int = 0
    """Global number of the micro-batch inside its step, over all data-parallel ranks."""
    noise: bool = True
    per_step: bool = False
    """All micro-batches of a step see one mask, that of micro-batch 0."""
    recompute: bool = False
    """Layers run again in the backward pass, each micro-batch in the order of its first run."""
    logits_dtype: torch.dtype = torch.float32
    decoded: bool = False
    """Use each group's best pattern instead of a sample: what the finished mask will do."""
    off: bool = False
    """Use the weights without masks: the model as a teacher of its own masks."""

    def draw(self, tensor_id: int, pending: deque[int]) -> Draw | None:
        """The noise key of one linear in this pass; None for the noiseless mask.

        With recomputation the backward pass of a micro-batch may come after the forward passes of others, so a linear
        keeps the numbers of those that it has yet to run again in `pending`.
        """
        if self.per_step:
            return Draw(self.seed, self.step, 0, tensor_id) if self.noise else None
        microbatch = self.microbatch
        if self.recompute and not torch.is_grad_enabled():
            pending.append(microbatch)
        elif self.recompute:
            microbatch = pending.popleft()
        return Draw(self.seed, self.step, microbatch, tensor_id) if self.noise else None


@dataclass
class LinearTiles:
    """The tiles of one linear that learn to stay dense; in a step of `training.tiles`."""

    shard: Shard
    logits: Tensor
    """`[lines, across]` of the unsharded weight, their threshold taken off: a leaf with this rank's gradient."""
    decided: Callable[[], Tensor]
    """Those that would stay dense now, bool `[lines, across]`."""


class StepWeight:
    """A masked weight that all micro-batches of a step share, and the sum of their gradients.

    The mask and its gradient are work of the size of the logits; where the mask is one, both are done once.
    """

    def __init__(self, step: int, weight: Tensor, after: int | None, done: Callable[[], None]) -> None:
        """`done` is called after so many backward passes, `after`."""
        self.step = step
        self.after = after
        self.done = done
        self.weight = weight.detach().requires_grad_()
        self.gradient: Tensor | None = None
        """Float32, like the weight: bfloat16 would lose what is small beside the sum so far."""
        self.passes = 0
        self.weight.register_post_accumulate_grad_hook(self._add)

    def _add(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self.gradient = weight.grad.float() if self.gradient is None else self.gradient.add_(weight.grad)
        self.passes += 1
        weight.grad = None
        if self.passes == self.after:
            self.done()


def sequence_parallel(module: MaskedLinear) -> bool:
    """Whether a linear that is whole on every tensor-parallel rank sees a part of the tokens on each of them."""
    return bool(getattr(module.weight, "sequence_parallel", False))


class MaskedLinear(torch.nn.Module):
    """Mixin over megatron-core's parallel linears; without `learn_mask` it behaves exactly like them."""

    shard_axis: int | None = 0
    """Axis of weight and mask logits that tensor parallelism splits: 0 column-parallel, 1 row-parallel; None: none."""
    weight: torch.nn.Parameter
    tp_group: Any
    is_expert: bool

    changed_weight: Callable[[Tensor], Tensor] | None = None
    """Makes a forward pass's weight from the stored one (adapters of `training.lora`)."""
    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    extra_axes: dict[str, int] = {}
    """Axis that tensor parallelism splits, by name of such a parameter; others are replicated."""
    mask_draw: MaskDraw | None = None
    position: Position | None = None
    tensor_id: int = -1
    tiles: LinearTiles | None = None
    """Where tiles of the weight may stay dense."""
    dense_rows: Tensor | None = None
    """bool `[out]`: those that stay dense, of a linear in which some do; the logits of their groups never move."""
    seen_together = 1.0
    """Micro-batches whose tokens one pass has: an expert's are those of several replicas."""
    shared: StepWeight | None = None
    """In mask learning with `MaskDraw.per_step`, from a step's first pass to its end."""
    passes: int | None = None
    """Backward passes that a step takes on this rank, where megatron-core is to be told when the gradient of the logits
    is whole: it then begins to reduce it over the replicas, while the layers below are at work.
    """

    def learn_mask(
        self, mask_draw: MaskDraw, position: Position, tensor_id: int, dense_rows: Tensor | None = None
    ) -> None:
        """Add zero mask logits for `mask_draw`'s pattern; `position` places this shard in the unsharded weight.

        `dense_rows`: bool `[out]`, those that are not masked.
        """
        out, inputs = self.weight.shape
        count = patterns(mask_draw.n, mask_draw.m).shape[0]
        logits = torch.nn.Parameter(
            torch.zeros(out, inputs // mask_draw.m, count, dtype=mask_draw.logits_dtype, device=self.weight.device)
        )
        if self.shard_axis is None:
            setattr(logits, "sequence_parallel", sequence_parallel(self))
        else:
            set_tensor_model_parallel_attributes(logits, True, self.shard_axis, 1)
        logits.allreduce = getattr(self.weight, "allreduce", True)  # type: ignore[attr-defined]
        self.mask_logits = logits
        self.mask_draw, self.position, self.tensor_id = mask_draw, position, tensor_id
        self.dense_rows = None if dense_rows is None else dense_rows.to(self.weight.device)
        self.pending: deque[int] = deque()
        self.gradient_accumulation_fusion = False

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.mask_draw is not None:
            weight = self._masked(weight, self.mask_draw)
        elif self.changed_weight is not None:
            weight = self.changed_weight(weight)
        return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]

    def _masked(self, weight: Tensor, draw: MaskDraw) -> Tensor:
        if draw.off:
            return weight
        if draw.decoded:
            return weight * self.decided_mask()
        if not (draw.per_step and self.training):
            return self._drawn(weight, draw, draw.regularization if self.training else 0.0)
        if self.shared is None or self.shared.step != draw.step:
            with torch.no_grad():
                self.shared = StepWeight(draw.step, self._drawn(weight, draw, 0.0), self.passes, self.finish_step)
        return self.shared.weight

    def decided_mask(self) -> Tensor:
        """What learning would keep now: of each group the best pattern, and all of what is dense. bool `[out, in]`."""
        if self.mask_draw is None:
            return torch.ones_like(self.weight, dtype=torch.bool)
        mask = decode(self.mask_logits, self.mask_draw.n, self.mask_draw.m)
        if self.dense_rows is not None:
            mask[self.dense_rows] = True
        return mask if self.tiles is None else mask | self.tiles.shard.spread(self.tiles.decided())

    @property
    def learned_logits(self) -> Tensor:
        """The mask logits of the rows that are masked, `[rows, in / M, patterns]`."""
        return self.mask_logits if self.dense_rows is None else self.mask_logits[~self.dense_rows]

    def finish_step(self) -> None:
        """After a step's last backward pass: hand the gradient of a mask that was one for all of them to the logits.

        Does nothing where that has been done.
        """
        shared, self.shared = self.shared, None
        if shared is None or shared.gradient is None:
            return
        assert self.mask_draw is not None
        with torch.enable_grad():
            masked = self._drawn(self.weight, self.mask_draw, self.mask_draw.regularization * shared.passes)
        masked.backward(shared.gradient.to(masked.dtype))

    def _drawn(self, weight: Tensor, draw: MaskDraw, regularization: float) -> Tensor:
        assert self.position is not None
        if self.passes is not None:
            # megatron-core's hook wants to see a gradient, and is told that it has been added already.
            self.mask_logits.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        key = draw.draw(self.tensor_id, self.pending)
        dense = None if self.dense_rows is None else self.dense_rows[:, None]
        masked = masked_weight(
            weight if dense is None else weight.masked_fill(dense, 0.0),  # of what is 0 no mask has a gradient
            self.mask_logits,
            n=draw.n,
            m=draw.m,
            scale=draw.scale,
            temperature=draw.temperature,
            draw=key,
            position=self.position,
            hard=draw.hard,
            straight=draw.straight,
            regularization=regularization * self.seen_together,
            accumulate_into=getattr(self.mask_logits, "main_grad", None),
            stand_in=self.passes is not None,
        )
        if dense is not None:
            return torch.where(dense, weight, masked)
        if self.tiles is None:
            return masked
        return blended(
            weight,
            masked,
            self.tiles.logits,
            self.tiles.shard,
            scale=draw.scale,
            temperature=draw.temperature,
            draw=key,
            hard=draw.hard,
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Weight and mask logits split along the same axis, so that any layout loads what another saved."""
        axes = dict(self.extra_axes)
        if self.shard_axis is not None:
            axes |= {"weight": self.shard_axis, "mask_logits": self.shard_axis}
        if self.shard_axis == 0:
            axes["bias"] = 0
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class MaskedColumnParallelLinear(MaskedLinear, ColumnParallelLinear):
    """`[out / tp, in]`: every rank holds whole rows."""

    shard_axis = 0


class MaskedGatedLinear(MaskedColumnParallelLinear):
    """`linear_fc1` of a gated MLP: this rank's rows are `[gate_r; up_r]`, not a contiguous slice of `[gate; up]`.

    MLP.sharded_state_dict knows that only for the weight; without the same treatment mask logits and adapters saved
    under one tensor-parallel size load permuted, and silently, under another.
    """

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """As the base class, with what is split like the weight in gate and up halves."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        single = (metadata or {}).get("singleton_local_shards", False)
        for key in (f"{prefix}{name}" for name in ("mask_logits", *self.extra_axes)):
            if key in state:
                state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets, single)
        return state


class MaskedRowParallelLinear(MaskedLinear, RowParallelLinear):
    """`[out, in / tp]`: every rank holds a slice of all rows."""

    shard_axis = 1


class ReplicatedLinear(torch.nn.Module):
    """`[out, in]` on every tensor-parallel rank, without a bias; with sequence parallelism of a part of the tokens."""

    is_expert = False

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, tp_group: Any) -> None:
        super().__init__()
        self.tp_group = tp_group
        like = dict(dtype=config.params_dtype, device=backend.device())
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, **like))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """`[..., in]` -> `[..., out]`, and no bias, in the form of megatron-core's linears."""
        return self._forward_impl(x, self.weight), None

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.linear(input, weight)


class MaskedReplicatedLinear(MaskedLinear, ReplicatedLinear):
    """The same with a mask; every rank draws the same one."""

    shard_axis = None
