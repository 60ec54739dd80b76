"""Levels, evolution, integer program: what is useless goes, budgets hold, a killed search goes on, zeros stay."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.decision.pruned import cut
from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import Budget
from megatron_prune.errors import UserError
from megatron_prune.methods.base import get_method
from megatron_prune.methods.darwinlm import DarwinLM
from megatron_prune.model.cost import cost, parameters
from megatron_prune.model.forward import logits
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.search import evolution as evolution_module
from megatron_prune.search import fitness as fitness_module
from megatron_prune.search import integer as integer_module
from megatron_prune.search import levels as levels_module
from megatron_prune.search import memory as memory_module
from megatron_prune.search import offspring as offspring_module
from megatron_prune.search.candidates import put
from megatron_prune.search.evolution import Generation, Stage, next_generation
from megatron_prune.search.fitness import Genome, _share, divergences
from megatron_prune.search.integer import best_sum, single_replacements
from megatron_prune.search.levels import ATTENTION, MLP, Level, Levels, attention_levels, mlp_levels
from megatron_prune.search.memory import Memory
from megatron_prune.search.mutation import Mutation
from megatron_prune.search.offspring import Judge, School
from megatron_prune.search.session import Search
from megatron_prune.search.space import Space
from megatron_prune.statistics.passes import Passes
from megatron_prune.training.loop import Diverged
from megatron_prune.training.stopping import Stopped, StopRequest
from megatron_prune.training.zeros import Zeros
from tests.models import byte_tokenizer, tiny_llama, tiny_model, words

LAYERS, USELESS = 4, 2
SMALL = {"levels": 4, "generations": 3, "offspring": 6, "survivors": "2,1", "fitness_tokens": "48,96"}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with backend.running(backend.Layout()):
        yield


def load(path: Path) -> PrunableModel:
    """A model of random weights in which the MLP of one layer adds nothing."""
    model = open_model(tiny_model(path, "llama", num_hidden_layers=LAYERS, num_attention_heads=8)).load(
        backend.Layout()
    )
    map = model.by_name[f"decoder.layers.{USELESS}.mlp.linear_fc2.weight"]
    model.assign(map, torch.zeros(map.shape))
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PrunableModel:
    return load(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(128, (12, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def database(model: PrunableModel, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Levels:
    passes = Passes(model, tokens)
    found = Levels(tmp_path_factory.mktemp("levels") / "database", passes, 4, 0.001)
    found.build(passes)
    return found


def judging(model: PrunableModel, database: Levels, tokens: Tensor, folder: Path = Path("/nowhere")) -> Judge:
    """Candidates are judged by all of the windows, and trained on them, too."""
    memory = Memory(folder, [4] * (2 * LAYERS), len(tokens))
    return Judge(model, database, tokens, memory, lambda: School(model, tokens, 1e-3, 2))


def budget(model: PrunableModel, share: float) -> Budget:
    return Budget(int(share * parameters(model.config)))


def test_levels_are_spaced_from_all_to_none(model: PrunableModel) -> None:
    assert attention_levels(model.config, 0, 4) == [Level(2, 4), Level(2, 3), Level(2, 2), Level(2, 1), Level()]
    assert [level.ffn for level in mlp_levels(model.config, 0, 4)] == [64, 48, 32, 16, 0]


def test_levels_are_nested_and_their_errors_rise(database: Levels) -> None:
    for layer, kind in itertools.product(range(LAYERS), (ATTENTION, MLP)):
        errors = [database.error(kind, layer, level) for level in range(5)]
        if (layer, kind) != (USELESS, MLP):
            assert errors[0] == 0 and errors[-1] == 1 and errors == sorted(errors)
        kept = [database.units(layer, *((n, 0) if kind == ATTENTION else (0, n))) for n in range(5)]
        sets = [set(block.heads if kind == ATTENTION else block.ffn) for block in kept]
        assert all(smaller < larger for larger, smaller in itertools.pairwise(sets)) and not sets[-1]


def test_a_candidate_is_judged_as_the_model_that_comes_out(
    model: PrunableModel, database: Levels, tokens: Tensor, tmp_path: Path
) -> None:
    """Its divergence is that of the cut model's logits; the whole model's is zero."""
    genome: Genome = (1, 2, 4, 0, 3, 4, 2, 1)
    whole = logits(model, tokens[:4]).log_softmax(-1)
    other = load(tmp_path)
    put(other, database, genome)
    space = Space(model.config, database, budget(model, 0.9))
    smaller = cut(other, space.units(genome))
    assert parameters(smaller.config) == space.cost(genome)
    student = logits(smaller, tokens[:4]).log_softmax(-1)
    expected = (whole.exp() * (whole - student)).sum(-1).mean(-1).tolist()
    found = divergences(model, database, [genome, (0,) * 8, genome], tokens[:4])
    assert found[0] == found[2] == pytest.approx(expected, rel=1e-3) and found[1] == pytest.approx([0] * 4, abs=1e-7)
    assert min(expected) > 1e-4


def test_a_divergence_depends_on_candidate_and_window_alone(
    model: PrunableModel, database: Levels, tokens: Tensor
) -> None:
    """To the bit: whatever else is judged with it, and before; so memory decides nothing."""
    genomes: list[Genome] = [(1, 2, 4, 0, 3, 4, 2, 1), (1, 2, 4, 0, 1, 1, 1, 1), (0, 1) * 4]
    together = divergences(model, database, genomes, tokens[:6])
    for number, window in itertools.product(range(3), range(6)):
        ((alone,),) = divergences(model, database, [genomes[number]], tokens[window : window + 1])
        assert alone == together[number][window]
    whole: dict[int, Tensor] = {}
    first = divergences(model, database, genomes[:1], tokens, slice(0, 2), whole)
    assert first == [together[0][:2]] and sorted(whole) == [0, 1]
    assert divergences(model, database, genomes, tokens, slice(1, 4), whole) == [found[1:4] for found in together]
    whole[0].zero_()  # it is used, not computed again
    assert divergences(model, database, genomes[:1], tokens, slice(0, 1), whole) != [together[0][:1]]


@pytest.mark.parametrize(("windows", "candidates", "world"), [(4, 3, 1), (4, 3, 8), (3, 5, 8), (9, 2, 4), (2, 1, 16)])
def test_every_rank_has_a_share(windows: int, candidates: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each candidate is judged on each window by one rank; ranks have work as long as there is enough."""
    monkeypatch.setattr(fitness_module.dist, "get_world_size", lambda: world)
    pairs: list[tuple[int, int]] = []
    idle = 0
    for rank in range(world):
        monkeypatch.setattr(fitness_module.backend, "rank", lambda rank=rank: rank)
        mine = list(itertools.product(*_share(windows, candidates)))
        pairs += mine
        idle += not mine
    assert sorted(pairs) == list(itertools.product(range(windows), range(candidates)))
    assert idle <= max(0, world - windows * candidates)


