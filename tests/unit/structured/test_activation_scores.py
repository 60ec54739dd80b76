"""Scores from activations against the papers' formulas on what hooks see in transformers' model: random weights,
three heads in each group, nothing planted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import parse_any_target
from megatron_prune.decision.units import Units
from megatron_prune.methods.base import get_method
from megatron_prune.methods.structured import Refitted
from megatron_prune.model.prunable import PrunableModel
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


def test_groups_that_are_alike_do_not_go_before_all_neurons() -> None:
    """Averages of many standardised channels lie near zero, as the bulk of the neurons does."""
    from megatron_prune.methods.flap import unit_scores

    channels = torch.rand(3 * 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert unit_scores(channels, 3).abs().max() < 0.25
    torch.testing.assert_close(unit_scores(channels, 192), (channels - channels.mean()) / channels.std(unbiased=False))
    torch.testing.assert_close(unit_scores(torch.ones(6), 3), torch.zeros(3))
