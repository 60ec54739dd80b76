"""Levels against an independent computation: dense least squares on what hooks of transformers' own model see."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_prune.decision.source import open_model
from megatron_prune.search.levels import ATTENTION, MLP, Levels
from megatron_prune.statistics.passes import Passes
from tests.models import tiny_model

LAYERS, GROUPS, HEADS, WIDTH, DAMPING = 2, 2, 4, 4, 0.01
"""Heads in a group, and channels of a head."""


class Problem:
    """One linear of transformers' model: what enters it `[tokens, in]`, and its weight `[out, in]`; float64."""

    def __init__(self, inputs: Tensor, weight: Tensor) -> None:
        self.inputs, self.weight = inputs, weight
        self.output = inputs @ weight.t()
        self.penalty = DAMPING * float(inputs.square().sum(0).mean())

    def refit(self, kept: Sequence[int]) -> Tensor:
        """The weight `[out, kept]` whose output is nearest to the whole output; the penalty holds it to the old one."""
        old, root = self.weight[:, list(kept)].t(), self.penalty**0.5
        rows = torch.cat([self.inputs[:, list(kept)], root * torch.eye(len(kept), dtype=torch.float64)])
        wanted = torch.cat([self.output, root * old])
        return torch.linalg.lstsq(rows, wanted).solution.t()

    def error(self, kept: Sequence[int], weight: Tensor) -> float:
        """Squared output error, as a share of the squared output."""
        missing = self.output - self.inputs[:, list(kept)] @ weight.t()
        return float(missing.square().sum() / self.output.square().sum())

    def objective(self, kept: Sequence[int]) -> float:
        """What a choice of inputs costs after the best refit; removed weights are changes, too."""
        weight = self.refit(kept)
        change = self.weight.clone()
        change[:, list(kept)] -= weight
        missing = self.output - self.inputs[:, list(kept)] @ weight.t()
        return float(missing.square().sum() + self.penalty * change.square().sum())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Levels, dict[tuple[str, int], Problem]]]:
    """A database of levels, and the same linears in transformers."""
    path = tiny_model(
        tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=LAYERS, num_attention_heads=GROUPS * HEADS
    )
    tokens = torch.randint(128, (12, 24), generator=torch.Generator().manual_seed(3))
    with backend.running(backend.Layout()):
        passes = Passes(open_model(path).load(backend.Layout()), tokens)
        levels = Levels(tmp_path_factory.mktemp("levels") / "database", passes, 4, DAMPING)
        levels.build(passes)
        yield levels, problems(path, tokens)


def problems(path: Path, tokens: Tensor) -> dict[tuple[str, int], Problem]:
    """Of every output and down projection."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    places = {ATTENTION: "self_attn.o_proj", MLP: "mlp.down_proj"}
    linears = {
        (kind, n): layer.get_submodule(place)
        for n, layer in enumerate(model.model.layers)
        for kind, place in places.items()
    }
    seen: dict[tuple[str, int], Tensor] = {}
    for key, linear in linears.items():
        linear.register_forward_pre_hook(lambda _module, inputs, key=key: seen.update({key: inputs[0].flatten(0, 1)}))
    with torch.no_grad():
        model(tokens)
    return {key: Problem(seen[key].double(), linear.weight.detach().double()) for key, linear in linears.items()}


def channels(heads: Sequence[int]) -> list[int]:
    """Inputs of the output projection that belong to heads."""
    return [WIDTH * head + n for head in heads for n in range(WIDTH)]


def kept_units(levels: Levels, kind: str, layer: int, level: int) -> list[int]:
    block = levels.units(layer, *((level, 0) if kind == ATTENTION else (0, level)))
    return list(block.heads if kind == ATTENTION else block.ffn)


@pytest.mark.parametrize(("kind", "layer"), list(itertools.product((ATTENTION, MLP), range(LAYERS))))
def test_weights_and_errors_are_those_of_a_dense_solve(
    made: tuple[Levels, dict[tuple[str, int], Problem]], kind: str, layer: int
) -> None:
    """Of every level, whatever the order in which its units went."""
    levels, problem = made[0], made[1][kind, layer]
    for level in range(1, len(levels.sizes[kind][layer]) - 1):
        units = kept_units(levels, kind, layer, level)
        kept = channels(units) if kind == ATTENTION else units
        expected = problem.refit(kept)
        found = levels.weight(kind, layer, level, problem.weight)
        torch.testing.assert_close(found[:, kept], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert not found[:, [n for n in range(found.shape[1]) if n not in kept]].any()
        assert levels.error(kind, layer, level) == pytest.approx(problem.error(kept, expected), rel=1e-3)
        untouched = problem.error(kept, problem.weight[:, kept])
        assert levels.error(kind, layer, level) < 0.95 * untouched  # the refit is worth something here


def test_heads_that_go_cost_the_least_of_all_choices(made: tuple[Levels, dict[tuple[str, int], Problem]]) -> None:
    """One of each group, from those that the level before has."""
    levels, tables = made
    for layer in range(LAYERS):
        problem = tables[ATTENTION, layer]
        before = [list(range(HEADS * group, HEADS * (group + 1))) for group in range(GROUPS)]
        for level in range(1, HEADS):
            choices = [
                [head for group in before for head in group if head not in gone] for gone in itertools.product(*before)
            ]
            best = min(choices, key=lambda heads: problem.objective(channels(heads)))
            assert kept_units(levels, ATTENTION, layer, level) == best
            before = [[head for head in group if head in best] for group in before]


def test_neurons_go_one_by_one_the_cheapest_first(made: tuple[Levels, dict[tuple[str, int], Problem]]) -> None:
    levels, tables = made
    problem, kept = tables[MLP, 0], list(range(levels.sizes[MLP][0][0].ffn))
    while len(kept) > levels.sizes[MLP][0][1].ffn:
        others = [[n for n in kept if n != gone] for gone in kept]
        kept = min(others, key=problem.objective)
    assert kept_units(levels, MLP, 0, 1) == kept
