"""Layers run one by one against transformers' own model: hidden states, logits, losses, what submodules see."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_prune.decision.pruned import cut
from megatron_prune.decision.source import open_model
from megatron_prune.decision.units import Units
from megatron_prune.model.prunable import FC1, FC2, PROJECTION, QKV, PrunableModel
from megatron_prune.statistics import walk as walk_module
from megatron_prune.statistics.walk import CutWeights, Head, LayerWalk, WholeWeights, units_of
from tests.models import tiny_model

WINDOWS, LENGTH = 5, 11


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with backend.running(backend.Layout()):
        yield


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(128, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PrunableModel, Any]:
    """Rotary and learned positions; an output layer of its own and a tied one."""
    path = tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return open_model(path).load(backend.Layout()), theirs


@pytest.fixture
def model(both: tuple[PrunableModel, Any]) -> PrunableModel:
    return both[0]


@torch.no_grad()
def their_logits(theirs: Any, tokens: Tensor) -> Tensor:
    return theirs(tokens).logits


@pytest.mark.parametrize(
    ("windows", "length"), [(1, 1), (7, 300), (9, 512), (5, 1024), (4, 1025), (3, 2048), (3, 5000)]
)
def test_units_hold_as_many_windows_as_their_tokens_allow(windows: int, length: int) -> None:
    """About 2048 tokens, at least one window; all windows, each once, in their order."""
    units = units_of(windows, length)
    assert list(itertools.chain.from_iterable(range(windows)[unit] for unit in units)) == list(range(windows))
    most = max(n for n in range(1, 3000) if n == 1 or n * length <= 2048)
    assert [unit.stop - unit.start for unit in units] == [most] * len(units) and len(units) == -(-windows // most)


@pytest.mark.parametrize("together", [None, 1, 2])
@pytest.mark.parametrize("piece", [512, 7])
def test_logits_and_losses_are_transformers(
    both: tuple[PrunableModel, Any], tokens: Tensor, together: int | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many windows are run together, and tokens given to the head at once."""
    monkeypatch.setattr(walk_module, "LOSS_TOKENS", piece)
    model, theirs = both
    walk = LayerWalk(WholeWeights(model), tokens, unit_windows=together)
    assert [len(range(WINDOWS)[unit]) for unit in walk.units] == ([5], [1] * 5, [2, 2, 1])[together or 0]
    walk.finish()
    expected = their_logits(theirs, tokens)
    pieces = [list(Head(walk.weights).logits(hidden)) for hidden in walk.hidden]
    assert all(1 <= len(part) <= piece for parts in pieces for part in parts)
    for unit, parts in zip(walk.units, pieces, strict=True):
        torch.testing.assert_close(torch.cat(parts), expected[unit].transpose(0, 1).flatten(0, 1), atol=1e-4, rtol=1e-4)
    losses = F.cross_entropy(expected[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten(), reduction="none")
    found = walk.losses(walk.hidden)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, losses.view(WINDOWS, -1).mean(1), atol=1e-5, rtol=1e-5)


