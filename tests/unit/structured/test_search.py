"""Parts of a search by themselves, on levels that are only numbers: costs, starts, children, memory, its run folder."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.decision.target import Budget
from megatron_prune.decision.units import BlockUnits, all_of_block, heads_of
from megatron_prune.errors import UserError
from megatron_prune.log import read_metrics
from megatron_prune.model.cost import cost
from megatron_prune.model.families import ModelConfig, family_of
from megatron_prune.search import memory as memory_module
from megatron_prune.search import session as session_module
from megatron_prune.search.evolution import Generation
from megatron_prune.search.fitness import Genome
from megatron_prune.search.levels import ATTENTION, MLP, Level, attention_levels, mlp_levels
from megatron_prune.search.memory import Memory
from megatron_prune.search.mutation import Mutation
from megatron_prune.search.session import Search
from megatron_prune.search.space import Space
from megatron_prune.tensor_files import read_tensors, write_tensors
from megatron_prune.training.stopping import Stopped, StopRequest
from tests.models import TINY_SIZES

LAYERS = 3


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with backend.running(backend.Layout()):
        yield


def config(**sizes: Any) -> ModelConfig:
    found = TINY_SIZES["llama"] | {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
    found |= {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 64,
    } | sizes
    return family_of(found).from_hf(found)


class Numbers:
    """Levels of which the first units stay, with errors drawn by chance, rising."""

    def __init__(self, model: ModelConfig, count: int = 5, free_groups: bool = False, seed: int = 0) -> None:
        self.config = model
        layers = range(model.num_layers)
        self.sizes: dict[str, list[list[Level]]] = {
            ATTENTION: [attention_levels(model, layer, count, free_groups) for layer in layers],
            MLP: [mlp_levels(model, layer, count) for layer in layers],
        }
        rng = random.Random(seed)
        self.errors = {
            (kind, layer): [0.0, *sorted(rng.random() for _ in levels[2:]), 1.0]
            for kind, found in self.sizes.items()
            for layer, levels in enumerate(found)
        }

    def error(self, kind: str, layer: int, level: int) -> float:
        return self.errors[kind, layer][level]

    def units(self, layer: int, attention: int, mlp: int) -> BlockUnits:
        level = self.sizes[ATTENTION][layer][attention]
        groups = all_of_block(self.config, layer).groups[: level.groups]
        heads = tuple(head for group in groups for head in heads_of(self.config, layer, group)[: level.heads])
        return BlockUnits(groups, heads, tuple(range(self.sizes[MLP][layer][mlp].ffn)))


def space_of(share: float, measure: str = "parameters", **options: Any) -> Space:
    """Levels of the tiny model within a share of its whole cost."""
    model = config()
    levels: Any = Numbers(model, **options)
    return Space(model, levels, Budget(int(share * cost(model, measure)), measure))


def both_kinds(space: Space, genome: Genome) -> bool:
    """Whether some attention is left, and some MLP."""
    return all(any(genome[gene] < space.last[gene] for gene in genes) for genes in (range(0, 6, 2), range(1, 6, 2)))


# --- what models cost, and where a search starts ---


@pytest.mark.parametrize("measure", ["parameters", "forward_flops", "kv_cache_bytes"])
@pytest.mark.parametrize("free_groups", [False, True])
def test_costs_are_those_of_the_models(measure: str, free_groups: bool) -> None:
    """Of every genome that a model can be made of; it fits exactly when it is within the budget."""
    space, rng = space_of(0.6, measure, free_groups=free_groups), random.Random(0)
    seen = Counter[bool]()
    for _ in range(200):
        genome = tuple(rng.randint(0, last) for last in space.last)
        if both_kinds(space, genome):
            expected = cost(space.units(genome).config(space.config), measure)
            assert space.cost(genome) == expected
            assert space.fits(genome) == (expected <= space.budget.limit)
            exact: Any = Space(space.config, space.levels, Budget(expected, measure))
            assert exact.fits(genome)
            seen[space.fits(genome)] += 1
        else:
            assert not space.fits(genome)
    assert min(seen.values()) > 5


def slope(space: Space, gene: int, level: int, other: int) -> float:
    """Error that the other level adds for each unit of cost that it saves."""
    errors = space.levels.errors[space.genes[gene]]  # type: ignore[attr-defined]
    saved = space.saves[gene][other] - space.saves[gene][level]
    return float("inf") if saved <= 0 else (errors[other] - errors[level]) / saved


def filled(space: Space, genome: Genome) -> Genome:
    """Larger levels, the one that lowers the error most for its cost first, of equal ones the first, while any fits."""
    found = list(genome)
    while True:
        free = [
            gene
            for gene in range(len(found))
            if found[gene] and space.fits(tuple(level - (n == gene) for n, level in enumerate(found)))
        ]
        if not free:
            return tuple(found)
        found[min(free, key=lambda gene: (-slope(space, gene, found[gene] - 1, found[gene]), gene))] -= 1


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.5, 0.44])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_search_starts_from_the_first_uniform_model_that_fits_and_fills_it(share: float, seed: int) -> None:
    space = space_of(share, seed=seed)
    assert len(set(space.last)) == 2  # attention has fewer levels than MLPs
    steps = max(space.last)
    uniform = [tuple(round(last * step / steps) for last in space.last) for step in range(steps + 1)]
    first = next(genome for genome in uniform if space.fits(genome))
    assert space.start() == filled(space, first) != uniform[0]


@pytest.mark.parametrize("share", [0.9, 0.6, 1 / 3])
def test_where_no_uniform_model_fits_the_cheapest_steps_lead_down(share: float) -> None:
    """Groups keep their caches until all their heads go, so a uniform model saves nothing before it saves all."""
    space = space_of(share, "kv_cache_bytes")
    genome = [0] * (2 * LAYERS)
    while space.cost(tuple(genome)) > space.budget.limit:
        steps = []
        for gene, level in itertools.product(range(2 * LAYERS), range(1, 10)):
            if genome[gene] < level <= space.last[gene]:
                other = [*genome[:gene], level, *genome[gene + 1 :]]
                if space.cost(tuple(other)) < space.cost(tuple(genome)) and both_kinds(space, tuple(other)):
                    steps.append((slope(space, gene, genome[gene], level), gene, level))
        _, gene, level = min(steps)
        genome[gene] = level
    assert space.start() == filled(space, tuple(genome))
    assert not any(space.start()[1::2])  # MLPs have no cache
    with pytest.raises(UserError, match="with some attention and some MLP no model costs so little"):
        space_of(0.3, "kv_cache_bytes").start()


def test_a_budget_below_what_is_around_the_layers_is_refused() -> None:
    model = config()
    levels: Any = Numbers(model)
    bare = cost(model, "parameters") - sum(
        sum(parameter for parameter in (2 * 64 * 64 + 2 * 64 * 16, 3 * 64 * 64, 2 * 64)) for _ in range(LAYERS)
    )
    assert Space(model, levels, Budget(bare)).budget.limit == bare
    with pytest.raises(UserError, match=f"without any attention and MLP {bare} are left"):
        Space(model, levels, Budget(bare - 1))


# --- children ---


def drawn(draw: Callable[[random.Random], int], count: int = 6000) -> dict[int, float]:
    """Shares of what is drawn."""
    rng = random.Random(7)
    return {value: n / count for value, n in Counter(draw(rng) for _ in range(count)).items()}


def by_rank(costs: dict[int, float]) -> dict[int, float]:
    """Probabilities that fall as 1 / rank of the cost."""
    order = sorted(costs, key=lambda gene: (costs[gene], gene))
    whole = sum(1 / (n + 1) for n in range(len(order)))
    return {gene: 1 / (n + 1) / whole for n, gene in enumerate(order)}


def test_measured_switches_are_drawn_by_what_they_cost() -> None:
    """A step down by what the next level adds, one up by what this level has added, for each unit that is saved."""
    space, rng = space_of(0.6), random.Random(3)
    singles = [[0.0, *(rng.uniform(-1, 5) for _ in range(last))] for last in space.last]
    genome: Genome = (1, 2, space.last[2], 0, 1, 1)
    mutate = Mutation(space, 1, True, singles=singles)

    def cost_of(gene: int, level: int) -> float:
        saved = space.saves[gene][level + 1] - space.saves[gene][level]
        return (singles[gene][level + 1] - singles[gene][level]) / saved

    smaller = {gene: cost_of(gene, level) for gene, level in enumerate(genome) if level < space.last[gene]}
    found = drawn(lambda rng: mutate._smaller(genome, rng))
    assert found == pytest.approx(by_rank(smaller), abs=0.03) and set(found) == {0, 1, 3, 4, 5}
    genes = [0, 1, 2, 4]
    larger = {gene: -cost_of(gene, genome[gene] - 1) for gene in genes}
    assert drawn(lambda rng: mutate._larger(genome, genes, rng)) == pytest.approx(by_rank(larger), abs=0.03)
    assert len({*by_rank(smaller).values()}) == 5


def test_switches_that_were_not_measured_are_drawn_evenly() -> None:
    mutate = Mutation(space_of(0.6), 1, True)
    genome: Genome = (1, 2, mutate.space.last[2], 0, 1, 1)
    even = dict.fromkeys((0, 1, 3, 4, 5), 0.2)
    assert drawn(lambda rng: mutate._smaller(genome, rng)) == pytest.approx(even, abs=0.03)
    assert drawn(lambda rng: mutate._larger(genome, [0, 4], rng)) == pytest.approx({0: 0.5, 4: 0.5}, abs=0.03)


def test_what_saves_nothing_goes_last() -> None:
    """Levels of an MLP save no cache: the last to shrink, the first to grow."""
    space = space_of(0.6, "kv_cache_bytes")
    mutate = Mutation(space, 1, True, singles=[[float(level) for level in range(last + 1)] for last in space.last])
    genome: Genome = (space.last[0], 1) * LAYERS
    found = drawn(lambda rng: mutate._larger(genome, [0, 1], rng))
    assert mutate._slope(1, 1) == float("inf") and found == pytest.approx({1: 2 / 3, 0: 1 / 3}, abs=0.03)


def test_few_switches_are_likelier_than_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller of two even draws: of up to three, one in 5 of 9 cases, two in 3, three in 1."""
    space, made = space_of(0.6), [0]
    mutate = Mutation(space, 3, False)

    def switched(genome: Genome, _rng: random.Random) -> Genome:
        made[-1] += 1
        return (*genome[:-1], space.last[-1] - 1)

    monkeypatch.setattr(mutate, "_switched", switched)
    monkeypatch.setattr(space, "fits", lambda genome: True)
    rng = random.Random(5)
    for _ in range(4500):
        mutate((0,) * 6, rng)
        made.append(0)
    shares = {count: n / 4500 for count, n in Counter(made[:-1]).items()}
    assert shares == pytest.approx({1: 5 / 9, 2: 3 / 9, 3: 1 / 9}, abs=0.03)


