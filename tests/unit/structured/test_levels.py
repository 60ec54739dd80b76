"""Levels against an independent computation: dense least squares on what hooks of transformers' own model see."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_prune.decision.source import open_model
from megatron_prune.errors import UserError
from megatron_prune.search.levels import ATTENTION, MLP, Level, Levels, attention_levels, mlp_levels
from megatron_prune.statistics.passes import Passes
from megatron_prune.tensor_files import read_tensors, write_tensors
from tests.models import tiny_blocks, tiny_model

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


def sizes(groups: int = 1, heads: int = 1, ffn: int = 0) -> Any:
    """A model of one kind of layer, by its groups, heads in each of them and neurons."""
    return SimpleNamespace(
        block=lambda _: SimpleNamespace(num_query_groups=groups, group_heads=heads, ffn_hidden_size=ffn)
    )


@pytest.mark.parametrize(
    ("width", "count", "expected"),
    [
        (64, 4, [64, 48, 32, 16, 0]),
        (66, 4, [66, 48, 32, 16, 0]),
        (100, 4, [100, 72, 48, 24, 0]),  # 75, 50, 25: the nearest multiples of 8
        (60, 4, [60, 45, 30, 15, 0]),  # steps of 15 are no multiples of anything
        (63, 4, [63, 47, 32, 16, 0]),
        (3, 10, [3, 2, 1, 0]),
        (8, 1, [8, 0]),
        (1, 1, [1, 0]),
    ],
)
def test_neurons_are_evenly_spaced(width: int, count: int, expected: list[int]) -> None:
    """In multiples of 8 where a step has two of them."""
    assert mlp_levels(sizes(ffn=width), 0, count) == [Level(ffn=ffn) for ffn in expected]


@pytest.mark.parametrize(
    ("groups", "heads", "count", "free", "expected"),
    [
        (2, 4, 4, False, [(2, 4), (2, 3), (2, 2), (2, 1)]),
        (2, 4, 2, False, [(2, 4), (2, 2)]),
        (8, 1, 4, False, [(8, 1), (6, 1), (4, 1), (2, 1)]),
        (8, 1, 4, True, [(8, 1), (6, 1), (4, 1), (2, 1)]),
        (1, 4, 4, True, [(1, 4), (1, 3), (1, 2), (1, 1)]),
        (3, 3, 9, True, [(3, 3), (3, 2), (2, 2), (2, 1), (1, 1)]),
        (2, 5, 9, True, [(2, 5), (2, 4), (2, 3), (2, 2), (2, 1), (1, 1)]),
        (5, 2, 9, True, [(5, 2), (4, 2), (3, 2), (2, 2), (2, 1), (1, 1)]),
        (5, 2, 3, True, [(5, 2), (3, 2), (2, 1)]),
        (1, 1, 4, True, [(1, 1)]),
    ],
)
def test_heads_and_groups_fall_in_turn(
    groups: int, heads: int, count: int, free: bool, expected: list[tuple[int, int]]
) -> None:
    """Heads in every group, groups where those have one, and with free groups the larger of both numbers."""
    found = attention_levels(sizes(groups, heads), 0, count, free)
    assert found == [*(Level(*level) for level in expected), Level()]


def database(path: Path, folder: Path, count: int, build: bool = True) -> Levels:
    """Levels of a model, on a few tokens."""
    tokens = torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(3))
    passes = Passes(open_model(path).load(backend.Layout()), tokens)
    levels = Levels(folder, passes, count, DAMPING)
    if build:
        levels.build(passes)
    return levels


def test_without_sizes_in_between_a_half_is_there_or_not(tmp_path: Path) -> None:
    with backend.running(backend.Layout()):
        levels = database(tiny_model(tmp_path / "model", "llama"), tmp_path / "levels", 1)
    for kind, layer in itertools.product((ATTENTION, MLP), range(2)):
        assert len(levels.sizes[kind][layer]) == 2
        assert [levels.error(kind, layer, level) for level in (0, 1)] == [0.0, 1.0]
        whole = torch.ones(3, 5)
        assert torch.equal(levels.weight(kind, layer, 0, whole), whole)
        assert torch.equal(levels.weight(kind, layer, 1, whole), torch.zeros(3, 5))
        assert [levels.gone(kind, layer, level) for level in (0, 1)] == [False, True]
    assert not levels.units(0, 1, 0).heads and not levels.units(0, 0, 1).ffn and levels.units(0, 0, 0).ffn


def test_halves_that_a_model_lacks_have_no_levels(tmp_path: Path) -> None:
    """Neither a file nor an error; the others of the same layer have theirs."""
    with backend.running(backend.Layout()):
        levels = database(tiny_blocks(tmp_path / "model", vocab_size=257), tmp_path / "levels", 4)
    lacks = {(ATTENTION, 0), (MLP, 2)}
    for kind, layer in itertools.product((ATTENTION, MLP), range(4)):
        there = (tmp_path / "levels" / f"{layer:05d}.{kind}.safetensors").exists()
        assert there == ((kind, layer) not in lacks) == (len(levels.sizes[kind][layer]) > 1)
        if not there:
            assert levels.error(kind, layer, 0) == 0.0 and levels.gone(kind, layer, 0)


DAMAGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "no_errors": lambda found: {name: tensor for name, tensor in found.items() if name != "errors"},
    "errors_of_other_levels": lambda found: {"errors": found["errors"][:-1].clone()},
    "whole_errors": lambda found: {"errors": torch.zeros(5, dtype=torch.int64)},
    "no_first_level": lambda found: {name: tensor for name, tensor in found.items() if not name.startswith("1.")},
    "no_last_level": lambda found: {name: tensor for name, tensor in found.items() if not name.startswith("3.")},
    "units_of_another_type": lambda found: {"1.kept": found["1.kept"].float()},
    "too_few_units": lambda found: {"2.kept": found["2.kept"][:-1].clone()},
    "falling_units": lambda found: {"1.kept": found["1.kept"].flip(0)},
    "repeated_units": lambda found: {"1.kept": found["1.kept"].clone().index_copy_(0, *repeated(found))},
    "a_unit_below_0": lambda found: {"1.kept": found["1.kept"] - 1 - found["1.kept"][0]},
    "a_unit_too_many": lambda found: {"1.kept": moved_up(found["1.kept"])},
    "a_weight_of_another_shape": lambda found: {"2.weight": found["2.weight"][:, :-1].clone()},
    "a_weight_of_another_height": lambda found: {"2.weight": found["2.weight"][:-1].clone()},
    "whole_weights": lambda found: {"1.weight": found["1.weight"].int()},
}


def repeated(found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.tensor([1]), found["1.kept"][:1]


def moved_up(kept: Tensor) -> Tensor:
    """The last is the first number that no unit has."""
    return torch.cat([kept[:-1], torch.tensor([8 if len(kept) == 6 else 64], dtype=kept.dtype)])


@pytest.mark.parametrize("kind", [ATTENTION, MLP])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_of_these_levels_is_refused(
    made: tuple[Levels, dict[tuple[str, int], Problem]], tmp_path: Path, kind: str, damage: str
) -> None:
    """Every size and number is looked at; what is whole is read."""
    levels = made[0]
    found = dict(read_tensors(levels.folder / f"00001.{kind}.safetensors"))
    changed = DAMAGES[damage](found)
    read = Levels.__new__(Levels)
    vars(read).update(vars(levels) | {"folder": tmp_path, "cache": {}})
    file = tmp_path / f"00001.{kind}.safetensors"
    write_tensors(found, file)
    assert read.error(kind, 1, 1) == levels.error(kind, 1, 1)
    read.cache.clear()
    write_tensors(changed if damage.startswith("no_") else found | changed, file)
    with pytest.raises(UserError, match=f"00001.{kind}.safetensors is missing or damaged .*; remove it and run again"):
        read.error(kind, 1, 1)


def test_a_folder_of_other_levels_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model", "llama")
    with backend.running(backend.Layout()):
        database(path, tmp_path / "levels", 4, build=False)
        database(path, tmp_path / "levels", 4, build=False)
        with pytest.raises(UserError, match="has other levels or damping: give the same, or a new folder"):
            database(path, tmp_path / "levels", 2, build=False)


def test_what_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the files is lost; it comes back as it was."""
    path = tiny_model(tmp_path / "model", "llama", num_hidden_layers=3)
    made: list[tuple[int, str]] = []
    plain = Levels._make

    def noted(self: Levels, layer: int, kind: str, *rest: Any) -> None:
        made.append((layer, kind))
        plain(self, layer, kind, *rest)

    monkeypatch.setattr(Levels, "_make", noted)
    with backend.running(backend.Layout()):
        levels = database(path, tmp_path / "levels", 2)
        assert made == list(itertools.product(range(3), (ATTENTION, MLP)))
        made.clear()
        (tmp_path / "levels" / "00001.mlp.safetensors").unlink()
        again = database(path, tmp_path / "levels", 2)
    assert made == [(1, MLP)]
    assert [again.error(MLP, 1, n) for n in range(3)] == [levels.error(MLP, 1, n) for n in range(3)]
