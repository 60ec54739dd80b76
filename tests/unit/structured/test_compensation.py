"""Closed-form compensation: exact where it can be, better than nothing where it cannot, and inert when nothing went."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.decision.pruned import cut
from megatron_prune.decision.source import open_model
from megatron_prune.decision.units import BlockUnits, Units
from megatron_prune.model.forward import logits
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.statistics.channels import NormRatio, Regression
from megatron_prune.statistics.compensation import Compensation, least_squares, missing_mean
from tests.models import tiny_model


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with backend.running(backend.Layout()):
        yield


def test_inputs_that_depend_on_others_are_made_up_for_exactly() -> None:
    """Input 3 is input 0 plus twice input 1: three inputs do what four did."""
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(200, 3, generator=generator)
    a = torch.cat([b, b[:, :1] + 2 * b[:, 1:2]], dim=1)
    weight = torch.randn(5, 4, generator=generator)
    sums = Regression(4, 3)
    for part_a, part_b in zip(a.split(70), b.split(70), strict=True):
        sums.update(part_a, part_b)
    fitted = least_squares(weight, torch.arange(3), sums.cross, sums.gram, damping=1e-9)
    torch.testing.assert_close(b @ fitted.t(), a @ weight.t(), atol=1e-4, rtol=0)
    torch.testing.assert_close(missing_mean(weight, fitted, sums), torch.zeros(5), atol=1e-4, rtol=0)
    held = least_squares(weight, torch.arange(3), sums.cross, sums.gram, damping=1e9)
    torch.testing.assert_close(held, weight[:, :3], atol=1e-4, rtol=0)
    silent = least_squares(weight, torch.arange(3), torch.zeros_like(sums.cross), torch.zeros_like(sums.gram), 0.01)
    torch.testing.assert_close(silent, weight[:, :3])
    narrow = weight[:, :3]
    mean = (a @ weight.t() - b @ narrow.t()).mean(0)
    torch.testing.assert_close(missing_mean(weight, narrow, sums), mean, atol=1e-5, rtol=0)


def test_the_norm_ratio_is_a_mean_over_tokens() -> None:
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    ratio = NormRatio(torch.tensor([0, 1]))
    ratio.update(x)
    assert ratio.value() == pytest.approx((2**0.5 + 1.0) / 2)


def compensated(path: Path, family: str, refit: str, hidden: bool = False) -> tuple[float, PrunableModel]:
    """Mean squared difference of the logits of a thinned and corrected model from those of the whole one."""
    whole = open_model(path).load(backend.Layout())
    model = open_model(path).load(backend.Layout())
    units = Units.all(model.config)
    if hidden:
        units = replace(units, hidden=tuple(range(2, 30)))
    else:
        block = units.blocks[0]
        units = replace(units, blocks=(BlockUnits(block.groups, block.heads, tuple(range(8, 60))),) * 2)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(128, (24, 32), generator=generator)
    changed = Compensation(model, units, text, refit, 0.01, norm_gain=refit != "none").run(lambda layers: None)
    assert changed == (refit != "none" and (hidden or family == "gpt2" or refit != "mean"))
    fresh = torch.randint(128, (8, 32), generator=generator)
    difference = logits(cut(model, units), fresh) - logits(whole, fresh)
    return float(difference.square().mean()), model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_refit_comes_closer_on_other_text(tmp_path: Path, family: str) -> None:
    tiny_model(tmp_path, family)
    errors = {refit: compensated(tmp_path, family, refit)[0] for refit in ("none", "mean", "local", "propagated")}
    assert errors["local"] < 0.9 * errors["none"]
    assert errors["propagated"] < 0.9 * errors["none"]
    if family == "gpt2":
        assert errors["mean"] < errors["none"]


def test_channels_of_the_residual_stream_are_made_up_for(tmp_path: Path) -> None:
    tiny_model(tmp_path, "llama")
    errors = {refit: compensated(tmp_path, "llama", refit, hidden=True)[0] for refit in ("none", "local", "propagated")}
    assert errors["propagated"] < errors["none"] and errors["local"] < errors["none"]


def test_nothing_is_changed_for_layers_that_stay_whole(tmp_path: Path) -> None:
    tiny_model(tmp_path, "llama")
    model = open_model(tmp_path).load(backend.Layout())
    before = {map.megatron: model.whole(map).clone() for map in model.maps}
    units = Units.all(model.config)
    assert not units.thins(model.config) and not units.without_layers([0]).thins(model.config)
    whole = units.blocks[0]
    units = replace(units, blocks=(whole, BlockUnits(whole.groups, whole.heads, tuple(range(30)))))
    tokens = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))
    assert Compensation(model, units, tokens, "propagated", 0.01, norm_gain=True).run(lambda layers: None)
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, model.whole(model.by_name[name]))]
    assert changed == ["decoder.layers.1.mlp.linear_fc2.weight"]
