"""Log-likelihoods of requests by a Megatron model in any layout, or by a transformers model in one process.

Both read a plan's batches (`requests.py`): trees of tokens, with a mask and a position for each token where rows branch
and plain causal attention where they do not. The output layer is computed only where something is asked, a few hundred
places at a time, in float32 whatever the model's type: logits of 20 in bfloat16 are 0.125 apart, more than what tells
many answers apart, and would hang on which requests were computed together.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from numpy.typing import NDArray
from torch import Tensor

from megatron_prune.data.requests import Batch, Request, Scores, collect, plan
from megatron_prune.errors import UserError
from megatron_prune.kernels.products import fast_products, wide_products
from megatron_prune.log import progress
from megatron_prune.model.attention import SDPACoreAttention
from megatron_prune.model.forward import sequence_parts
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.ranks import from_leader, together

LOGITS = 1 << 24
"""Logits that are in memory at once, 64 MiB of them in float32."""
MICRO_BATCHES = 4
"""For each pipeline stage: the stages wait for each other in a fifth of the time, or less."""


class MegatronScorer:
    """A Megatron model: requests divided over replicas, batches in micro-batches through its pipeline."""

    def __init__(self, model: PrunableModel, tokens_per_batch: int) -> None:
        """`tokens_per_batch`: in one forward pass of a replica, in one micro-batch where there is a pipeline."""
        layout = model.layout
        assert layout.context == 1, "sequences are not shared"
        self.model = model
        self.longest = model.config.max_position_embeddings
        self.micro_batches = MICRO_BATCHES * layout.pipeline if layout.pipeline > 1 else 1
        self.tokens_per_batch = tokens_per_batch
        self._positions: Tensor | None = None
        self._whole = _Float32()
        model.eval()
        for chunk in model.chunks:
            _take_masks(chunk)

    @contextlib.contextmanager
    def _placing(self) -> Iterator[None]:
        """While active rotary embeddings are those of the tokens' own positions."""
        modules = [chunk.rotary_pos_emb for chunk in self.model.chunks if hasattr(chunk, "rotary_pos_emb")]
        hooks = [module.register_forward_hook(self._place) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _place(self, _module: Any, _inputs: Any, angles: Tensor) -> Tensor:
        """Rotary angles `[s, 1, 1, d]` of positions 0, 1, ... -> those of the tokens' own `[s, b, 1, d]`."""
        return angles if self._positions is None else angles[self._positions.t(), 0]

    def score(self, requests: Sequence[Request]) -> Scores:
        """See `Scorer`."""
        _check_agreement(requests)
        budget, multiple = self.tokens_per_batch * self.micro_batches, sequence_parts(self.model.layout)
        # Where windows differ from layer to layer no mask serves all of them, so rows must not branch.
        share = self.model.config.window_layers is None
        batches = plan(requests, self.longest, budget, multiple=multiple, share=share)
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        together = (
            self.model.layout.replicas_together > 1
        )  # then all replicas make the same passes, and one of them answers
        mine = batches if together else batches[replica::replicas]
        speaks = parallel_state.is_pipeline_last_stage() and self.model.tp_rank == 0 and not (together and replica)
        with fast_products(), self._placing(), progress("evaluate", len(mine), "batches") as advance:
            answers = (self._answer(batch, advance) for batch in mine)
            if parallel_state.is_pipeline_last_stage():
                total, greedy = collect(len(requests), mine, (answer for answer in answers if answer is not None))
            else:
                for _ in answers:
                    pass
        if not speaks:
            total, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
        return _whole(total, greedy)

    @torch.no_grad()
    def _answer(self, batch: Batch, advance: Callable[[int], None]) -> tuple[Any, Any] | None:
        """Answers to the questions of a batch, on the last stage. Collective in a replica."""
        states = self._states(batch)
        advance(1)
        if states is None:
            return None
        rows, columns = (torch.from_numpy(x).to(states.device) for x in np.divmod(batch.places, batch.tokens.shape[1]))
        weight = _head(self.model.chunks[-1])
        first = self.model.tp_rank * weight.shape[0]
        padding = torch.arange(weight.shape[0], device=weight.device) + first >= self.model.config.vocab_size
        group = parallel_state.get_tensor_model_parallel_group() if self.model.layout.tensor > 1 else None

        def head(states: Tensor) -> Tensor:
            return F.linear(states.float(), self._whole(weight)).masked_fill(padding, -torch.inf)

        return answer(states[columns.long(), rows.long()], head, weight.shape[0], batch, first, group)

    def _states(self, batch: Batch) -> Tensor | None:
        """`[length, rows, hidden]` after the final norm, on the last stage. Collective in a replica."""
        size = -(-batch.tokens.shape[0] // self.micro_batches)
        batch = batch.with_rows(size * self.micro_batches)

        def step(numbers: Iterator[int], chunk: GPTModel) -> tuple[Tensor, Callable[..., Any]]:
            number = next(numbers)
            tokens, positions, mask = _inputs(batch, slice(number * size, (number + 1) * size), self.model)
            self._positions = None if mask is None else positions
            return chunk(tokens, positions, mask), lambda states: (states.new_zeros(()), {"states": states})

        with _without_head(self.model.chunks[-1]):
            results = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[iter(range(self.micro_batches)) for _ in self.model.chunks]
                if self.model.layout.virtual_pipeline
                else iter(range(self.micro_batches)),
                model=self.model.chunks,
                num_microbatches=self.micro_batches,
                seq_length=batch.tokens.shape[1],
                micro_batch_size=size,
                forward_only=True,
            )
        if not results:
            return None
        states = torch.cat([result["states"] for result in results], dim=1)
        if self.model.layout.sequence_parallel:
            states = gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False)
        return states