@pytest.mark.parametrize("trade", [True, False])
@pytest.mark.parametrize("measured", [True, False])
def test_a_switch_is_one_level_down_and_one_up_elsewhere(trade: bool, measured: bool) -> None:
    space, rng = space_of(0.6), random.Random(2)
    singles = [[float(level) for level in range(last + 1)] for last in space.last] if measured else None
    mutate = Mutation(space, 1, trade, singles=singles)
    genome: Genome = (1, 2, space.last[2], 0, 1, 1)
    pairs = set()
    for _ in range(500):
        changes = [a - b for a, b in zip(mutate._switched(genome, rng), genome, strict=True)]
        assert sorted(changes) == [-1, 0, 0, 0, 0, 1]
        pairs.add((changes.index(1), changes.index(-1)))
    smaller, larger = (0, 1, 3, 4, 5), (0, 1, 2, 4, 5)
    assert pairs == {(a, b) for a in smaller for b in larger if a != b and (trade or a % 2 == b % 2)}
    nothing = (0,) * 6
    assert mutate._switched(nothing, rng) == nothing  # where nothing can grow


def test_children_are_as_large_as_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With trade; the parent itself comes back where no other genome is found, after a hundred attempts."""
    space, rng = space_of(0.6), random.Random(1)
    mutate, parent = Mutation(space, 3, True), space.start()
    children = [mutate(parent, rng) for _ in range(100)]
    assert len(set(children)) > 20 and parent not in children
    for child in children:
        assert space.fits(child)
        for gene, level in enumerate(child):
            assert not level or not space.fits((*child[:gene], level - 1, *child[gene + 1 :]))
    attempts: list[Genome] = []
    monkeypatch.setattr(mutate, "_filled", lambda child, rng: attempts.append(child) or parent)
    assert mutate(parent, rng) == parent and len(attempts) == 100


def test_what_is_too_large_shrinks_until_it_fits_and_no_further() -> None:
    """At a budget that a model meets exactly, that model is within it."""
    space, rng = space_of(0.6), random.Random(4)
    small: Genome = (1, 2, 1, 1, 2, 1)
    exact: Any = Space(space.config, space.levels, Budget(space.cost(small)))
    assert exact.fits(small) and Mutation(exact, 1, True)._filled(small, rng) == small
    found = Mutation(space, 1, True)._filled((0,) * 6, rng)
    assert space.fits(found)


# --- memory ---


def remembered(folder: Path, last: Sequence[int] = (2, 3), windows: int = 4) -> Memory:
    return Memory(folder, last, windows)


def test_what_is_remembered_is_read_to_the_bit(tmp_path: Path) -> None:
    """By genome and tokens of training, as many windows as there are; numbers that float32 has not, and infinity."""
    memory = remembered(tmp_path)
    memory.keep(0, {(0, 1): [1 / 3, 2 / 3], (2, 3): [0.1]})
    memory.keep(500, {(0, 1): [float("inf")] * 4})
    memory.save()
    again = remembered(tmp_path)
    assert list(again.found.items()) == list(memory.found.items())
    assert again.known((0, 1), 0) == [1 / 3, 2 / 3] and again.known((0, 1), 500) == [float("inf")] * 4
    assert again.known((2, 3), 500) == again.known((1, 1), 0) == []
    types = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in read_tensors(memory.file).items()}
    assert types == {
        "genomes": (torch.int32, (3, 2)),
        "trained": (torch.int64, (3,)),
        "counts": (torch.int64, (3,)),
        "divergences": (torch.float64, (3, 4)),
    }


def test_who_was_asked_for_last_is_forgotten_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "MOST", 3)
    memory = remembered(tmp_path)
    for genome in ((0, 0), (0, 1), (0, 2)):
        memory.keep(0, {genome: [1.0]})
    memory.keep(0, {(0, 0): [1.0, 2.0]})
    assert list(memory.found) == [((0, 1), 0), ((0, 2), 0), ((0, 0), 0)]
    memory.keep(0, {(0, 3): [1.0]})
    assert list(memory.found) == [((0, 2), 0), ((0, 0), 0), ((0, 3), 0)]
    memory.save()
    assert list(remembered(tmp_path).found) == list(memory.found)


GOOD = {
    "genomes": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
    "trained": torch.tensor([0, 0]),
    "counts": torch.tensor([1, 4]),
    "divergences": torch.ones(2, 4, dtype=torch.float64),
}


@pytest.mark.parametrize(
    "changed",
    [
        {"genomes": torch.tensor([[0, 4], [2, 3]])},
        {"genomes": torch.tensor([[0, -1], [2, 3]])},
        {"genomes": torch.tensor([[0, 1, 0], [2, 3, 0]])},
        {"genomes": torch.tensor([[0], [2]])},
        {"counts": torch.tensor([0, 4])},
        {"counts": torch.tensor([-1, 4])},
        {"counts": torch.tensor([1, 5])},
        {"counts": torch.tensor([1])},
        {"trained": torch.tensor([0])},
        {"trained": torch.tensor([0, 0, 0])},
        {"divergences": torch.ones(2, 5, dtype=torch.float64)},
        {"divergences": torch.ones(2, 3, dtype=torch.float64)},
        {"divergences": torch.ones(1, 4, dtype=torch.float64)},
    ],
)
def test_what_cannot_be_of_this_search_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    write_tensors(GOOD, tmp_path / "judged.safetensors")
    assert remembered(tmp_path).known((2, 3), 0) == [1.0] * 4
    write_tensors(GOOD | changed, tmp_path / "judged.safetensors")
    with pytest.raises(UserError, match="judged.safetensors is damaged .*; remove it and run again"):
        remembered(tmp_path)


# --- the run folder ---


class Counted(StopRequest):
    """Counts how often it is looked at, and asks to stop at one of those times."""

    def __init__(self, at: int = 10**6) -> None:
        super().__init__()
        self.at, self.looks = at, 0

    def code(self) -> int:
        self.looks += 1
        return int(self.looks >= self.at)


def search(folder: Path, stop: StopRequest | None = None, generations: int = 3, **options: Any) -> Search:
    folder.mkdir(exist_ok=True)
    passes: Any = SimpleNamespace(model=SimpleNamespace(config=config()))
    asked = {"levels": 4, "generations": generations, **options}
    return Search(passes, folder, stop or StopRequest(), asked, may_grow="generations")


def step(parent: Genome, number: int) -> Generation:
    """A generation that makes one gene of the parent a level smaller."""
    child = tuple(level + (gene == number) for gene, level in enumerate(parent))
    return Generation(child, 10.0 - number, 0.5, number != 1, 7 + number)


def test_a_generation_is_a_line(tmp_path: Path) -> None:
    """What it found and what its parent costs; nobody is asked whether to go on once the last one is done."""
    space, stop = space_of(0.6), Counted()
    found = search(tmp_path, stop).evolve(space, 3, lambda: (0,) * 6, step)
    assert found == (1, 1, 1, 0, 0, 0) and stop.looks == 2
    records = read_metrics(tmp_path)
    assert [record.pop("parent") for record in records] == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert records == [
        {
            "step": n + 1,
            "fitness": 10.0 - n,
            "fitness_error": 0.5,
            "parameters": space.cost((1,) * (n + 1) + (0,) * (5 - n)),
            "replaced": n != 1,
            "tried": 7 + n,
        }
        for n in range(3)
    ]


def test_a_search_goes_on_behind_its_last_generation(tmp_path: Path) -> None:
    space, asked = space_of(0.6), list[tuple[Genome, int]]()
    with pytest.raises(Stopped, match="saved after generation 2 of 3"):
        search(tmp_path, Counted(at=2)).evolve(space, 3, lambda: (0,) * 6, step)

    def told(parent: Genome, number: int) -> Generation:
        asked.append((parent, number))
        return step(parent, number)

    unused: Any = lambda: pytest.fail("it starts anew")  # noqa: E731
    assert search(tmp_path, generations=4).evolve(space, 4, unused, told) == (1, 1, 1, 1, 0, 0)
    assert asked == [((1, 1, 0, 0, 0, 0), 2), ((1, 1, 1, 0, 0, 0), 3)]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    search(tmp_path, generations=4)
    with pytest.raises(UserError, match="4 generations are done and 3 were given: give that or more"):
        search(tmp_path, generations=3)
    with pytest.raises(UserError, match="search.json has levels 4 and 5 was given: give the same"):
        search(tmp_path, generations=4, levels=5)


@pytest.mark.parametrize("parent", [[0] * 5, [0] * 7, [0, 0, 0, 0, 0, 99], None, 3])
def test_a_parent_that_is_no_model_of_the_search_is_refused(tmp_path: Path, parent: Any) -> None:
    space = space_of(0.6)
    tmp_path.joinpath("metrics.jsonl").write_text(json.dumps({"step": 1, "parent": parent}) + "\n")
    with pytest.raises(UserError, match="metrics.jsonl: key 'parent': .* is no model of this search: restore it"):
        search(tmp_path).evolve(space, 3, lambda: (0,) * 6, step)
    tmp_path.joinpath("metrics.jsonl").write_text(json.dumps({"step": 1, "parent": space.last}) + "\n")
    assert search(tmp_path).evolve(space, 1, lambda: (0,) * 6, step) == tuple(space.last)


def test_single_replacements_are_means_over_the_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in the folder, gene by gene; more of them than this search has are another one's."""
    space, windows = space_of(0.6), torch.zeros(3, 8, dtype=torch.int64)

    def divergences(_model: Any, _levels: Any, genomes: Sequence[Genome], tokens: torch.Tensor) -> list[list[float]]:
        assert tokens is windows
        return [
            [sum((gene + 1) * level for gene, level in enumerate(genome)) + w for w in (-1, 0, 4)] for genome in genomes
        ]

    monkeypatch.setattr(session_module, "divergences", divergences)
    space.levels.folder = Path("database")
    stop = Counted()
    found = search(tmp_path, stop).replacements(space, windows)
    assert found == [
        [0.0, *((gene + 1) * level + 1.0 for level in range(1, last + 1))] for gene, last in enumerate(space.last)
    ]
    assert stop.looks == 1
    kept = json.loads((tmp_path / "replacements.json").read_text())
    assert kept == [value for of_gene in found for value in of_gene[1:]]
    monkeypatch.setattr(session_module, "divergences", lambda *_: pytest.fail("measured again"))
    assert search(tmp_path).replacements(space, windows) == found
    (tmp_path / "replacements.json").write_text(json.dumps([*kept, 1.0]))
    with pytest.raises(UserError, match=f"has {len(kept) + 1} divergences, this search {len(kept)}: remove it"):
        search(tmp_path).replacements(space, windows)