def be_rank(rank: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have walks take this process for one of several."""
    monkeypatch.setattr(walk_module, "dist", SimpleNamespace(get_rank=lambda: rank, get_world_size=lambda: world))


def test_every_rank_has_its_units_or_all_of_them(
    model: PrunableModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, shares = WholeWeights(model), []
    for rank in range(3):
        be_rank(rank, 3, monkeypatch)
        shares.append([unit.start for unit in LayerWalk(weights, tokens, unit_windows=1).units])
        alone = LayerWalk(weights, tokens, unit_windows=2, shared=False)
        assert [unit.start for unit in alone.units] == [0, 2, 4] and alone.windows == WINDOWS
    assert shares == [[0, 3], [1, 4], [2]]


def test_losses_of_other_ranks_windows_are_zero(
    model: PrunableModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the sum over ranks is everybody's."""
    whole = LayerWalk(WholeWeights(model), tokens, unit_windows=2)
    expected = whole.losses(whole.hidden)
    be_rank(1, 2, monkeypatch)
    part = LayerWalk(WholeWeights(model), tokens, unit_windows=2)
    found = part.losses(part.hidden)
    torch.testing.assert_close(found[2:4], expected[2:4])
    assert not found[:2].any() and not found[4:].any() and expected.all()


def test_a_watch_ends_where_nothing_more_is_asked_for(model: PrunableModel, tokens: Tensor) -> None:
    """Submodules that follow are not run, unless the layer's output is asked for, too."""
    walk = LayerWalk(WholeWeights(model), tokens)
    walk.load(0, walk.weights.layer(0))
    (hidden,) = walk.hidden
    ran: list[str] = []
    for path in (QKV, PROJECTION, FC1, FC2):
        walk.module.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
    seen, output = walk.watch([QKV, PROJECTION], hidden)
    assert set(seen) == {QKV, PROJECTION} and output is hidden and ran == [QKV]
    again, output = walk.watch([QKV, PROJECTION], hidden, whole=True)
    assert all(torch.equal(again[path], seen[path]) for path in seen) and ran[1:] == [QKV, PROJECTION, FC1, FC2]
    assert torch.equal(output, walk.run(hidden)) and not torch.equal(output, hidden)


def test_inputs_that_are_seen_are_transformers(tmp_path: Path, tokens: Tensor) -> None:
    path = tiny_model(tmp_path, "llama")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected: dict[str, Tensor] = {}
    layer = theirs.model.layers[1]
    for place, module in (
        (QKV, layer.self_attn.q_proj),
        (PROJECTION, layer.self_attn.o_proj),
        (FC2, layer.mlp.down_proj),
    ):
        module.register_forward_pre_hook(lambda _module, inputs, place=place: expected.update({place: inputs[0]}))
    their_logits(theirs, tokens)
    walk = LayerWalk(WholeWeights(open_model(path).load(backend.Layout())), tokens)
    for number in range(2):
        walk.load(number, walk.weights.layer(number))
        seen, _ = walk.watch(list(expected), walk.hidden[0])
        walk.advance()
    for place, inputs in expected.items():
        torch.testing.assert_close(seen[place].transpose(0, 1), inputs, atol=1e-5, rtol=1e-5)


def test_cut_weights_are_those_of_the_model_that_is_cut(model: PrunableModel, tokens: Tensor) -> None:
    """Without its first layer, a group of heads, some neurons and channels; and with what a change makes of them."""
    whole = Units.all(model.config)
    (_, block) = whole.blocks
    heads = block.heads[: len(block.heads) // 2]
    groups = block.groups[: len(block.groups) // 2]
    small = replace(block, heads=heads, groups=groups, ffn=block.ffn[3:40])
    units = replace(whole, layers=(1,), hidden=whole.hidden[:24], blocks=(small,))
    expected, found = WholeWeights(cut(model, units)), CutWeights(model, units)
    assert found.config == replace(expected.config, hf_config=found.config.hf_config) and found.dtype == expected.dtype
    assert set(found.layer(0)) == set(expected.layer(0)) and found.outer("no.such.weight") is None
    for name, tensor in expected.layer(0).items():
        assert torch.equal(found.layer(0)[name], tensor), name
    asked: list[int | None] = []

    def doubled(layer: int | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        asked.append(layer)
        return {name: 2 * tensor for name, tensor in tensors.items()}

    changed = CutWeights(model, units, doubled)
    for name, tensor in expected.layer(0).items():
        assert torch.equal(changed.layer(0)[name], 2 * tensor), name
    for name in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight"):
        outer = expected.outer(name)
        assert outer is not None and torch.equal(changed.outer(name), 2 * outer)  # type: ignore[arg-type]
        assert torch.equal(found.outer(name), outer)  # type: ignore[arg-type]
    assert set(asked) == {1, None}  # layers by their numbers in the whole model


def test_a_walk_needs_windows(model: PrunableModel) -> None:
    with pytest.raises(RuntimeError, match="needs calibration windows"):
        LayerWalk(WholeWeights(model), None)


@torch.no_grad()
def test_a_layer_is_held_once_and_is_not_the_models_own(model: PrunableModel, tokens: Tensor) -> None:
    """It runs on the tensors that it is given; what becomes of the model meanwhile does not reach it."""
    walk = LayerWalk(WholeWeights(model), tokens)
    tensors = walk.weights.layer(0)
    walk.load(0, tensors)
    for name, parameter in walk.module.named_parameters():
        assert parameter.data_ptr() == tensors[name].data_ptr(), name
    expected = walk.run(walk.hidden[0])
    kept = {map.megatron: model.whole(map).clone() for map in model.maps if map.layer == 0}
    for name in kept:
        model.assign(model.by_name[name], torch.full_like(kept[name], 7.0))
    assert torch.equal(walk.run(walk.hidden[0]), expected)
    for name, tensor in kept.items():
        model.assign(model.by_name[name], tensor)
    walk.ready(0)
    assert not any(parameter.numel() for parameter in walk.module.parameters())