class TransformersScorer:
    """A transformers model in this process."""

    def __init__(
        self, model: Any, longest: int, tokens_per_batch: int, window: int | None = None, share: bool = True
    ) -> None:
        """`window`: tokens that its attention reaches back, itself among them; None: all. `share`: it does so in all
        layers, and requests may share a row.
        """
        self.model = model
        self.longest = longest
        self.tokens_per_batch = tokens_per_batch
        self.window = window
        self.share = share
        self._whole = _Float32()

    def score(self, requests: Sequence[Request]) -> Scores:
        """See `Scorer`."""
        batches = plan(requests, self.longest, self.tokens_per_batch, share=self.share)
        with fast_products(), wide_products(), progress("evaluate", len(batches), "batches") as advance:
            return collect(len(requests), batches, (self._answer(batch, advance) for batch in batches))

    @torch.no_grad()
    def _answer(self, batch: Batch, advance: Callable[[int], None]) -> tuple[Any, Any]:
        place = {"device": self.model.device}
        tokens, inputs = torch.tensor(batch.tokens, dtype=torch.long, **place), {}
        if not batch.causal:
            inputs["position_ids"] = torch.tensor(batch.positions, dtype=torch.long, **place)
            inputs["attention_mask"] = additive(batch.visible(self.window), self.model.dtype, **place)
        states = self.model.base_model(tokens, use_cache=False, **inputs).last_hidden_state
        output = self.model.get_output_embeddings()
        advance(1)
        chosen = states.flatten(0, 1)[torch.tensor(batch.places, dtype=torch.long, **place)]

        def head(states: Tensor) -> Tensor:
            bias = None if output.bias is None else output.bias.float()
            return F.linear(states.float(), self._whole(output.weight), bias)

        return answer(chosen, head, output.weight.shape[0], batch)


# --- the output layer ---


