"""Forward passes of a sharded model: losses per token and whole logits, through megatron-core's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prune.model import context
from megatron_prune.model.prunable import PrunableModel


def _no_loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return output.new_zeros(()), {"output": output}


def forward_only(model: PrunableModel, tokens: Tensor, labels: Tensor | None = None) -> Tensor | None:
    """Logits `[b, s, vocab / tp]` of tokens `[b, s]`, or per-token losses `[b, s]` given labels; last stage only.

    Sequence and context parallelism need a length that their sizes divide: tokens are padded at the end, where causal
    attention cannot see them, and the outputs cut back. So is the batch for an interleaved pipeline, which must be
    filled with micro-batches.
    """
    batch, length = tokens.shape
    layout = model.layout
    model.config.check_length(length)
    count = layout.pipeline if layout.virtual_pipeline else 1
    padding = (0, -length % sequence_parts(layout), 0, -batch % count)
    inputs = [tokens] if labels is None else [tokens, labels]
    micro = [context.part(F.pad(x.to(backend.device()), padding)).chunk(count) for x in inputs]
    places = torch.arange(length + padding[1], device=backend.device()).clamp(max=length - 1)
    positions = context.part(places.expand(micro[0][0].shape[0], -1))

    def forward_step(batches: Iterator[Any], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        tokens, *labels = next(batches)
        return chunk(tokens, positions, None, labels=labels[0] if labels else None), _no_loss

    iterators = [zip(*micro, strict=True) for _ in model.chunks]
    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if layout.virtual_pipeline else iterators[0],
            model=model.chunks,
            num_microbatches=count,
            seq_length=length + padding[1],
            micro_batch_size=positions.shape[0],
            forward_only=True,
        )
    if not results:
        return None
    return context.whole(torch.cat([result["output"] for result in results]))[:batch, :length]


def sequence_parts(layout: backend.Layout) -> int:
    """What the length of a sequence must be a multiple of."""
    shared = 2 * layout.context if layout.context > 1 else 1
    return shared * (layout.tensor if layout.sequence_parallel else 1)


def window_losses(model: PrunableModel, windows: Tensor, micro_batch_size: int = 1) -> tuple[float, int]:
    """Summed next-token loss (nats) of windows `[n, s]` and the number of predicted tokens, on every rank.

    Within a window each token but the first is predicted from those before it. Windows are spread over data-parallel
    replicas; the loss is in float32, its sum in float64. Collective.
    """
    model.eval()
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = windows[replica::replicas]
    counted = mine.shape[0]
    if (
        model.layout.replicas_together > 1
    ):  # as many passes as the others, of the same sizes: one window may come once more
        mine = torch.cat([mine, windows[: -(-windows.shape[0] // replicas) - counted]])
    totals = torch.zeros(2, dtype=torch.float64, device=backend.device())
    micro_batch_size *= model.layout.pipeline if model.layout.virtual_pipeline else 1
    for start in range(0, mine.shape[0], micro_batch_size):
        batch = mine[start : start + micro_batch_size]
        output = forward_only(model, batch, torch.roll(batch, -1, dims=1))
        if output is not None and model.tp_rank == 0 and parallel_state.get_context_parallel_rank() == 0:
            losses = output[: max(0, counted - start), :-1].double()
            totals += torch.stack([losses.sum(), totals.new_tensor(float(losses.numel()))])
    dist.all_reduce(totals)
    return float(totals[0]), int(totals[1])


def logits(model: PrunableModel, tokens: Tensor) -> Tensor:
    """Logits `[b, s, vocab]` in float32 of tokens `[b, s]`, on every rank. Collective."""
    model.eval()
    output = forward_only(model, tokens)
    shape = (*tokens.shape, model.config.vocab_size)
    whole = torch.empty(shape, dtype=torch.float32, device=backend.device())
    if output is not None:
        whole = _whole_vocabulary(model, output).float().contiguous()
    if model.layout.pipeline > 1:
        last = (model.layout.pipeline - 1) * (dist.get_world_size() // model.layout.pipeline)
        dist.broadcast(whole, src=last)
    return whole


def _whole_vocabulary(model: PrunableModel, local: Tensor) -> Tensor:
    """Join the vocabulary shards `[b, s, vocab / tp]` of a tensor-parallel group and drop the padding."""
    if model.layout.tensor == 1:
        return local[..., : model.config.vocab_size]
    parts = [torch.empty_like(local) for _ in range(model.layout.tensor)]
    dist.all_gather(parts, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)[..., : model.config.vocab_size]