def test_budgets_hold_and_useless_halves_go(model: PrunableModel, database: Levels, tokens: Tensor) -> None:
    space = Space(model.config, database, budget(model, 0.8))
    genome = space.start()
    assert space.fits(genome)
    for gene, level in enumerate(genome):  # nothing more fits in
        assert not level or not space.fits((*genome[:gene], level - 1, *genome[gene + 1 :]))
    rng = random.Random(0)
    for trade in (True, False):
        mutate = Mutation(space, 3, trade)
        children = [mutate(genome, rng) for _ in range(30)]
        assert all(space.fits(child) for child in children) and len(set(children)) > 5
    judge, mutate = judging(model, database, tokens), Mutation(space, 3, True)
    for number in range(12):
        genome = next_generation(genome, number, 0, [Stage(1, 96, 0)], 8, mutate, judge).parent
    assert genome[2 * USELESS + 1] == 4
    with pytest.raises(UserError, match="are left"):
        Space(model.config, database, Budget(100))


@pytest.mark.parametrize("measure", ["forward_flops", "kv_cache_bytes"])
def test_other_budgets(model: PrunableModel, database: Levels, measure: str) -> None:
    """Heads that share keys and values save no cache, MLPs none at all: only what saves is paid for."""
    limit = int(0.8 * cost(model.config, measure))
    space = Space(model.config, database, Budget(limit, measure))
    genome = space.start()
    smaller = space.units(genome).config(model.config)
    assert space.cost(genome) == cost(smaller, measure) <= limit
    if measure == "kv_cache_bytes":
        assert not any(genome[1::2]) and genome[::2].count(4) == 1


def test_children_without_trade_keep_the_shares(model: PrunableModel, database: Levels) -> None:
    space = Space(model.config, database, budget(model, 0.8))
    genome, rng = space.start(), random.Random(1)
    mutate = Mutation(space, 3, trade=False)
    for _ in range(30):
        child = mutate(genome, rng)
        assert (sum(child[::2]), sum(child[1::2])) == (sum(genome[::2]), sum(genome[1::2]))