class _Float32:
    """Weights of an output layer in float32: kept on a CPU, where turning them costs as much as a batch's product."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        if weight.device.type != "cpu":
            return weight.float()
        if self._kept is None:
            self._kept = weight.detach().float()
        return self._kept


def answer(
    states: Tensor,
    head: Callable[[Tensor], Tensor],
    width: int,
    batch: Batch,
    first: int = 0,
    group: dist.ProcessGroup | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Answers to the questions of a batch from the states `[p, hidden]` at its places.

    `head` gives the logits of this rank's `width` tokens of the vocabulary, number `first` and those after it; the rest
    is on the other ranks of `group`. Collective in it.
    """
    asked, targets = (torch.from_numpy(x).long().to(states.device) for x in (batch.asked, batch.targets))
    found, best = torch.empty(len(asked), device=states.device), torch.empty_like(asked, dtype=torch.bool)
    step = max(1, LOGITS // width)
    for start in range(0, states.shape[0], step):
        here = ((asked >= start) & (asked < start + step)).nonzero().flatten()
        logits = head(states[start : start + step])
        found[here], best[here] = log_probabilities(logits, asked[here] - start, targets[here], first, group)
    return found.cpu().numpy(), best.cpu().numpy()


def log_probabilities(
    logits: Tensor, asked: Tensor, targets: Tensor, first: int = 0, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """For each question `[q]` the log-probability of its target at place `asked`, and whether the target is the argmax.

    `logits`: `[p, v]` float32, this rank's part of the vocabulary from `first` on; they are overwritten. Of equal
    logits the first is the argmax. Collective in `group`.
    """
    top, winner = logits.max(dim=-1)
    winner = winner + first
    own = targets - first
    inside = (own >= 0) & (own < logits.shape[1])
    chosen = torch.where(inside, logits[asked, own.clamp(0, logits.shape[1] - 1)], 0.0)
    if group is not None:
        local = top.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        winner = torch.where(local == top, winner, torch.iinfo(winner.dtype).max)
        dist.all_reduce(winner, dist.ReduceOp.MIN, group=group)
    sums = logits.sub_(top[:, None]).exp_().sum(dim=-1)
    if group is not None:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(chosen, group=group)
    return chosen - (top + sums.log())[asked], winner[asked] == targets


# --- parts of a Megatron model ---


def _take_masks(chunk: GPTModel) -> None:
    """Give every layer the attention that takes a mask; Transformer Engine's takes none beside causal order."""
    for layer in chunk.decoder.layers:
        attention = getattr(layer.self_attention, "core_attention", None)
        if attention is not None and not isinstance(attention, SDPACoreAttention):
            layer.self_attention.core_attention = SDPACoreAttention(layer.self_attention.config)


def _inputs(batch: Batch, rows: slice, model: PrunableModel) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens and positions `[b, s]`, and an additive mask `[b, 1, s, s]` where rows branch."""
    device = backend.device()
    tokens, positions = (torch.from_numpy(x[rows]).long().to(device) for x in (batch.tokens, batch.positions))
    if batch.causal:
        return tokens, positions, None
    part = Batch(tokens=batch.tokens[rows], positions=batch.positions[rows], ends=batch.ends[rows], **_NO_QUESTIONS)
    dtype = next(model.chunks[0].parameters()).dtype
    return tokens, positions, additive(part.visible(model.config.sliding_window), dtype, device)


_NO_QUESTIONS: dict[str, Any] = dict.fromkeys(("places", "asked", "targets", "owners"), np.zeros(0, np.int32)) | {
    "causal": False
}


def additive(visible: NDArray[np.bool_], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`[b, 1, s, s]` to add to attention scores: 0 where seen, minus infinity elsewhere."""
    seen = torch.from_numpy(visible).to(device)[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def _head(chunk: GPTModel) -> Tensor:
    """This rank's rows of the output layer, `[vocab / tp, hidden]`."""
    if chunk.share_embeddings_and_output_weights:
        return chunk.shared_embedding_or_output_weight()
    return chunk.output_layer.weight


@contextlib.contextmanager
def _without_head(chunk: GPTModel) -> Iterator[None]:
    """While active a chunk gives its states after the final norm where it would give logits."""
    before, chunk.post_process = chunk.post_process, False
    try:
        yield
    finally:
        chunk.post_process = before


def _check_agreement(requests: Sequence[Request]) -> None:
    """UserError unless all processes ask the same: they would wait for each other's batches for ever. Collective."""
    digest = hashlib.sha256(repr([(list(r.context), list(r.continuation)) for r in requests]).encode()).hexdigest()

    def compare(first: str) -> None:
        if digest != first:
            raise UserError(
                "the processes read different items of the tasks: give all nodes the same lm-eval and the same files"
            )

    first = from_leader(digest)
    together(lambda: compare(first))


def _whole(total: NDArray[np.float64], greedy: NDArray[np.bool_]) -> Scores:
    """Every process's share of the answers, put together on all of them. Collective."""
    sums, all_best = (torch.from_numpy(x).to(backend.device()) for x in (total, greedy.astype(np.int32)))
    dist.all_reduce(sums)
    dist.all_reduce(all_best, dist.ReduceOp.MIN)
    return sums.cpu().numpy(), all_best.cpu().numpy().astype(bool)
