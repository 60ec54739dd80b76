"""The best uniform shape of a model within a budget (Minitron, arXiv:2407.14679, section 2.3).

Every combination of a few numbers of layers, hidden sizes, query groups and heads is completed by the widest MLP that
the budget leaves room for. Each candidate is cut from the whole model, refitted in closed form from second moments that
one pass collects, and judged by its loss on calibration windows that this pass has not seen: all of them on few, those
that none is clearly better than on more (`search/racing.py`). The paper trains its candidates for a while instead; the
refit takes that place here, since without it a candidate's loss says mostly how badly it was cut. Layers go by block
influence while shapes are compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_prune.decision.target import Budget, Shape
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.log import say
from megatron_prune.methods.structured import lowest, removed_layers
from megatron_prune.model.cost import cost
from megatron_prune.model.families import ModelConfig, get_family
from megatron_prune.model.prunable import FC1, FC2, PROJECTION, QKV, expert_of, input_symbol, second_linears
from megatron_prune.search.held_out import split
from megatron_prune.search.racing import looks, race
from megatron_prune.statistics.channels import (
    RESIDUAL,
    BlockInfluence,
    ChannelActivations,
    ChannelMoments,
    size_ratio,
)

if TYPE_CHECKING:
    from megatron_prune.statistics.passes import Passes
    from megatron_prune.statistics.store import Statistic
    from megatron_prune.statistics.walk import Change

NORM_OF = {QKV: "input_layernorm", FC1: "pre_mlp_layernorm"}

FEWEST = 0.5
"""Of layers, groups and heads at least this share stays, of the MLP and the residual stream a quarter more or less."""
FIRST_WINDOWS, FINAL_WINDOWS, FINALISTS = 4, 32, 5
"""Held-out windows that judge all shapes, those that judge the last ones, and how many shapes may always go on."""
CLOSE = 0.95
"""Shapes that use less of the budget are not worth trying."""


def best_shape(
    config: ModelConfig,
    passes: Passes,
    budget: Budget,
    width: Callable[[Iterable[Mapping[str, Any]], Shape], Units],
    refit: Refit,
) -> tuple[Shape, list[dict[str, Any]]]:
    """The shape of lowest loss, and what was seen at `sites` on the windows for fits. Collective.

    `width(found, shape)` gives the units of all layers at a shape's width, and `refit` says how they are corrected.
    """
    shapes = candidates(config, budget)
    if not shapes:
        raise UserError(
            f"target {budget}: no shape with at least {FEWEST:.0%} of the layers and heads costs so little; give "
            "more, or a shape such as num_layers=12,hidden_size=384"
        )
    fit, judging = split(passes)
    found = [settled(layer) for layer in fit.observe_each(sites(config))]
    influence = [layer[RESIDUAL].value() for layer in found]

    def losses(number: int, windows: slice) -> list[float]:
        units = width(found, shapes[number])
        removed = lowest(influence, removed_layers(config, shapes[number]))
        units = units.without_layers(removed)
        return judging.window_losses(units, refitted(config, found, units, refit), windows)

    assert judging.tokens is not None
    windows = looks(FIRST_WINDOWS, min(FINAL_WINDOWS, len(judging.tokens)))
    left = race(losses, len(shapes), windows, FINALISTS)
    say(f"{budget}: {len(shapes)} shapes tried; the best of them:")
    for number, scores in left.items():
        say(f"  loss {fmean(scores):.3f}  {shapes[number]}")
    return shapes[next(iter(left))], found


def sites(config: ModelConfig) -> dict[str, Statistic]:
    """What the search looks at. How channels of the stream vary together matters to norms that take off their mean."""
    norms: Statistic = ChannelMoments if config.centred_norm else ChannelActivations
    return {
        QKV: ChannelActivations,
        FC1: ChannelActivations,
        PROJECTION: ChannelMoments,
        FC2: ChannelMoments,
        **dict.fromkeys(NORM_OF.values(), norms),
        RESIDUAL: BlockInfluence,
    }


def settled(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's statistics, large ones in the host's memory."""
    return {site: x.settle() if isinstance(x, ChannelMoments) else x for site, x in layer.items()}


def candidates(config: ModelConfig, budget: Budget) -> list[Shape]:
    """Shapes that use the budget to at least `CLOSE`, or without one the largest that fit in."""
    fitting = [
        (cost(_sized(config, shape), budget.measure), n, shape) for n, shape in enumerate(_shapes(config, budget))
    ]
    fitting = [entry for entry in fitting if entry[0] <= budget.limit]
    close = [entry for entry in fitting if entry[0] >= CLOSE * budget.limit]
    return [shape for _, _, shape in close or sorted(fitting, reverse=True)[:FINALISTS]]


