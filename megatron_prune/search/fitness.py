"""How far models put together from a database of levels are from the whole one: KL of next-token distributions."""

from __future__ import annotations

from collections.abc import Sequence

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.model.prunable import FC2, PROJECTION, PrunableModel
from megatron_prune.search.levels import ATTENTION, MLP, Levels
from megatron_prune.statistics.walk import Head, LayerWalk, WholeWeights
from megatron_prune.training.losses import divergence

Genome = tuple[int, ...]
"""Levels: of layer 0's attention, of its MLP, of layer 1's attention, ..."""


@torch.no_grad()
def divergences(model: PrunableModel, levels: Levels, genomes: Sequence[Genome], tokens: Tensor) -> list[float]:
    """Mean KL(whole model || candidate), nats per token, of every candidate on windows `[n, length]`. Collective.

    Candidates are shared out over the ranks, so each is computed by one, the same in every layout. They go through the
    layers together; those with the same levels so far share their hidden states.
    """
    weights = WholeWeights(model)
    walk = LayerWalk(weights, tokens, shared=False)
    mine = list(genomes)[backend.rank() :: dist.get_world_size()]
    layers = model.config.num_layers
    whole: Genome = (0,) * (2 * layers)
    states: dict[Genome, list[Tensor]] = {(): walk.hidden}
    for number in range(layers):
        tensors = weights.layer(number)
        prefixes = {genome[: 2 * number + 2] for genome in [whole, *mine]}
        following: dict[Genome, list[Tensor]] = {}
        for pair in sorted({prefix[-2:] for prefix in prefixes}):
            walk.load(number, replaced(levels, number, pair[0], pair[1], tensors))
            for prefix in prefixes:
                if prefix[-2:] == pair:
                    following[prefix] = [walk.run(x) for x in states[prefix[:-2]]]
        states = following
    head = Head(weights)
    found = torch.zeros(len(genomes), dtype=torch.float64, device=walk.device)
    for place, genome in enumerate(mine):
        total, count = divergence_sums(head, states[genome], head, states[whole])
        found[backend.rank() + place * dist.get_world_size()] = total / count
    dist.all_reduce(found)
    return found.tolist()


def divergence_sums(head: Head, states: Sequence[Tensor], teacher: Head, reference: Sequence[Tensor]) -> Tensor:
    """Summed KL(teacher || student) over this rank's tokens and their number, float64 `[2]`.

    From hidden states `[s, b, hidden]` after the last layer, those of both models for the same windows.
    """
    total = torch.zeros(2, dtype=torch.float64, device=backend.device())
    for x, y in zip(states, reference, strict=True):
        for student, other in zip(head.logits(x), teacher.logits(y), strict=True):
            losses = divergence(student, other)
            total += torch.stack([losses.sum(dtype=torch.float64), total.new_tensor(float(losses.numel()))])
    return total


def replaced(levels: Levels, layer: int, attention: int, mlp: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors with the linears behind its halves at these levels, zero where inputs are gone."""
    found = dict(tensors)
    for kind, path, level in ((ATTENTION, PROJECTION, attention), (MLP, FC2, mlp)):
        name = f"{path}.weight"
        if level and name in tensors:
            found[name] = levels.weight(kind, layer, level, tensors[name])
        bias = tensors.get(f"{path}.bias")
        if bias is not None and levels.gone(kind, layer, level):
            found[f"{path}.bias"] = torch.zeros_like(bias)
    return found
