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
from megatron_prune.methods.shape_search import Refit, refitted, settled, sites
from megatron_prune.model.forward import logits
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.statistics.channels import NormRatio, Regression, size_ratio
from megatron_prune.statistics.compensation import Compensation, least_squares, missing_mean
from megatron_prune.statistics.passes import Passes
from tests.models import tiny_model
from tests.reference import Reference


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
    assert all(tensor.dtype == torch.float64 for tensor in sums.tensors())
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


def test_the_ratio_of_a_layer_norm_is_of_deviations() -> None:
    """Where the stream has a mean: the least-squares gain of the cut norm, which the root mean squares miss."""
    x = 3 + torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0] * 4 + [0.2] * 4)
    kept = torch.arange(4)
    whole = torch.nn.functional.layer_norm(x, (8,))[:, kept]
    thin = torch.nn.functional.layer_norm(x[:, kept], (4,))
    centred = whole - whole.mean(-1, keepdim=True)  # a bias, not a gain, makes up for the mean
    least = float((thin * centred).sum() / thin.square().sum())
    ratio, mean_square = NormRatio(kept, centred=True), NormRatio(kept)
    for each in (ratio, mean_square):
        each.update(x)
    assert ratio.value() == pytest.approx(least, rel=0.01)
    assert abs(mean_square.value() - least) > 0.2
    # on average over tokens, from second moments
    deviation = [float(part.var(-1, unbiased=False).mean()) for part in (x[:, kept], x)]
    assert size_ratio(2 * x.t() @ x, kept, centred=True) == pytest.approx(
        (deviation[0] / deviation[1]) ** 0.5, rel=1e-4
    )
    squares = [float(part.square().mean()) for part in (x[:, kept], x)]
    for moments in (x.square().sum(0), x.t() @ x):
        assert size_ratio(moments, kept, centred=False) == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)


NORM_PATHS = {
    "llama": ("model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm", "model.norm"),
    "nemotron": ("model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm", "model.norm"),
    "gpt2": ("transformer.h.{}.ln_1", "transformer.h.{}.ln_2", "transformer.ln_f"),
}
"""In transformers' model: before the attention, before the MLP, after all layers."""
NORM_NAMES = (
    "decoder.layers.{}.input_layernorm.weight",
    "decoder.layers.{}.pre_mlp_layernorm.weight",
    "decoder.final_layernorm.weight",
)
TEXT = torch.randint(128, (6, 20), generator=torch.Generator().manual_seed(5))


def with_a_mean(path: Path, family: str) -> Reference:
    """A random model, written to `path`, whose residual stream has a mean."""
    reference = Reference(tiny_model(path, family), TEXT)
    with torch.no_grad():
        reference.model.get_input_embeddings().weight.add_(1.5)
    reference.model.save_pretrained(path)
    return reference


def sizes(family: str, x: torch.Tensor) -> torch.Tensor:
    """What the family's norms divide by, squared, of tokens `[n, s, channels]`."""
    return x.square().mean(-1) if family == "llama" else x.var(-1, unbiased=False)


@pytest.mark.parametrize("family", NORM_PATHS)
def test_every_norm_is_corrected_for_what_its_family_divides_by(tmp_path: Path, family: str) -> None:
    reference = with_a_mean(tmp_path, family)
    model = open_model(tmp_path).load(backend.Layout())
    kept = [n for n in range(32) if n % 3 and n < 28]
    places = [(layer, kind) for layer in range(2) for kind in range(2)] + [(0, 2)]
    found = {}
    for layer, kind in places:
        module = reference.model.get_submodule(NORM_PATHS[family][kind].format(layer))
        seen = reference.seen(module)
        ratio = float((sizes(family, seen[..., kept]) / sizes(family, seen)).sqrt().mean())
        offset = float(family == "nemotron")  # its norms store the gain minus one
        found[layer, kind] = (module.weight.detach() + offset) * ratio - offset
    units = replace(Units.all(model.config), hidden=tuple(kept))
    assert Compensation(model, units, TEXT, "none", 0.01, norm_gain=True).run(lambda layers: None)
    for layer, kind in places:
        gain = model.whole(model.by_name[NORM_NAMES[kind].format(layer)])
        torch.testing.assert_close(gain, found[layer, kind], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", NORM_PATHS)
def test_candidates_of_a_search_are_corrected_likewise(tmp_path: Path, family: str) -> None:
    reference = with_a_mean(tmp_path, family)
    model = open_model(tmp_path).load(backend.Layout())
    kept = tuple(n for n in range(32) if n % 3 and n < 28)
    found = [settled(layer) for layer in Passes(model, TEXT).observe_each(sites(model.config))]
    change = refitted(model.config, found, replace(Units.all(model.config), hidden=kept), Refit(None))
    for layer, kind in [(layer, kind) for layer in range(2) for kind in range(2)]:
        seen = reference.seen(reference.model.get_submodule(NORM_PATHS[family][kind].format(layer)))
        ratio = float((sizes(family, seen[..., list(kept)]).mean() / sizes(family, seen).mean()).sqrt())
        name = NORM_NAMES[kind].split(".", 3)[3]
        gain = model.whole(model.by_name[NORM_NAMES[kind].format(layer)])
        offset = float(family == "nemotron")
        changed = change(layer, {name: gain})[name]
        torch.testing.assert_close(changed, (gain + offset) * ratio - offset, rtol=1e-4, atol=1e-5)


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