def _shapes(config: ModelConfig, budget: Budget) -> Iterator[Shape]:
    """Every combination, each with the widest MLP, or experts, that the budget has room for."""
    name = "moe_ffn_hidden_size" if config.num_moe_experts else "ffn_hidden_size"
    widest = getattr(config, name)
    family = get_family(config.family)
    ffn_step = 2 ** max(0, int(math.log2(widest / 32)))
    depth_step = max(1, round(config.num_layers / 10))
    depths = range(config.num_layers, math.ceil(config.num_layers * FEWEST) - 1, -depth_step)
    groups = _shares(config.num_query_groups, (1, 0.75, FEWEST))
    per_group = _shares(config.num_attention_heads // config.num_query_groups, (1, 0.75, FEWEST))
    experts = _expert_counts(config)
    for layers, share, group_count, heads, of in itertools.product(
        depths, (1, 7 / 8, 3 / 4), groups, per_group, experts
    ):
        unit = math.lcm(group_count * heads, 8)  # Hugging Face wants a whole number of channels for each head
        hidden = config.hidden_size if share == 1 else int(config.hidden_size * share) // unit * unit
        if not hidden or not family.opens(replace(config, hidden_size=hidden), group_count * heads):
            continue
        others = {"num_attention_heads": group_count * heads, "num_query_groups": group_count, "num_moe_experts": of}
        shape = Shape(layers, hidden, **others, **{name: ffn_step})
        least = cost(_sized(config, shape), budget.measure)
        wider: dict[str, Any] = {name: 2 * ffn_step}
        each = (cost(_sized(config, replace(shape, **wider)), budget.measure) - least) // ffn_step
        room = (budget.limit - least) // each // ffn_step * ffn_step if each else widest
        ffn = min(room + ffn_step, widest)
        if ffn >= widest / 4:
            found: dict[str, Any] = {name: ffn}
            yield replace(shape, **found)


def _expert_counts(config: ModelConfig) -> list[int | None]:
    """How many experts may stay: no fewer than a token goes to, and as many of each group."""
    if not config.num_moe_experts:
        return [None]
    most = config.num_moe_experts
    groups = config.moe_router_num_groups or 1
    least = max(config.moe_router_topk or 1, 2 * groups if groups > 1 else 1)
    counts = [groups * count for count in _shares(most // groups, (1, 0.75, FEWEST))]
    return [count for count in counts if count >= least] or [most]


def _shares(count: int, shares: Sequence[float]) -> list[int]:
    return sorted({math.ceil(count * share) for share in shares}, reverse=True)


def _sized(config: ModelConfig, shape: Shape) -> ModelConfig:
    sizes: dict[str, Any] = shape.given()
    return replace(config, blocks=None, **sizes)


@dataclass(frozen=True)
class Refit:
    """How what stays is corrected for what goes."""

    damping: float | None
    """Of the least squares; None: there is none."""
    norm_gain: bool = True


def refitted(config: ModelConfig, found: Sequence[Mapping[str, Any]], units: Units, refit: Refit) -> Change:
    """Corrections of the layers for what `units` leave out, from second moments of the whole model's inputs."""
    from megatron_prune.statistics.compensation import least_squares
    from megatron_prune.statistics.walk import FINAL_NORM

    kept_channels = torch.tensor(units.hidden)

    def gain(site: str, layer: Mapping[str, Any]) -> float:
        if not refit.norm_gain or len(kept_channels) == config.hidden_size or site not in layer:
            return 1.0
        seen = layer[NORM_OF[site]]
        moments = seen.settled if config.centred_norm else seen.sums[1]
        return size_ratio(moments, kept_channels, config.centred_norm)

    def scaled(tensor: Tensor, ratio: float) -> Tensor:
        return (tensor + config.gain_offset) * ratio - config.gain_offset

    def change(layer: int | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = dict(tensors)
        if layer is None:
            name = f"{FINAL_NORM}.weight"
            if name in changed:  # as before the last MLP: what it sees was not looked at
                changed[name] = scaled(tensors[name], gain(FC1, found[-1]))
            return changed
        for path in [PROJECTION, *second_linears(config, layer)]:
            weight = tensors.get(f"{path}.weight")
            if refit.damping is None or weight is None or not units.keeps(layer, expert_of(path)):
                continue
            kept = units.indices(config, layer, input_symbol(path), expert_of(path))
            if kept is None or len(kept) == weight.shape[1] or not found[layer][path].windows:
                continue
            kept = kept.to(weight.device)
            gram = found[layer][path].settled.to(weight.device, torch.float64)
            fitted = least_squares(weight, kept, gram[:, kept], gram[kept][:, kept], refit.damping)
            changed[f"{path}.weight"] = torch.zeros_like(weight).index_copy_(1, kept, fitted)
        for path in (PROJECTION, FC2) if config.post_layernorm and refit.norm_gain else ():
            name = f"{path}.post_layernorm.weight"
            if name in tensors and path in found[layer] and len(kept_channels) < config.hidden_size:
                weight = tensors[f"{path}.weight"].double()
                gram = found[layer][path].settled.to(weight.device, torch.float64)
                moments = ((weight @ gram) * weight).sum(1).cpu()
                changed[name] = scaled(tensors[name], size_ratio(moments, kept_channels, centred=False))
        for path, norm in NORM_OF.items():
            name = f"{norm}.weight"
            if name in tensors and path in found[layer]:
                changed[name] = scaled(tensors[name], gain(path, found[layer]))
        return changed

    return change
