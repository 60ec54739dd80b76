"""DarwinLM (Tang et al. 2025, arXiv:2502.07780): training-aware evolutionary search over a database of pruned layers.

Every attention and MLP is pruned to several levels by a structured optimal brain surgeon (`search/levels.py`).
Evolution then decides which layer has which level (`search/evolution.py`); candidates are trained for a moment, with
what was pruned staying zero and float32 masters, before they are judged by their KL divergence from the whole model on
the same text. Ours: heads go equally from all query groups, so that ordinary software runs the result; attention and
MLP may trade parameters; of the last generation its parent is the answer.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.methods.base import hyperparameter, register
from megatron_prune.methods.structured import StructuredMethod
from megatron_prune.methods.target import MEASURES, Budget

if TYPE_CHECKING:
    from megatron_prune.model.prunable import PrunableModel
    from megatron_prune.model.units import Units
    from megatron_prune.search.evolution import Stage
    from megatron_prune.search.fitness import Genome
    from megatron_prune.statistics.passes import Passes
    from megatron_prune.training.stopping import StopRequest

SEARCHES = ("evolution", "integer")


@register("darwinlm")
@dataclass(frozen=True)
class DarwinLM(StructuredMethod):
    """Search for the sizes of every layer by evolution over refitted levels of it; layers come out unequal."""

    paper: ClassVar[str] = "Tang et al. 2025, arXiv:2502.07780"
    targets: ClassVar[Mapping[type, str]] = {Budget: f"a budget: {', '.join(MEASURES)}"}
    keeps_statistics: ClassVar[bool] = False
    searches: ClassVar[bool] = True

    levels: int = hyperparameter(10, "steps from a whole attention or MLP to none")
    search: str = hyperparameter("evolution", f"{', '.join(SEARCHES)} (programming on single replacements)")
    generations: int = hyperparameter(200, "of the evolution")
    offspring: int = hyperparameter(16, "children in a generation")
    mutations: int = hyperparameter(3, "most level switches between parent and child")
    survivors: str = hyperparameter("8,4,2,1", "candidates left after each stage of selection")
    fitness_tokens: str = hyperparameter("1024,2048,4096,8192", "tokens that each stage judges by")
    training_tokens: str = hyperparameter("10000,50000,100000,200000", "tokens of training before each; 0: none")
    training_batch: int = hyperparameter(4, "windows in a step of that training, over all replicas")
    training_lr: float = hyperparameter(1e-5, "learning rate of that training")
    trade: bool = hyperparameter(True, "attention and MLP may trade parameters")
    search_seed: int = hyperparameter(0, "of the evolution")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search not in SEARCHES:
            raise UserError(f"darwinlm: search {self.search!r} was given; allowed: {', '.join(SEARCHES)}")
        for name in ("levels", "generations", "offspring", "mutations", "training_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"darwinlm: {name} {getattr(self, name)} was given; allowed: 1 or more")
        if self.refit != "local" or not self.norm_gain:
            raise UserError("darwinlm: refit or norm_gain was given; every level is refitted already: leave them out")
        self.stages()

    def stages(self) -> list[Stage]:
        """Rounds of selection in a generation."""
        from megatron_prune.search.evolution import Stage

        lists = {
            name: _numbers(name, getattr(self, name)) for name in ("survivors", "fitness_tokens", "training_tokens")
        }
        survivors, fitness, training = lists.values()
        if training == [0]:
            training = [0] * len(survivors)
        if not len(survivors) == len(fitness) == len(training) or survivors[-1] != 1 or min(survivors + fitness) < 1:
            raise UserError(
                f"darwinlm: survivors {self.survivors}, fitness_tokens {self.fitness_tokens}, training_tokens "
                f"{self.training_tokens}; allowed: as many numbers in each (of the last: or 0), survivors ending in 1"
            )
        return [Stage(*numbers) for numbers in zip(survivors, fitness, training, strict=True)]

    def run(self, model: PrunableModel, passes: Passes, target: Budget, folder: Path, stop: StopRequest) -> Units:
        """Make the database, search, and put the answer's refitted weights into the model. Raises Stopped.

        What is in `folder` already is used: the database, and the generations in metrics.jsonl. Collective.
        """
        from megatron_prune.log import progress
        from megatron_prune.search.evolution import Space
        from megatron_prune.search.levels import Levels

        self._check_batch(model)
        levels = Levels(folder / "database", passes, self.levels, self.refit_damping)
        with progress("database", 2 * model.config.num_layers, "halves of layers") as advance:
            levels.build(passes, advance)
        space = Space(model.config, levels, target)
        found = self._integer(model, passes, space) if self.search == "integer" else None
        genome = found or self._evolve(model, passes, space, folder, stop)
        put(model, levels, genome)
        return space.units(genome)

    def _check_batch(self, model: PrunableModel) -> None:
        """A step is the same in every layout, so its windows must divide among what shares them."""
        layout = model.layout
        parts = layout.data * (layout.pipeline if layout.virtual_pipeline else 1)
        if any(stage.training_tokens for stage in self.stages()) and self.training_batch % parts:
            raise UserError(
                f"darwinlm: training_batch {self.training_batch} was given; with this layout it must be a multiple of "
                f"{parts} (data-parallel replicas, times pipeline stages where they are interleaved)"
            )

    def _evolve(self, model: PrunableModel, passes: Passes, space: Any, folder: Path, stop: StopRequest) -> Genome:
        from megatron_prune.files import from_leader
        from megatron_prune.log import MetricsLog, say
        from megatron_prune.search.evolution import next_generation
        from megatron_prune.search.offspring import Judge
        from megatron_prune.training.stopping import REASONS, Stopped, largest

        stages, target = self.stages(), space.budget
        shown = ("fitness", target.measure)
        judge = Judge(model, space.levels, passes.tokens, self.training_lr, self.training_batch)
        history = from_leader(read_history(folder))
        parent: Genome = tuple(history[-1]["parent"]) if history else space.start()
        with MetricsLog(folder, "generation") as log, stop:
            log.resume_at(len(history))
            if history:
                say(f"resumed after generation {len(history)}")
            with log.steps(self.generations):
                for number in range(len(history), self.generations):
                    found = next_generation(
                        space,
                        parent,
                        number,
                        self.search_seed,
                        stages,
                        self.offspring,
                        self.mutations,
                        self.trade,
                        judge.score,
                    )
                    parent = found.parent
                    record = {"fitness": found.fitness, target.measure: space.cost(parent), "replaced": found.replaced}
                    log.write({"step": number + 1, **record, "tried": found.tried, "parent": list(parent)}, shown)
                    log.sync()
                    (reason,) = largest(stop.code())
                    if reason and number + 1 < self.generations:
                        raise Stopped(f"{REASONS[reason]}: saved after generation {number + 1} of {self.generations}")
        return parent

    def _integer(self, model: PrunableModel, passes: Passes, space: Any) -> Genome:
        from megatron_prune.search.fitness import divergences
        from megatron_prune.search.integer import best_sum, single_replacements

        assert passes.tokens is not None
        tokens = draw_windows(passes.tokens, self.stages()[-1].fitness_tokens, random.Random(self.search_seed))
        judged = functools.partial(divergences, model, space.levels, tokens=tokens)
        return best_sum(space, single_replacements(space, judged))


def put(model: PrunableModel, levels: Any, genome: Sequence[int]) -> None:
    """Give the model's linears the weights of these levels, zero where inputs are gone. Collective."""
    from megatron_prune.search.levels import KINDS

    for layer in range(model.config.num_layers):
        for gene, (kind, path) in enumerate(KINDS.items()):
            map = model.by_name.get(f"decoder.layers.{layer}.{path}.weight")
            level = genome[2 * layer + gene]
            if map is not None and level:
                model.assign(map, levels.weight(kind, layer, level, model.whole(map)))


def draw_windows(tokens: Tensor, count: int, rng: random.Random) -> Tensor:
    """Random windows of about `count` tokens in all, at least one, of `[windows, length]`."""
    number = min(max(1, round(count / tokens.shape[1])), len(tokens))
    return tokens[sorted(rng.sample(range(len(tokens)), number))]


def read_history(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of the generations that are complete."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _numbers(name: str, given: str) -> list[int]:
    try:
        found = [int(part) for part in str(given).split(",")]
    except ValueError:
        found = [-1]
    if min(found) < 0:
        raise UserError(f"darwinlm: {name} {given!r} was given; allowed: whole numbers with commas, such as 8,4,2,1")
    return found
