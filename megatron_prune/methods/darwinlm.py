"""DarwinLM (Tang et al. 2025, arXiv:2502.07780): training-aware evolutionary search over a database of pruned layers.

Every attention and MLP is pruned to several levels by a structured optimal brain surgeon (`search/levels.py`).
Evolution then decides which layer has which level (`search/evolution.py`); candidates are trained for a moment, with
what was pruned staying zero and float32 masters, before they are judged by their KL divergence from the whole model on
the same text. Ours: heads go equally from all query groups, so that ordinary software runs the result; attention and
MLP may trade parameters; of the last generation its parent is the answer; evolution may start from the answer of the
integer program (`search/integer.py`) instead of a uniform model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from megatron_prune.decision.target import LATENCY, MEASURES, Budget
from megatron_prune.errors import UserError, brief
from megatron_prune.methods.base import hyperparameter, register
from megatron_prune.methods.structured import Refitted

if TYPE_CHECKING:
    from megatron_prune.decision.units import Units
    from megatron_prune.methods.base import Workbench
    from megatron_prune.model.prunable import PrunableModel
    from megatron_prune.search.evolution import Generation, Space, Stage
    from megatron_prune.search.fitness import Genome
    from megatron_prune.search.session import Search
    from megatron_prune.statistics.passes import Passes

SEARCHES = ("evolution", "integer")
STARTS = ("uniform", "integer")


@register("darwinlm")
@dataclass(frozen=True)
class DarwinLM(Refitted):
    """Search for the sizes of every layer by evolution over refitted levels of it; layers come out unequal."""

    paper: ClassVar[str] = "Tang et al. 2025, arXiv:2502.07780"
    targets: ClassVar[Mapping[type, str]] = {Budget: f"a budget: {', '.join(MEASURES)}, {LATENCY} with --latency-table"}
    measures: ClassVar[tuple[str, ...]] = (*MEASURES, LATENCY)
    takes: ClassVar[tuple[str, ...]] = ()
    resumable: ClassVar[bool] = True

    levels: int = hyperparameter(10, "steps from a whole attention or MLP to none", 10000)
    free_groups: bool = hyperparameter(False, "levels give up whole query groups too: finer steps, unequal groups")
    search: str = hyperparameter("evolution", f"{', '.join(SEARCHES)} (programming on single replacements)")
    start: str = hyperparameter("uniform", f"what evolution starts from: {', '.join(STARTS)} (that search's answer)")
    generations: int = hyperparameter(200, "of the evolution", 1000000)
    offspring: int = hyperparameter(16, "children in a generation", 100000)
    mutations: int = hyperparameter(3, "most level switches between parent and child", 10000)
    survivors: str = hyperparameter("8,4,2,1", "candidates left after each stage of selection")
    fitness_tokens: str = hyperparameter(
        "1024,2048,4096,8192", "tokens that each stage judges by; single replacements: the first"
    )
    training_tokens: str = hyperparameter("10000,50000,100000,200000", "tokens of training before each; 0: none")
    training_batch: int = hyperparameter(4, "windows in a step of that training, over all replicas", 1048576)
    training_lr: float = hyperparameter(1e-5, "learning rate of that training")
    trade: bool = hyperparameter(True, "attention and MLP may trade parameters")
    search_seed: int = hyperparameter(0, "of the evolution")
    database: str = hyperparameter("", "folder of levels to use, or make; left out: in the run")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search not in SEARCHES:
            raise UserError(f"darwinlm: search {self.search!r} was given; allowed: {', '.join(SEARCHES)}")
        if self.start not in (STARTS if self.search == "evolution" else STARTS[:1]):
            raise UserError(
                f"darwinlm: start {self.start!r} with search {self.search!r} was given; allowed: {', '.join(STARTS)}, "
                "both with search 'evolution' only"
            )
        for name in ("levels", "generations", "offspring", "mutations", "training_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"darwinlm: {name} {getattr(self, name)} was given; allowed: 1 or more")
        if self.refit != "local" or not self.norm_gain:
            raise UserError("darwinlm: refit or norm_gain was given; every level is refitted already: leave them out")
        if self.training_lr <= 0:
            raise UserError(f"darwinlm: training_lr {self.training_lr} was given; allowed: above 0")
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

    def decide(self, work: Workbench, target: Budget) -> Units:
        """Make the database, search, and put the answer's refitted weights into the model."""
        from megatron_prune.search.candidates import put
        from megatron_prune.search.evolution import Space
        from megatron_prune.search.levels import Levels
        from megatron_prune.search.session import Search

        self._check_training(work.model, work.passes)
        asked = {"target": str(target), **self.options()}
        with Search(work.passes, work.folder, work.stop, asked, may_grow="generations") as search:
            folder = Path(self.database) if self.database else work.folder / "database"
            levels = Levels(folder, work.passes, self.levels, self.refit_damping, self.free_groups)
            space = Space(work.config, levels, target)
            search.build(levels)
            genome = self._searched(work, search, space)
        put(work.model, levels, genome)
        return space.units(genome)

    def _searched(self, work: Workbench, search: Search, space: Space) -> Genome:
        """The answer of the search that was asked for."""
        from megatron_prune.search import evolution
        from megatron_prune.search.offspring import Judge

        stages = self.stages()
        solve = functools.partial(search.solve, space, stages[0].fitness_tokens, self.search_seed)
        if self.search == "integer":
            return solve()
        judge = Judge(work.model, space.levels, work.passes.tokens, self.training_lr, self.training_batch)

        def step(parent: Genome, number: int) -> Generation:
            switches, trade = self.mutations, self.trade
            return evolution.next_generation(
                space, parent, number, self.search_seed, stages, self.offspring, switches, trade, judge.score
            )

        return search.evolve(space, self.generations, solve if self.start == "integer" else space.start, step)

    def _check_training(self, model: PrunableModel, passes: Passes) -> None:
        """A step is the same in every layout, so its windows must divide among what shares them."""
        from megatron_prune.model.forward import sequence_parts
        from megatron_prune.search.offspring import training_length

        layout, tokens = model.layout, passes.tokens
        trained = [stage for stage in self.stages() if stage.training_tokens]
        if not trained or tokens is None or self.search == "integer":
            return
        training_length(tokens.shape[1], sequence_parts(layout))
        most = max(round(stage.fitness_tokens / tokens.shape[1]) for stage in trained)
        if most >= len(tokens):
            raise UserError(
                f"darwinlm: {most} of {len(tokens)} calibration windows judge candidates and none is left to train on: "
                "give more --calibration-samples, fewer fitness_tokens, or --training-tokens 0"
            )
        parts = layout.data * (layout.pipeline if layout.virtual_pipeline else 1)
        if self.training_batch % parts:
            raise UserError(
                f"darwinlm: training_batch {self.training_batch} was given; with this layout it must be a multiple of "
                f"{parts} (data-parallel replicas, times pipeline stages where they are interleaved)"
            )


def _numbers(name: str, given: str) -> list[int]:
    if not re.fullmatch(r" *[0-9]{1,12} *(, *[0-9]{1,12} *){0,99}", str(given)):
        raise UserError(
            f"darwinlm: {name} {brief(given)} was given; allowed: whole numbers with commas, such as 8,4,2,1"
        )
    return [int(part) for part in str(given).split(",")]
