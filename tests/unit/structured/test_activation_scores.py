"""Scores from activations against the papers' formulas on what hooks see in transformers' model: random weights,
three heads in each group, nothing planted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import parse_any_target
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.methods.base import get_method
from megatron_prune.methods.depth import block_influence
from megatron_prune.methods.flap import unit_scores
from megatron_prune.methods.structured import Refitted
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.statistics.channels import ChannelActivations
from megatron_prune.statistics.passes import Passes
from tests.models import tiny_model
from tests.reference import GROUPS, HEADS, UNEVEN, WIDTH, Reference, best

LAYERS, HIDDEN, FFN = 3, 48, 40
TOKENS = torch.randint(64, (5, 16), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PrunableModel, Reference]]:
    path = tiny_model(tmp_path_factory.mktemp("uneven"), "llama", **UNEVEN)
    with backend.running(backend.Layout()):
        yield open_model(path).load(backend.Layout()), Reference(path, TOKENS)


def chosen(model: PrunableModel, name: str, target: str, **options: Any) -> Units:
    method = get_method(name, **options)
    assert isinstance(method, Refitted)
    return method.choose(model.config, Passes(model, TOKENS), parse_any_target(target))  # type: ignore[arg-type]


# --- FLAP ---


def fluctuations(layer: Any) -> dict[str, tuple[Any, int]]:
    """Of each kind of unit: the linear that it enters, and how many of them there are."""
    return {"groups": (layer.self_attn.o_proj, GROUPS), "ffn": (layer.mlp.down_proj, FFN)}


def flap_order(reference: Reference, squared: bool) -> list[tuple[float, int, str, int]]:
    """All units, the first to go first: the channels of a layer and kind standardised, then averaged over a unit."""
    order = []
    for number, layer in enumerate(reference.layers):
        for kind, (linear, units) in fluctuations(layer).items():
            x = reference.seen(linear).flatten(0, 1)
            metric = x.var(0, unbiased=False) * linear.weight.detach().double().square().sum(0)
            if squared and kind == "groups":
                metric = metric**2
            z = (metric - metric.mean()) / metric.std(unbiased=False)
            width = len(z) // units
            order += [(float(z[u * width : (u + 1) * width].mean()), number, kind, u) for u in range(units)]
    return sorted(order)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_flap_removes_in_the_order_of_standardised_channels(
    both: tuple[PrunableModel, Reference], squared: bool, share: float
) -> None:
    model, reference = both
    whole = reference.model.num_parameters()
    costs = {"groups": (2 * 3 + 2) * WIDTH * HIDDEN, "ffn": 3 * HIDDEN}
    budget = int(share * whole)
    left = {(n, kind): set(range(units)) for n in range(LAYERS) for kind, units in (("groups", GROUPS), ("ffn", FFN))}
    size = whole
    for _, layer, kind, unit in flap_order(reference, squared):
        if size > budget and len(left[layer, kind]) > 1:
            left[layer, kind].remove(unit)
            size -= costs[kind]
    units = chosen(model, "flap", f"parameters={budget}", square_attention=squared)
    for layer, block in enumerate(units.blocks):
        assert set(block.groups) == left[layer, "groups"]
        assert set(block.ffn) == left[layer, "ffn"]


def test_flap_goes_down_to_one_unit_of_a_kind_in_every_layer(both: tuple[PrunableModel, Reference]) -> None:
    """The smallest model that it can make is within its own size, and one parameter less is refused."""
    model, reference = both
    costs = (GROUPS - 1) * (2 * 3 + 2) * WIDTH * HIDDEN + (FFN - 1) * 3 * HIDDEN
    smallest = reference.model.num_parameters() - LAYERS * costs
    units = chosen(model, "flap", f"parameters={smallest}")
    assert all(len(block.groups) == len(block.ffn) == 1 for block in units.blocks)
    with pytest.raises(UserError, match="1 too many"):
        chosen(model, "flap", f"parameters={smallest - 1}")


def test_groups_that_are_alike_do_not_go_before_all_neurons() -> None:
    """Averages of many standardised channels lie near zero, as the bulk of the neurons does."""
    channels = torch.rand(3 * 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert unit_scores(channels, 3).abs().max() < 0.25
    torch.testing.assert_close(unit_scores(channels, 192), (channels - channels.mean()) / channels.std(unbiased=False))
    torch.testing.assert_close(unit_scores(torch.ones(6), 3), torch.zeros(3))


# --- Minitron ---

AGGREGATED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda x, dim: x.abs().mean(dim),
    "l2": lambda x, dim: x.square().sum(dim).sqrt(),
    "var": lambda x, dim: x.var(dim, unbiased=False),
}
PAIRS = [(batch, sequence) for batch in AGGREGATED for sequence in AGGREGATED]


def importance(x: Tensor, batch: str, sequence: str) -> Tensor:
    """`[windows, tokens, channels]` -> `[channels]`: first over the tokens of each window, then over windows."""
    return AGGREGATED[batch](AGGREGATED[sequence](x, 1), 0)


@pytest.mark.parametrize(("batch", "sequence"), PAIRS)
def test_minitron_keeps_the_neurons_and_channels_of_largest_importance(
    both: tuple[PrunableModel, Reference], batch: str, sequence: str
) -> None:
    model, reference = both
    units = chosen(model, "minitron", "ffn_hidden_size=23,hidden_size=29", batch=batch, sequence=sequence)
    hidden = torch.zeros(HIDDEN, dtype=torch.float64)
    for layer, block in zip(reference.layers, units.blocks, strict=True):
        assert block.ffn == best(importance(reference.seen(layer.mlp.down_proj), batch, sequence), 23)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            hidden += importance(reference.seen(norm, output=True), batch, sequence)
    assert units.hidden == best(hidden, 29)


@pytest.mark.parametrize(("batch", "sequence"), PAIRS)
def test_minitron_keeps_the_heads_and_groups_of_largest_importance(
    both: tuple[PrunableModel, Reference], batch: str, sequence: str
) -> None:
    """A head is the L2 norm of its channels, a group that of its heads; the best heads of a group stay in it."""
    model, reference = both
    options = {"batch": batch, "sequence": sequence, "heads": "activations"}
    fewer_heads = chosen(model, "minitron", "num_attention_heads=4", **options)
    fewer_groups = chosen(model, "minitron", "num_query_groups=1,num_attention_heads=2", **options)
    for number, layer in enumerate(reference.layers):
        channels = importance(reference.seen(layer.self_attn.o_proj), batch, sequence)
        heads = channels.view(HEADS, WIDTH).norm(dim=1)
        inside = [tuple(3 * g + h for h in best(heads[3 * g : 3 * g + 3], 2)) for g in range(GROUPS)]
        assert fewer_heads.blocks[number].heads == inside[0] + inside[1]
        (group,) = best(heads.view(GROUPS, 3).norm(dim=1), 1)
        assert fewer_groups.blocks[number].groups == (group,)
        assert fewer_groups.blocks[number].heads == inside[group]


def test_the_variance_is_of_the_activations_themselves() -> None:
    """A channel that swings between -1 and 1 varies, though its size does not."""
    x = torch.tensor([[-1.0, 1.0], [1.0, 1.2], [-1.0, 0.8], [1.0, 1.0]])[:, None]
    found = ChannelActivations(2)
    found.update(x)
    torch.testing.assert_close(found.importance("mean", "var"), torch.tensor([1.0, 0.02]).double())


# --- block influence ---


def test_block_influence_is_a_mean_over_tokens(both: tuple[PrunableModel, Reference]) -> None:
    """Of 1 - cos(input, output) of each token, not of tokens' means."""
    model, reference = both
    expected = []
    for layer in reference.layers:
        before, after = reference.seen(layer), reference.seen(layer, output=True)
        cosines = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        expected.append(float(1 - cosines.mean()))
    assert block_influence(Passes(model, TOKENS)) == pytest.approx(expected, rel=1e-5)
    order = sorted(range(LAYERS), key=expected.__getitem__)
    assert chosen(model, "shortgpt", "num_layers=1").layers == (order[-1],)
