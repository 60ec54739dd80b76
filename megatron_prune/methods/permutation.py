"""An order of channels with which N:M patterns keep more, while the model computes the same.

Neurons of an MLP, and channels of the residual stream, may stand in any order, as long as everything that writes or
reads them follows. N:M removes weights among neighbours; channels whose large weights lie in different rows make better
neighbours (Pool and Yu 2021, "Channel Permutations for N:M Sparsity", NeurIPS; with Wanda's scores, as here, in RIA,
Zhang et al. 2024, "Plug-and-Play", ICLR, section 4.2).

start      channels sorted by their sums of scores are dealt to the groups like cards
exchange   one channel of every group leaves it, and each goes to the group that it adds most to, so that the sum over
           all groups is the largest there is (the Hungarian method, SciPy's); then another of every group. What is kept
           never becomes less. Channels go no further than their stretch of `AT_ONCE`, or time would grow with the cube

Neurons of each MLP have an order of their own. Channels of the residual stream have one in all layers; it is chosen by
rows taken evenly from all linears that read them, every linear's scores divided by their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_prune.decision.target import NM
from megatron_prune.decision.units import BlockUnits, Units, all_of_block
from megatron_prune.log import is_leader
from megatron_prune.methods.scores import wanda_score
from megatron_prune.ranks import from_leader
from megatron_prune.statistics.activations import InputNorm
from megatron_prune.statistics.runner import Runner, WholeLinear

if TYPE_CHECKING:
    from megatron_prune.model.families import ModelConfig, WeightMap
    from megatron_prune.model.prunable import PrunableModel

RESIDUAL, NEURONS = "hidden", ("ffn", "shared_ffn")
"""Symbolic sizes (`model/sizes.py`) of inputs that may stand in any order."""
ROUNDS = 8
"""Of exchange: each channel of a group of 4 leaves it twice."""
AT_ONCE = 2048
"""Channels that change places among themselves."""
ROWS = 16384
"""By which an order is chosen, of all those that read the channels."""
HELD = 2**26
"""Numbers of a table of rows, groups and channels that are there at a time."""


def best_order(scores: Tensor, n: int, m: int, at_once: int = AT_ONCE) -> list[int]:
    """The channel that goes to each place, for scores `[rows, channels]` of which n of every m neighbours in a row are
    to have the largest sum. The channels' own order where no better one is found.
    """
    order = torch.cat([first + _exchanged(part, n, m) for first, part in _stretches(scores, at_once)])
    better = kept(scores[:, order.to(scores.device)], n, m) > kept(scores, n, m)
    return order.tolist() if better else list(range(scores.shape[1]))


def kept(scores: Tensor, n: int, m: int) -> float:
    """Sum of the n largest of every m neighbours in the rows of `scores [rows, channels]`."""
    return float(scores.unflatten(1, (-1, m)).topk(n, -1).values.sum(dtype=torch.float64))


def _stretches(scores: Tensor, at_once: int) -> Iterator[tuple[int, Tensor]]:
    return ((first, scores[:, first : first + at_once]) for first in range(0, scores.shape[1], at_once))


def _exchanged(scores: Tensor, n: int, m: int) -> Tensor:
    """`best_order` of one stretch, int64 on the CPU."""
    from scipy.optimize import linear_sum_assignment

    groups = scores.sum(0).argsort(descending=True, stable=True).view(m, -1).t()
    for _ in range(ROUNDS):
        leaving, staying = groups[:, 0], groups[:, 1:]
        gain = _gains(scores, leaving, staying, n).cpu().numpy()
        chosen = torch.from_numpy(linear_sum_assignment(gain, maximize=True)[1]).to(scores.device)
        groups = torch.cat([staying, leaving[chosen, None]], 1)
    groups = groups.sort(1).values
    return groups[groups[:, 0].argsort()].flatten().cpu()


def _gains(scores: Tensor, leaving: Tensor, staying: Tensor, n: int) -> Tensor:
    """`[groups, channels]`: what each group of `staying [groups, m - 1]` would keep more with each channel."""
    found = scores.new_zeros(len(staying), len(leaving))
    for rows in scores.split(max(1, HELD // found.numel())):
        least = rows[:, staying].topk(n, -1).values[..., -1]  # of a group's own, the last that is kept
        found += (rows[:, None, leaving] - least[:, :, None]).relu_().sum(0)
    return found


def permuted(model: PrunableModel, tokens: Tensor, target: NM, advance: Callable[[int], None]) -> Units:
    """All units of a model, its neurons and residual channels in the order for a pattern. Collective.

    `tokens`: calibration windows `[windows, length]` int64; `advance(1)` is called after each layer.
    """
    rows = sum(map.shape[0] for map in model.maps if map.prunable and _inputs(map) == RESIDUAL)
    read, orders = list[Tensor](), dict[tuple[int, str, int | None], tuple[int, ...]]()
    for linear in Runner(model, tokens, None, advance).dense(InputNorm):
        inputs = _inputs(linear.map)
        if inputs == RESIDUAL:
            scores = _scores(linear, -(-rows // ROWS))
            read.append(scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny))
        elif inputs in NEURONS:
            scores = _scores(linear, -(-linear.map.shape[0] // ROWS))
            orders[linear.layer, inputs, linear.map.expert] = _chosen([scores], target)
    blocks = tuple(_block(model.config, number, orders) for number in range(model.config.num_layers))
    return replace(Units.all(model.config), hidden=_chosen(read, target), blocks=blocks)


def check(config: ModelConfig, target: NM) -> None:
    """UserError where groups do not divide the channels that change places."""
    target.check(config.hidden_size, "the residual stream")
    for number in range(config.num_layers):
        block = config.block(number)
        target.check(block.ffn_hidden_size, f"the MLP of layer {number}")
        if block.num_moe_experts and config.shared_width:
            target.check(config.shared_width, f"the shared expert of layer {number}")


def _inputs(map: WeightMap) -> str:
    """What the inputs of a weight count."""
    return map.symbols[0][1]


def _scores(linear: WholeLinear, stride: int) -> Tensor:
    """Wanda's, of every `stride`-th row `[rows, in]`."""
    return wanda_score(linear.whole_weight[::stride].float(), linear.statistic.value())


def _chosen(scores: list[Tensor], target: NM) -> tuple[int, ...]:
    """The order that rank 0 finds, on every rank. Collective."""
    return tuple(from_leader(best_order(torch.cat(scores), target.n, target.m) if is_leader() else []))


def _block(
    config: ModelConfig, layer: int, orders: Mapping[tuple[int, str, int | None], tuple[int, ...]]
) -> BlockUnits:
    """All of a layer's units, neurons in their orders."""
    whole = all_of_block(config, layer)
    if not whole.experts:
        return replace(whole, ffn=orders.get((layer, "ffn", None), whole.ffn))
    experts = tuple(orders[layer, "ffn", expert] for expert in whole.experts)
    return replace(whole, ffn=(), expert_ffn=experts, shared_ffn=orders.get((layer, "shared_ffn", None), ()))
