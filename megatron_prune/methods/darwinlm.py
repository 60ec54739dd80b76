"""DarwinLM (Tang et al. 2025, arXiv:2502.07780): training-aware evolutionary search over a database of pruned layers.

Every attention and MLP is pruned to several levels by a structured optimal brain surgeon (`search/levels.py`), its
Hessian damped by 0.01 of its mean diagonal as the paper has it. Evolution then decides which layer has which level
(`search/evolution.py`); candidates are trained for a moment, with what was pruned staying zero and float32 masters,
before they are judged by their KL divergence from the whole model.

Ours: heads go equally from all query groups, so that ordinary software runs the result; attention and MLP may trade
parameters; levels are fitted to three quarters of the calibration windows, and candidates trained on them, while the
last quarter judges, the same windows in all generations; a child takes the parent's place only when it is better by
more than the error of the difference, so the parent of the last generation, the answer, is the best of all parents;
evolution may start from the answer of the integer program (`search/integer.py`) instead of a uniform model, and then
draws its switches by what single replacements cost.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_prune.decision.target import LATENCY, MEASURES, Budget
from megatron_prune.errors import UserError, brief
from megatron_prune.methods.base import hyperparameter, register
from megatron_prune.methods.structured import Refitted

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_prune.decision.units import Units
    from megatron_prune.methods.base import Workbench
    from megatron_prune.model.prunable import PrunableModel
    from megatron_prune.search.evolution import Generation, Stage
    from megatron_prune.search.fitness import Genome
    from megatron_prune.search.offspring import Judge
    from megatron_prune.search.session import Search
    from megatron_prune.search.space import Space

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

    refit_damping: float = hyperparameter(0.01, "damping of the levels' fit, as a share of the mean diagonal")
    levels: int = hyperparameter(10, "steps from a whole attention or MLP to none", 10000)
    free_groups: bool = hyperparameter(False, "levels give up whole query groups too: finer steps, unequal groups")
    search: str = hyperparameter("evolution", f"{', '.join(SEARCHES)} (programming on single replacements)")
    start: str = hyperparameter("uniform", f"what evolution starts from: {', '.join(STARTS)} (that search's answer)")
    generations: int = hyperparameter(200, "of the evolution", 1000000)
    offspring: int = hyperparameter(16, "children in a generation", 100000)
    mutations: int = hyperparameter(3, "most level switches between parent and child", 10000)
    survivors: str = hyperparameter("8,4,2,1", "candidates left after each stage of selection", numbers=True)
    fitness_tokens: str = hyperparameter(
        "1024,2048,4096,8192",
        "tokens that each stage judges by; single replacements: the first; the race: the last on",
        numbers=True,
    )
    training_tokens: str = hyperparameter(
        "10000,50000,100000,200000", "tokens of training before each; 0: none", numbers=True
    )
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

    def idle(self, settings: Mapping[str, Any]) -> Mapping[str, str]:
        """What evolution alone has a use for."""
        del settings
        evolution = ("generations", "offspring", "mutations", "trade", "training_batch", "training_lr")
        return dict.fromkeys(evolution, "with --search integer") if self.search == "integer" else {}

    def decide(self, work: Workbench, target: Budget) -> Units:
        """Make the database, search, and put the answer's refitted weights into the model."""
        from megatron_prune.search.candidates import put
        from megatron_prune.search.held_out import split
        from megatron_prune.search.levels import Levels
        from megatron_prune.search.session import Search
        from megatron_prune.search.space import Space

        self._check_training(work.model, work.passes.tokens)
        fit, held_out = split(work.passes)
        asked = {"target": str(target), **self.options()}
        with Search(fit, work.folder, work.stop, asked, may_grow="generations") as search:
            folder = Path(self.database) if self.database else work.folder / "database"
            levels = Levels(folder, fit, self.levels, self.refit_damping, self.free_groups)
            space = Space(work.config, levels, target)
            search.build(levels)
            assert held_out.tokens is not None
            genome = self._searched(search, space, held_out.tokens)
        put(work.model, levels, genome)
        return space.units(genome)

    def _searched(self, search: Search, space: Space, held_out: Tensor) -> Genome:
        """The answer of the search that was asked for."""
        from megatron_prune.files import from_leader
        from megatron_prune.search.evolution import windows_of
        from megatron_prune.search.integer import best_sum

        singles, start = None, space.start
        judge = self._judge(search, space, held_out)
        if "integer" in (self.search, self.start):
            windows = windows_of(self.stages()[0], judge)
            singles = search.replacements(space, held_out[:windows])
            start = functools.partial(best_sum, space, singles)
        if self.search == "integer":
            return from_leader(start())
        step = self._step(space, judge, singles)
        return search.evolve(space, self.generations, lambda: from_leader(start()), step)

    def _judge(self, search: Search, space: Space, held_out: Tensor) -> Judge:
        """Judges by the held-out windows, trains on those that levels were fitted to."""
        from megatron_prune.search.memory import Memory
        from megatron_prune.search.offspring import Judge, School

        model, tokens = search.passes.model, search.passes.tokens
        assert tokens is not None
        school = functools.partial(School, model, tokens, self.training_lr, self.training_batch)
        return Judge(model, space.levels, held_out, Memory(search.folder, space.last, len(held_out)), school)

    def _step(
        self, space: Space, judge: Judge, singles: Sequence[Sequence[float]] | None
    ) -> Callable[[Genome, int], Generation]:
        """What makes a generation of a parent and its number."""
        from megatron_prune.search import evolution
        from megatron_prune.search.mutation import Mutation

        mutate, stages = Mutation(space, self.mutations, self.trade, singles), self.stages()

        def step(parent: Genome, number: int) -> Generation:
            found = evolution.next_generation(parent, number, self.search_seed, stages, self.offspring, mutate, judge)
            judge.memory.save()
            return found

        return step

    def _check_training(self, model: PrunableModel, tokens: Tensor | None) -> None:
        """A step is the same in every layout, so its windows must divide among what shares them."""
        from megatron_prune.model.forward import sequence_parts
        from megatron_prune.search.offspring import training_length

        layout = model.layout
        trained = any(stage.training_tokens for stage in self.stages())
        if not trained or tokens is None or self.search == "integer":
            return
        training_length(tokens.shape[1], sequence_parts(layout))
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