def test_biases_of_what_is_gone_are_gone_and_no_others(tmp_path: Path, tokens: Tensor) -> None:
    """Judged, put into the model and cut a candidate is the same, in a family whose linears have biases."""
    model = open_model(tiny_model(tmp_path / "model", "gpt2")).load(backend.Layout())
    passes = Passes(model, tokens)
    levels = Levels(tmp_path / "levels", passes, 4, 0.001)
    levels.build(passes)
    genome: Genome = (4, 1, 2, 4)
    assert [len(found) for kind in (ATTENTION, MLP) for found in levels.sizes[kind]] == [5] * 4
    whole = logits(model, tokens).log_softmax(-1)
    biases = {name: p.detach().clone() for name, p in model.parameters.items() if name.endswith("bias")}
    (found,) = divergences(model, levels, [genome], tokens)
    put(model, levels, genome)
    student = logits(model, tokens).log_softmax(-1)
    assert found == pytest.approx((whole.exp() * (whole - student)).sum(-1).mean(-1).tolist(), rel=1e-3)
    gone = {"decoder.layers.0.self_attention.linear_proj.bias", "decoder.layers.1.mlp.linear_fc2.bias"}
    for name, before in biases.items():
        assert torch.equal(model.parameters[name], torch.zeros_like(before) if name in gone else before), name
    smaller = cut(model, Space(model.config, levels, budget(model, 0.99)).units(genome))
    torch.testing.assert_close(logits(smaller, tokens).log_softmax(-1), student, atol=1e-4, rtol=1e-4)


def test_long_windows_are_judged_in_pieces_and_states_held_as_far_as_they_may_be(
    model: PrunableModel, database: Levels, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    genomes: list[Genome] = [(1, 2, 4, 0, 3, 4, 2, 1), (0, 1) * 4]
    expected = divergences(model, database, genomes, tokens[:4])
    held: dict[int, Tensor] = {}
    monkeypatch.setattr(fitness_module, "LOSS_TOKENS", 7)
    monkeypatch.setattr(fitness_module, "WHOLE_BYTES", 2 * 24 * 32 * 4)  # two windows' states in float32
    found = divergences(model, database, genomes, tokens[:4], whole=held)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert sorted(held) == [0, 1] and all(states.nbytes == 24 * 32 * 4 for states in held.values())
    assert divergences(model, database, genomes, tokens[:4], whole=held) == found and sorted(held) == [0, 1]


class Told:
    """Judges by a table: mean of a genome, and what its windows add to that."""

    windows, length = 8, 10

    def __init__(self, means: Callable[[Genome], float], noise: Callable[[Genome], Sequence[float]]) -> None:
        self.means, self.noise = means, noise
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, genomes: Sequence[Genome], trained: int, windows: int) -> list[list[float]]:
        self.asked.append((len(genomes), trained, windows))
        return [[self.means(genome) + x for x in self.noise(genome)[:windows]] for genome in genomes]


def test_only_a_child_that_is_better_beyond_the_error_takes_the_place(model: PrunableModel, database: Levels) -> None:
    """Each stage gives the survivors more of the same windows; a child that is behind gets no more of them."""
    space = Space(model.config, database, budget(model, 0.8))
    parent, mutate = space.start(), Mutation(space, 3, True)
    stages = [Stage(2, 10, 0), Stage(1, 20, 0)]
    common = [3.0, -1.0, 0.5, 0.1, -2.0, 0.3, 0.2, -0.4]  # of the windows: hard and easy ones, the same for all
    unsure = [1.0, -1.4, -1.0, 0.2, 1.0, -1.0, 0.9, -0.6]  # of the difference: mean -0.11, error 0.35

    def generation(lead: float, noise: Sequence[float]) -> tuple[Generation, Told]:
        ours = lambda genome: common if genome == parent else [a + b for a, b in zip(common, noise, strict=True)]  # noqa: E731
        told = Told(lambda genome: 5.0 if genome == parent else 5.0 - lead, ours)
        return next_generation(parent, 0, 0, stages, 5, mutate, told), told

    clear, told = generation(0.1, [0.0] * 8)
    assert clear.replaced and clear.fitness == pytest.approx(4.9 + sum(common) / 8)
    children = clear.tried
    assert children >= 3 and told.asked[:2] == [(children, 0, 1), (2, 0, 2)]
    assert told.asked[3:6] == [(1, 0, 2), (1, 0, 4), (1, 0, 8)]
    behind, told = generation(-0.1, [0.0] * 8)
    assert not behind.replaced and behind.parent == parent and max(told.asked[3:-1]) == (1, 0, 2)
    luck, told = generation(0.0, unsure)
    assert not luck.replaced and told.asked[-2] == (1, 0, 8)  # ahead at every look, and within the error in the end
    assert luck.fitness == pytest.approx(5.0 + sum(common) / 8) and luck.error == pytest.approx(0.51, abs=0.02)
    assert generation(1.0, unsure)[0].replaced
    assert not generation(math.nan, [0.0] * 8)[0].replaced
    hopeless = Told(lambda genome: math.inf, lambda genome: common)  # every candidate overflows when it is trained
    given_up = next_generation(parent, 0, 0, [Stage(1, 20, 5)], 5, mutate, hopeless)
    assert given_up.parent == parent and not given_up.replaced
    assert math.isinf(given_up.fitness) and math.isinf(given_up.error)


