"""What must not change a score: calibration text given twice, the order of heads in a group, the split of a scale
between a norm and the linears behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_prune.decision.source import open_model
from megatron_prune.methods.depth import block_influence
from megatron_prune.methods.flap import Flap
from megatron_prune.methods.llm_pruner import LLMPruner
from megatron_prune.methods.minitron import head_scores
from megatron_prune.methods.shortened_llama import layer_saliences
from megatron_prune.methods.taylor import FORMS
from megatron_prune.model.prunable import FC1, FC2, PROJECTION, QKV, PrunableModel
from megatron_prune.statistics.channels import AGGREGATIONS, ChannelActivations
from megatron_prune.statistics.passes import Passes
from tests.models import tiny_model
from tests.reference import GROUPS, HEADS, UNEVEN, WIDTH

LAYERS = 2
Scores = dict[str, Tensor]
FEW = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrunableModel]:
    path = tiny_model(tmp_path_factory.mktemp("uneven"), "llama", **(UNEVEN | {"num_hidden_layers": LAYERS}))
    with backend.running(backend.Layout()):
        yield open_model(path).load(backend.Layout())


def text(seed: int, windows: int = 3) -> Tensor:
    return torch.randint(64, (windows, 12), generator=torch.Generator().manual_seed(seed))


def activation_scores(model: PrunableModel, tokens: Tensor) -> Scores:
    """Of heads and neurons by every pair of Minitron's aggregations, of groups and neurons by FLAP, of layers."""
    passes = Passes(model, tokens)
    found: Scores = {"influence": torch.tensor(block_influence(passes))}
    for layer, seen in enumerate(passes.observe(dict.fromkeys((PROJECTION, FC2), ChannelActivations))):
        for batch in AGGREGATIONS:
            for sequence in AGGREGATIONS:
                name = f"{layer} {batch} {sequence}"
                found[f"ffn {name}"] = seen[FC2].importance(batch, sequence)
                found[f"heads {name}"] = head_scores(seen[PROJECTION].importance(batch, sequence), WIDTH)
        for squared in (True, False):
            flap = Flap(square_attention=squared)._scores(model.config, layer, seen, passes)
            found |= {f"flap {kind} {layer} {squared}": scores for kind, scores in flap.items()}
    return found


def taylor_scores(model: PrunableModel, tokens: Tensor) -> Scores:
    """Of groups, neurons, channels and layers by all of LLM-Pruner's forms, of layers by Shortened LLaMA's."""
    found: Scores = {"layers": torch.tensor(layer_saliences(Passes(model, tokens)))}
    for form in FORMS:
        method = LLMPruner(taylor=form, gradient_windows=0, gradient_length=0)
        scores = method._importance(model.config, Passes(model, tokens), outer=True)
        found |= {f"groups {form} {n}": x for n, x in enumerate(scores.groups)}
        found |= {f"ffn {form} {n}": x for n, x in enumerate(scores.ffn)}
        found |= {f"hidden {form}": scores.hidden, f"layer {form}": torch.tensor(scores.layers)}
    return found


def same(found: Scores, expected: Scores, normalised: bool = False) -> None:
    """Equal but for rounding; `normalised`: up to a factor of all scores of a kind."""
    assert found.keys() == expected.keys()
    for name, scores in found.items():
        other = expected[name]
        if normalised:
            scores, other = (x / x.abs().sum() for x in (scores, other))
        torch.testing.assert_close(scores, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()), msg=name)


@FEW
@given(seed=st.integers(0, 10**6), times=st.integers(2, 5))
def test_text_that_is_given_again_changes_no_order(model: PrunableModel, seed: int, times: int) -> None:
    tokens = text(seed)
    for scores in (activation_scores, taylor_scores):
        same(scores(model, tokens.repeat(times, 1)), scores(model, tokens), normalised=True)


@contextlib.contextmanager
def changed(model: PrunableModel, changes: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """The model with other tensors, by their unsharded names."""
    before = {name: model.whole(model.by_name[name]).clone() for name in changes}
    try:
        for name, change in changes.items():
            model.assign(model.by_name[name], change(before[name]))
        yield
    finally:
        for name, tensor in before.items():
            model.assign(model.by_name[name], tensor)


@FEW
@given(seed=st.integers(0, 10**6), order=st.permutations(range(3)), layer=st.integers(0, LAYERS - 1))
def test_heads_of_a_group_may_stand_in_any_order(model: PrunableModel, seed: int, order: list[int], layer: int) -> None:
    """Their scores go with them, and nothing else changes."""
    tokens = text(seed)
    moved = torch.tensor([3 * group + head for group in range(GROUPS) for head in order])
    columns = (moved[:, None] * WIDTH + torch.arange(WIDTH)).flatten()

    def rows(qkv: Tensor) -> Tensor:  # of a group: three heads of queries, a key, a value
        grouped = qkv.unflatten(0, (GROUPS, 5, WIDTH))
        return torch.cat([grouped[:, order], grouped[:, 3:]], dim=1).flatten(0, 2)

    name = f"decoder.layers.{layer}.self_attention."
    changes = {name + "linear_qkv.weight": rows, name + "linear_proj.weight": lambda w: w[:, columns]}
    before = activation_scores(model, tokens) | taylor_scores(model, tokens)
    expected = {
        key: scores[moved] if key.startswith(f"heads {layer} ") and len(scores) == HEADS else scores
        for key, scores in before.items()
    }
    with changed(model, changes):
        same(activation_scores(model, tokens) | taylor_scores(model, tokens), expected)


@FEW
@given(seed=st.integers(0, 10**6), layer=st.integers(0, LAYERS - 1), site=st.sampled_from([QKV, FC1]))
def test_a_scale_may_be_the_norms_or_its_linears(model: PrunableModel, seed: int, layer: int, site: str) -> None:
    """Each channel of a norm's output times something, the columns behind it divided by that: the same model."""
    tokens = text(seed)
    scale = torch.rand(48, generator=torch.Generator().manual_seed(seed)) * 3 + 0.3
    norm = {QKV: "input_layernorm", FC1: "pre_mlp_layernorm"}[site]
    name = f"decoder.layers.{layer}."
    changes = {f"{name}{norm}.weight": lambda gain: gain * scale, f"{name}{site}.weight": lambda w: w / scale}
    before = activation_scores(model, tokens) | taylor_scores(model, tokens)
    with changed(model, changes):
        same(activation_scores(model, tokens) | taylor_scores(model, tokens), before)
