"""A search in its run folder: what it was asked, what it has found so far, when it has to stop.

A search that goes on takes over the database of levels, the divergences of single replacements and of candidates, and
the generations that are in the folder already; the answer is that of a search left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

from torch import Tensor

from megatron_prune.errors import UserError, brief
from megatron_prune.files import write_json
from megatron_prune.foreign import read_json
from megatron_prune.log import MetricsLog, progress, read_metrics, say
from megatron_prune.ranks import by_leader, from_leader
from megatron_prune.schema import Number, Word
from megatron_prune.search.evolution import Generation
from megatron_prune.search.fitness import Genome, divergences
from megatron_prune.search.integer import single_replacements
from megatron_prune.search.levels import Levels
from megatron_prune.search.space import Space
from megatron_prune.statistics.passes import Passes
from megatron_prune.training.stopping import REASONS, Stopped, StopRequest, largest

OPTIONS, REPLACEMENTS = "search.json", "replacements.json"


class Search:
    """While it is entered, signals end it at the next point from which it can go on. Collective."""

    def __init__(
        self, passes: Passes, folder: Path, stop: StopRequest, options: Mapping[str, Any], may_grow: str
    ) -> None:
        """`passes`: over the text that levels are fitted to.

        `options`: all that decides the answer; only `may_grow` may be larger when a search goes on.
        """
        self.passes, self.folder, self.stop = passes, folder, stop
        by_leader(functools.partial(self._note, dict(options), may_grow))

    def __enter__(self) -> Search:
        self.stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.__exit__(kind, error, trace)

    def _note(self, asked: dict[str, Any], may_grow: str) -> None:
        """Write down what is searched, or refuse to go on with something else."""
        steps = asked.pop(may_grow)
        file = self.folder / OPTIONS
        if not file.exists():
            write_json(file, asked)
        for key, value in read_json(file, "the options of a search", dict[Word, Any]).items():
            if asked.get(key) != value:
                raise UserError(
                    f"--resume: {file} has {key} {brief(value)} and {brief(asked.get(key))} was given: give the same"
                )
        done = len(read_metrics(self.folder))
        if done > steps:
            raise UserError(f"--resume: {done} {may_grow} are done and {steps} were given: give that or more")

    def _ask(self, kept: str) -> None:
        """Raise Stopped when some rank was asked to end. Collective."""
        (reason,) = largest(self.stop.code())
        if reason:
            raise Stopped(f"{REASONS[reason]}: {kept}")

    def build(self, levels: Levels) -> None:
        """Make what is missing of a database."""
        kept = f"what is in {levels.folder} is kept"
        with progress("database", self.passes.model.config.num_layers, "layers") as advance:
            levels.build(self.passes, advance, functools.partial(self._ask, kept))

    def replacements(self, space: Space, windows: Tensor) -> list[list[float]]:
        """Divergences of all single replacements, means over windows `[n, length]`, by gene and level.

        They are kept in the folder; those that are there are not measured again.
        """

        def judged(genomes: Sequence[Genome]) -> list[float]:
            return [fmean(found) for found in divergences(self.passes.model, space.levels, genomes, windows)]

        file = self.folder / REPLACEMENTS
        known: list[float] = from_leader(
            read_json(file, "divergences of single replacements", list[Number]) if file.exists() else []
        )

        def keep(found: list[float], count: int) -> None:
            say(f"single replacements: {len(found)}/{count}")
            by_leader(functools.partial(write_json, file, found))
            self._ask(f"what is in {space.levels.folder} is kept")

        if len(known) > sum(space.last):
            raise UserError(f"{file} has {len(known)} divergences, this search {sum(space.last)}: remove it")
        return single_replacements(space, judged, known, keep)

    def evolve(
        self,
        space: Space,
        generations: int,
        start: Callable[[], Genome],
        step: Callable[[Genome, int], Generation],
    ) -> Genome:
        """The parent after so many generations, those in metrics.jsonl among them."""
        measure = space.budget.measure
        history = from_leader(read_metrics(self.folder))
        parent: Genome = _parent(self.folder, history[-1], space.last) if history else start()
        with MetricsLog(self.folder, "generation") as log:
            log.resume_at(len(history))
            if history:
                say(f"resumed after generation {len(history)}")
            with log.steps(generations):
                for number in range(len(history), generations):
                    found = step(parent, number)
                    parent = found.parent
                    record = {
                        "fitness": found.fitness,
                        "fitness_error": found.error,
                        measure: space.cost(parent),
                        "replaced": found.replaced,
                    }
                    told = {"step": number + 1, **record, "tried": found.tried, "parent": list(parent)}
                    log.write(told, ("fitness", "fitness_error", measure))
                    log.sync()
                    if number + 1 < generations:
                        self._ask(f"saved after generation {number + 1} of {generations}")
        return parent


def _parent(folder: Path, record: Mapping[str, Any], last: Sequence[int]) -> Genome:
    """The genome that a search was left with; UserError when it is none of this model's."""
    found = record.get("parent")
    if not isinstance(found, list) or len(found) != len(last) or any(a > b for a, b in zip(found, last, strict=True)):
        raise UserError(
            f"{folder / 'metrics.jsonl'}: key 'parent': {brief(found)} is no model of this search: restore it"
        )
    return tuple(found)