def test_every_stage_trains_and_judges_as_it_says() -> None:
    """Fewest tokens first, for all children; the race and the record are the last stage's; of equal ones the first."""
    told = Told(lambda genome: 5.0 - 0.1 * (genome[0] > 0), lambda genome: [0.0] * 8)
    children = iter([(3, 0), (2, 0), (3, 0), (0, 0), (1, 0)])
    stages = [Stage(2, 9, 3), Stage(1, 40, 7)]
    found = next_generation((0, 0), 4, 0, stages, 5, lambda *_: next(children), told)
    assert (found.parent, found.replaced, found.tried) == ((3, 0), True, 4)
    assert told.asked == [(3, 3, 1), (2, 7, 4), *[(1, 7, 8)] * 3]
    told.asked.clear()
    alone = next_generation((0, 0), 4, 0, stages, 5, lambda parent, _: parent, told)
    assert (alone.parent, alone.fitness, alone.replaced, alone.tried) == ((0, 0), 5.0, False, 1)
    assert told.asked == [(1, 7, 8)]


def test_children_are_drawn_by_seed_and_number() -> None:
    told = Told(lambda genome: 1.0, lambda genome: [0.0] * 8)

    def drawn(number: int, seed: int) -> list[float]:
        found: list[float] = []
        next_generation(
            (0,), number, seed, [Stage(1, 9, 0)], 3, lambda parent, rng: found.append(rng.random()) or parent, told
        )
        return found

    assert drawn(1, 2) == drawn(1, 2) and len({tuple(drawn(*both)) for both in ((1, 2), (2, 1), (1, 1), (2, 2))}) == 4


@pytest.mark.parametrize(
    ("asked", "windows"), [(1, 1), (10, 1), (14, 1), (16, 2), (24, 2), (26, 3), (80, 8), (81, 8), (10**6, 8)]
)
def test_tokens_are_whole_windows_at_least_one(asked: int, windows: int) -> None:
    """Of 10 tokens, and no more than the 8 that there are."""
    told: Any = Told(lambda genome: 0.0, lambda genome: [])
    assert evolution_module.windows_of(Stage(1, asked, 0), told) == windows


def test_fitness_falls_from_generation_to_generation(model: PrunableModel, database: Levels, tokens: Tensor) -> None:
    """It is of the same windows each time, so a search that goes on never ends with a worse one of its parents."""
    space = Space(model.config, database, budget(model, 0.8))
    parent, judge, mutate = space.start(), judging(model, database, tokens), Mutation(space, 3, True)
    (first,) = judge([parent], 0, 12)
    fitness = [sum(first) / 12]
    for number in range(10):
        found = next_generation(parent, number, 1, [Stage(1, 48, 0)], 6, mutate, judge)
        assert found.replaced == (found.parent != parent) == (found.fitness < fitness[-1])
        parent = found.parent
        fitness.append(found.fitness)
    assert fitness[-1] < fitness[0]


