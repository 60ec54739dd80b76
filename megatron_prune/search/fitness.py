"""How far models put together from a database of levels are from the whole one: KL of next-token distributions."""

from __future__ import annotations

from collections.abc import Sequence

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.model.prunable import FC2, PROJECTION, PrunableModel
from megatron_prune.search.levels import ATTENTION, KINDS, MLP, Levels
from megatron_prune.statistics.walk import LOSS_TOKENS, Head, LayerWalk, WholeWeights
from megatron_prune.training.losses import divergence

Genome = tuple[int, ...]
"""Levels: of layer 0's attention, of its MLP, of layer 1's attention, ..."""


WHOLE_BYTES = 2 * 2**30
"""Hidden states of the whole model that are kept between calls, on each rank."""


@torch.no_grad()
def divergences(
    model: PrunableModel,
    levels: Levels,
    genomes: Sequence[Genome],
    tokens: Tensor,
    windows: slice = slice(None),
    whole: dict[int, Tensor] | None = None,
) -> list[list[float]]:
    """KL(whole model || candidate), nats per token, of every candidate on each of some `windows` of `[n, length]`.

    A number depends on candidate and window alone, to the last bit: windows are run one by one, whatever else is asked,
    and each by one rank, the same in every layout. Candidates go through the layers together; those with the same
    levels so far share their hidden states. `whole` keeps those of the whole model by window, for calls with the same
    tokens. Collective.
    """
    numbers = range(len(tokens))[windows]
    whole = {} if whole is None else whole
    places, mine = _share(len(numbers), len(genomes))
    weights = WholeWeights(model)
    walk = LayerWalk(weights, tokens[[numbers[place] for place in places]], unit_windows=1, shared=False)
    model_itself: Genome = (0,) * (len(KINDS) * model.config.num_layers)
    unknown = [] if all(numbers[place] in whole for place in places) else [model_itself]
    states = _through_layers(walk, weights, levels, [*unknown, *(genomes[n] for n in mine)])
    head = Head(weights)
    found = torch.zeros(len(genomes), len(numbers), dtype=torch.float64, device=walk.device)
    for position, place in enumerate(places):
        reference = states[model_itself][position] if unknown else whole[numbers[place]]
        if len(whole) < WHOLE_BYTES // reference.nbytes:
            whole[numbers[place]] = reference
        students = [states[genomes[n]][position] for n in mine]
        found[mine, place] = window_divergences(head, students, head, reference)
    dist.all_reduce(found)
    return found.tolist()


def _share(windows: int, candidates: int) -> tuple[list[int], list[int]]:
    """Numbers of this rank's windows and candidates: windows are shared out first, then what is left of the ranks."""
    rank, world = backend.rank(), dist.get_world_size()
    parts = min(windows, world)
    turn, place = divmod(rank, parts)
    sharing = len(range(place, world, parts))
    return list(range(place, windows, parts)), list(range(turn, candidates, sharing))


def _through_layers(
    walk: LayerWalk, weights: WholeWeights, levels: Levels, genomes: Sequence[Genome]
) -> dict[Genome, list[Tensor]]:
    """Hidden states after the last layer, of these candidates, by window. Collective."""
    states: dict[Genome, list[Tensor]] = {(): walk.hidden}
    for number in range(weights.config.num_layers):
        tensors = weights.layer(number)
        prefixes = {genome[: 2 * number + 2] for genome in genomes}
        following: dict[Genome, list[Tensor]] = {}
        for pair in sorted({prefix[-2:] for prefix in prefixes}):
            walk.load(number, replaced(levels, number, pair[0], pair[1], tensors))
            for prefix in prefixes:
                if prefix[-2:] == pair:
                    following[prefix] = [walk.run(x) for x in states[prefix[:-2]]]
        states = following
    return states


def window_divergences(head: Head, students: Sequence[Tensor], teacher: Head, reference: Tensor) -> Tensor:
    """Mean KL(reference || student) of one window by student, float64 `[students]`.

    From hidden states `[s, 1, hidden]` after the last layer, and the heads; the reference's logits are computed once.
    """
    found = torch.zeros(len(students), dtype=torch.float64, device=reference.device)
    for start in range(0, len(reference), LOSS_TOKENS):
        piece = slice(start, start + LOSS_TOKENS)
        (whole,) = teacher.logits(reference[piece])
        for number, hidden in enumerate(students):
            (student,) = head.logits(hidden[piece])
            found[number] += divergence(student, whole).sum(dtype=torch.float64)
    return found / len(reference)


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