def test_memory_is_bounded_and_survives(
    model: PrunableModel, database: Levels, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genomes: list[Genome] = [(n % 5, n // 5 % 5) * LAYERS for n in range(6)]
    judge = judging(model, database, tokens, tmp_path)
    expected = judge(genomes, 0, 3)
    judge.memory.save()
    with monkeypatch.context() as patched:
        patched.setattr(offspring_module, "divergences", lambda *_: pytest.fail("judged again"))
        assert judging(model, database, tokens, tmp_path)(genomes, 0, 2) == [scores[:2] for scores in expected]
    more = judging(model, database, tokens, tmp_path)(genomes, 0, 5)
    assert more == divergences(model, database, genomes, tokens[:5])
    monkeypatch.setattr(memory_module, "MOST", 4)
    forgetful = judging(model, database, tokens, tmp_path / "other")
    assert forgetful(genomes, 0, 5) == more and len(forgetful.memory.found) == 4
    assert forgetful.memory.known(genomes[0], 0) == [] != forgetful.memory.known(genomes[5], 0)
    with pytest.raises(UserError, match="another search"):
        Memory(tmp_path, [4] * 7, len(tokens))
    with pytest.raises(UserError, match="another search"):
        Memory(tmp_path, [4] * 8, 13)
    file = tmp_path / "judged.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"has changed.*remove it and run again"):
        judging(model, database, tokens, tmp_path)


def test_switches_are_drawn_by_what_single_replacements_cost(model: PrunableModel, database: Levels) -> None:
    """Cheap halves shrink and dear ones grow; none is left out."""
    space = Space(model.config, database, budget(model, 0.7))
    cheap, dear = 2 * USELESS + 1, 1
    slopes = {cheap: 0.1, dear: 10.0}
    singles = [[level * slopes.get(gene, 1.0) for level in range(5)] for gene in range(8)]
    genome: Genome = (2,) * 8
    rng = random.Random(0)
    moves = {}
    for name, known in (("even", None), ("measured", singles)):
        mutate = Mutation(space, 1, True, singles=known)
        children = [mutate._switched(genome, rng) for _ in range(400)]
        moves[name] = [[sum(child[gene] - 2 == by for child in children) for gene in (cheap, dear)] for by in (1, -1)]
        assert all(any(child[gene] != 2 for child in children) for gene in range(8))
    ((even_cheap, _), (_, even_dear)), (shrunk, grown) = moves["even"], moves["measured"]
    assert shrunk[0] > 1.5 * even_cheap > 3 * shrunk[1] and grown[1] > 1.5 * even_dear > 3 * grown[0]


def test_training_moves_what_is_left_and_never_what_is_gone(
    model: PrunableModel, database: Levels, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is trained from the database's weights with a fresh optimizer, and the model comes back as it was."""
    before = {name: p.detach().clone() for name, p in model.parameters.items()}
    judge = judging(model, database, tokens)
    genome, other = (1, 2, 1, 2, 1, 2, 1, 2), (2, 1, 2, 1, 2, 1, 2, 1)
    (plain,) = judge([genome], 0, 4)
    (first,) = judge([genome], 240, 2)
    judge([other], 240, 2)
    (again,) = judge([genome], 240, 4)  # for two windows more: trained from the database, with a fresh optimizer
    assert again[:2] == first and again != plain
    assert judging(model, database, tokens)([genome], 240, 4) == [again]
    assert all(torch.equal(p, before[name]) for name, p in model.parameters.items())
    assert judge._trained is not None
    school, reference = judge._trained
    put(model, database, genome)
    assert reference.divergences(model, slice(0, 4)) == pytest.approx(plain, rel=1e-5)
    school.restore()
    monkeypatch.setattr(Zeros, "clear_gradients", lambda self: None)
    with pytest.raises(UserError, match="must stay zero"):  # the negative control
        judge([other], 240, 4)


@pytest.mark.parametrize(
    ("length", "parts", "trained"),
    [
        (9, 1, 8),
        (16, 1, 8),
        (17, 2, 16),
        (25, 3, 24),
        (1024, 1, 1016),
        (1025, 16, 1024),
        (1088, 1, 1024),
        (1089, 1, 1088),
    ],
)
def test_windows_are_trained_on_as_far_as_every_layout_can(length: int, parts: int, trained: int) -> None:
    """All but the last token, in multiples of 8, of long ones of 64."""
    assert offspring_module.training_length(length, parts) == trained


@pytest.mark.parametrize(("length", "parts"), [(8, 1), (1, 1), (25, 16), (17, 3)])
def test_windows_that_a_layout_cannot_share_are_refused(length: int, parts: int) -> None:
    with pytest.raises(UserError, match=f"--calibration-seq-length {length}: .* a multiple of {parts}, above 0"):
        offspring_module.training_length(length, parts)


def test_a_school_takes_its_windows_in_turn_and_enough_steps(model: PrunableModel, tokens: Tensor) -> None:
    """Two windows of 16 tokens a step; a part of a step is a step, and there is always one."""
    school = School(model, tokens, 1e-3, 2)
    assert school.length == 16
    for index in (0, 11, 12, 30):
        assert torch.equal(school.sample(index), tokens[index % 12][:17])
    steps: list[int] = []
    school.trainer = SimpleNamespace(step=steps.append, optimizer=school.trainer.optimizer)  # type: ignore[assignment]
    for asked, made in ((0, 1), (1, 1), (32, 1), (33, 2), (240, 8)):
        steps.clear()
        school.train(asked)
        assert steps == list(range(made))


def test_a_candidate_whose_training_fails_is_infinitely_far(
    model: PrunableModel, database: Levels, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every window that was asked for; the model comes back, and the next one is judged."""
    before = {name: p.detach().clone() for name, p in model.parameters.items()}
    judge, genome = judging(model, database, tokens), (1, 2) * LAYERS
    with monkeypatch.context() as patched:

        def fail(self: School, tokens: int) -> None:
            raise Diverged("no number")

        patched.setattr(School, "train", fail)
        assert judge([genome], 64, 3) == [[math.inf] * 3]
    assert all(torch.equal(p, before[name]) for name, p in model.parameters.items())
    assert judge([genome], 64, 3) == [[math.inf] * 3]  # remembered
    assert all(map(math.isfinite, judge([(2, 1) * LAYERS], 64, 3)[0]))


def test_candidates_share_passes_as_far_as_their_states_may_be_held(
    model: PrunableModel, database: Levels, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only for windows that they were not judged on; those that have as many go together."""
    genomes: list[Genome] = [(n, 1) * LAYERS for n in range(4)]
    judge = judging(model, database, tokens)
    judge(genomes[:1], 0, 2)
    asked: list[tuple[int, slice]] = []

    def counted(self: Judge, some: Sequence[Genome], trained: int, windows: slice) -> list[list[float]]:
        asked.append((len(some), windows))
        return plain(self, some, trained, windows)

    plain = Judge._measured
    monkeypatch.setattr(Judge, "_measured", counted)
    monkeypatch.setattr(offspring_module, "AT_A_TIME", 2)
    found = judge(genomes, 0, 3)
    assert asked == [(2, slice(0, 3)), (1, slice(0, 3)), (1, slice(2, 3))]
    assert found == divergences(model, database, genomes, tokens[:3])
    assert judge(genomes, 0, 1) == [scores[:1] for scores in found] and len(asked) == 3


def test_replacements_are_judged_by_the_first_stage(
    tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 windows the last three judge, and 48 tokens are two of them."""
    seen: list[Tensor] = []
    plain = Search.replacements

    def noted(self: Search, space: Space, windows: Tensor) -> list[list[float]]:
        seen.append(windows)
        return plain(self, space, windows)

    monkeypatch.setattr(Search, "replacements", noted)
    searched(tmp_path / "model", tmp_path / "run", tokens, search="integer")
    assert len(seen) == 1 and torch.equal(seen[0], tokens[9:11])


@pytest.mark.parametrize("harmful", [None, ATTENTION, MLP])
def test_the_integer_program_finds_the_best_sum(model: PrunableModel, database: Levels, harmful: str | None) -> None:
    """As trying all of them does; where all of one kind would better go, one of it stays."""
    space = Space(model.config, database, budget(model, 0.7))
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(last + 1, generator=generator).cumsum(0).tolist() for last in space.last]
    scores = [
        [-value for value in values] if kind == harmful else values
        for (kind, _), values in zip(space.genes, scores, strict=True)
    ]
    found = best_sum(space, scores)
    best = min(
        (genome for genome in itertools.product(*(range(last + 1) for last in space.last)) if space.fits(genome)),
        key=lambda genome: sum(scores[gene][level] for gene, level in enumerate(genome)),
    )
    assert found == best
    of_kind = [
        last - level for (kind, _), level, last in zip(space.genes, best, space.last, strict=True) if kind == harmful
    ]
    assert harmful is None or sum(left > 0 for left in of_kind) == 1


class StopAfter(StopRequest):
    """Asks to stop once it has been looked at so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def code(self) -> int:
        self.looks -= 1
        return int(self.looks <= 0)


def searched(path: Path, folder: Path, tokens: Tensor, stop: StopRequest | None = None, **options: Any) -> Any:
    model = load(path)
    method = get_method("darwinlm", **{**SMALL, "training_tokens": "0", **options})
    assert isinstance(method, DarwinLM)
    folder.mkdir(exist_ok=True)
    work = SimpleNamespace(
        model=model, config=model.config, passes=Passes(model, tokens), folder=folder, stop=stop or StopRequest()
    )
    return method.decide(work, budget(model, 0.8))  # type: ignore[arg-type]


def test_a_search_that_was_stopped_goes_on(tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Database and generations are taken over, and the answer is that of a search left alone."""
    whole = searched(tmp_path / "model", tmp_path / "whole", tokens)
    with pytest.raises(Stopped, match="is kept"):
        searched(tmp_path / "model0", tmp_path / "parts", tokens, StopAfter(2))
    made = sorted(file.name for file in (tmp_path / "parts" / "database").glob("*.mlp.safetensors"))
    assert made == ["00000.mlp.safetensors", "00001.mlp.safetensors"]
    with pytest.raises(Stopped, match="generation 1 of 3"):
        searched(tmp_path / "model1", tmp_path / "parts", tokens, StopAfter(5))
    assert (tmp_path / "parts" / "metrics.jsonl").read_text().count("\n") == 1
    made = (tmp_path / "parts" / "database" / "00001.mlp.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(levels_module, "Reconstruction", lambda *_: pytest.fail("a level was made again"))
    assert searched(tmp_path / "model2", tmp_path / "parts", tokens) == whole
    assert (tmp_path / "parts" / "database" / "00001.mlp.safetensors").stat().st_mtime_ns == made
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1] and lines[0].count("\n") == 3
    with pytest.raises(UserError, match="has levels 4 and 3 was given"):
        searched(tmp_path / "model3", tmp_path / "parts", tokens, levels=3)
    with pytest.raises(UserError, match="3 generations are done and 2"):
        searched(tmp_path / "model4", tmp_path / "parts", tokens, generations=2)
    with pytest.raises(UserError, match="other levels"):
        searched(tmp_path / "model5", tmp_path / "x", tokens, levels=3, database=str(tmp_path / "parts" / "database"))


def test_evolution_may_start_from_the_integer_program(
    tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is the first parent, which only a better child replaces; the uniform start is another."""
    database = {"database": str(tmp_path / "database")}
    solved = searched(tmp_path / "model", tmp_path / "solved", tokens, search="integer", **database)
    unchanged = lambda parent, *_: Generation(parent, 0.0, 0.0, False, 0)  # noqa: E731
    monkeypatch.setattr(evolution_module, "next_generation", unchanged)
    found = {
        start: searched(tmp_path / f"model_{start}", tmp_path / start, tokens, start=start, **database)
        for start in ("integer", "uniform")
    }
    assert found["integer"] == solved != found["uniform"]


def test_single_replacements_are_of_one_gene_and_the_whole_one_costs_nothing() -> None:
    space = SimpleNamespace(genes=("attention", "mlp"), last=(2, 1))
    asked: list[tuple[int, ...]] = []

    def judged(genomes: Sequence[tuple[int, ...]]) -> list[float]:
        asked.extend(genomes)
        return [10.0 * first + second for first, second in genomes]

    assert single_replacements(space, judged, [], lambda *_: None) == [[0.0, 10.0, 20.0], [0.0, 1.0]]
    assert asked == [(1, 0), (2, 0), (0, 1)]
    with pytest.raises(ValueError):
        single_replacements(space, judged, [0.0] * 4, lambda *_: None)  # known of another search


def test_single_replacements_are_not_measured_again(
    tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that was stopped between two shares of them goes on behind the first; the answer is the same."""
    integer = {"search": "integer", "database": str(tmp_path / "database")}
    whole = searched(tmp_path / "model", tmp_path / "whole", tokens, **integer)
    monkeypatch.setattr(integer_module, "AT_A_TIME", 10)
    with pytest.raises(Stopped, match="is kept"):
        searched(tmp_path / "model0", tmp_path / "parts", tokens, StopAfter(1), **integer)
    first = json.loads((tmp_path / "parts" / "replacements.json").read_text())
    assert len(first) == 10
    assert searched(tmp_path / "model1", tmp_path / "parts", tokens, **integer) == whole
    found = json.loads((tmp_path / "parts" / "replacements.json").read_text())
    assert found[:10] == first and len(found) == 4 * 2 * LAYERS
    (tmp_path / "parts" / "replacements.json").write_text(json.dumps([0.0] * len(found)))  # read, not measured again
    assert searched(tmp_path / "model2", tmp_path / "parts", tokens, **integer) != whole


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"search": "random"}, "allowed: evolution, integer"),
        ({"survivors": "8,4"}, "survivors ending in 1"),
        ({"fitness_tokens": "a,b"}, "whole numbers with commas"),
        ({"survivors": "0,1", "fitness_tokens": "9,9", "training_tokens": "0"}, "survivors ending in 1"),
        ({"survivors": "2,1", "fitness_tokens": "9,0", "training_tokens": "0"}, "survivors ending in 1"),
        ({"survivors": "2,2", "fitness_tokens": "9,9", "training_tokens": "0"}, "survivors ending in 1"),
        ({"survivors": "2,1", "fitness_tokens": "9,9", "training_tokens": "0,0,0"}, "as many numbers in each"),
        ({"survivors": "2,1", "fitness_tokens": "9,9,9", "training_tokens": "0,0"}, "as many numbers in each"),
        ({"fitness_tokens": "1" * 13}, "whole numbers with commas"),
        ({"training_lr": 0.0}, "training_lr 0.0 was given; allowed: above 0"),
        ({"norm_gain": False}, "leave them out"),
        *(({name: 0}, f"{name} 0 was given; allowed: 1 or more") for name in ("levels", "generations", "mutations")),
        ({"training_batch": 0}, "training_batch 0 was given; allowed: 1 or more"),
        ({"offspring": 0}, "1 or more"),
        ({"start": "random"}, "allowed: uniform, integer"),
        ({"start": "integer", "search": "integer"}, "with search 'evolution' only"),
        ({"refit": "none"}, "leave them out"),
    ],
)
def test_bad_requests(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        get_method("darwinlm", **options)


@pytest.mark.parametrize("name", ["database", "search", "start"])
def test_a_number_is_no_text_but_where_a_list_of_them_is_meant(name: str) -> None:
    assert get_method("darwinlm", survivors=1, fitness_tokens=8, training_tokens=0)
    with pytest.raises(UserError, match=f"darwinlm: {name}: 5 given; allowed: text"):
        get_method("darwinlm", **{name: 5})


def test_stages_are_columns_of_three_lists() -> None:
    """The paper's, and one each of everything that must be one or more; a single 0 is no training in any."""
    made = get_method("darwinlm")
    assert isinstance(made, DarwinLM)
    paper = zip((8, 4, 2, 1), (1024, 2048, 4096, 8192), (10_000, 50_000, 100_000, 200_000), strict=True)
    assert made.stages() == [Stage(*numbers) for numbers in paper]
    least = dict.fromkeys(("levels", "generations", "offspring", "mutations", "training_batch"), 1)
    least |= {"survivors": " 1 ", "fitness_tokens": 1, "training_tokens": 0, "training_lr": 1e-12}  # type: ignore[dict-item]
    small = get_method("darwinlm", **least)
    assert isinstance(small, DarwinLM) and small.stages() == [Stage(1, 1, 0)]
    many = get_method("darwinlm", survivors="3,1", fitness_tokens="5, 7", training_tokens="0")
    assert isinstance(many, DarwinLM) and many.stages() == [Stage(3, 5, 0), Stage(1, 7, 0)]
    assert set(many.idle({})) == set() and len(get_method("darwinlm", search="integer").idle({})) == 6


@pytest.mark.parametrize(
    ("sizes", "batch", "fits"),
    [
        ({"data": 2}, 4, True),
        ({"data": 3}, 4, False),
        ({"data": 2, "pipeline": 4}, 2, True),
        ({"data": 2, "pipeline": 4, "virtual_pipeline": 2}, 2, False),
        ({"data": 2, "pipeline": 4, "virtual_pipeline": 2}, 8, True),
    ],
)
def test_a_training_batch_is_the_same_in_every_layout_that_takes_it(
    tokens: Tensor, sizes: dict[str, int], batch: int, fits: bool
) -> None:
    """It is shared out over replicas, and over interleaved stages; nothing is asked where nobody trains."""
    layout = {"data": 1, "tensor": 1, "pipeline": 1, "context": 1, "sequence_parallel": False, "virtual_pipeline": None}
    model: Any = SimpleNamespace(layout=SimpleNamespace(**(layout | sizes)))

    def check(windows: Tensor | None = tokens, **options: Any) -> None:
        method = get_method("darwinlm", training_batch=batch, **options)
        assert isinstance(method, DarwinLM)
        method._check_training(model, windows)

    for idle in ({"training_tokens": "0"}, {"search": "integer"}, {"windows": None}):
        check(**idle)  # type: ignore[arg-type]
    if fits:
        check()
    else:
        with pytest.raises(
            UserError, match=f"training_batch {batch} was given; with this layout it must be a multiple"
        ):
            check()


def test_windows_too_short_to_train_on_are_told_before_any_work() -> None:
    model: Any = SimpleNamespace(layout=SimpleNamespace(data=1, tensor=2, context=1, sequence_parallel=True))
    method = get_method("darwinlm")
    assert isinstance(method, DarwinLM)
    with pytest.raises(UserError, match="--calibration-seq-length 8: candidates would train on 0 tokens"):
        method._check_training(model, torch.zeros(4, 8, dtype=torch.int64))


def test_a_run_that_was_stopped_stays_also_with_its_database_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing in it yet but what it is; the next one goes on with what the database has."""
    hf = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=260))
    words(tmp_path / "text.jsonl")
    given = f"--method darwinlm --target parameters=30000 --database {tmp_path / 'kept'} --search integer --levels 2"
    given += f" --calibration {tmp_path / 'text.jsonl'} --calibration-samples 4 --calibration-seq-length 24"
    command = ["prune", "--input", str(hf), "--output", str(tmp_path / "run"), *given.split()]
    assert main([*command, "--time-limit", "1e-9"]) == 0
    assert "is kept; go on with --resume" in capsys.readouterr().out
    assert (tmp_path / "run" / "run.json").is_file()
    assert main([*command, "--resume"]) == 0
    assert (tmp_path / "run" / "decision").is_dir()
