"""What more generations of DarwinLM bring, from both starts, over seeds of the search. One command:

    python benchmarks/generations.py --model HF_DIRECTORY --name SmolLM2 --calibration TRAIN.jsonl --text EVAL.txt \\
        --parameters 107972928

Each seed is one search; its parents after `--generations` are compared, so few generations are the beginning of many.
Levels are shared, and so are single replacements, which no seed changes. Without `--calibration` both texts are what
the model writes itself (small models of stories). Answers are judged on text that the search has not seen. What is in
the work folder is not done again. Writes a result file, benchmarks/results/generations_DATE.json, of which a document's
table is made; rows of other models, sizes and starts that are in it stay.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from bench.results import MODEL, SHARED, arguments, option, work, write_result
from bench.study import Texts

if __name__ == "__main__":
    GIVEN = arguments(
        __doc__,
        MODEL,
        SHARED,
        work("runs/generations"),
        option("--name", required=True, help="of the model, in the table"),
        option("--parameters", required=True),
        option("--calibration", type=Path, help="text, a document a line; left out: what the model writes"),
        option("--text", type=Path, help="of the same kind, that judges the answers"),
        option("--samples", type=int, default=64),
        option("--length", type=int, default=512),
        option("--windows", type=int, default=32, help="that judge the answers"),
        option("--generations", type=int, nargs="+", default=[10, 30, 60]),
        option("--seeds", type=int, nargs="+", default=[0, 1, 2]),
        option("--starts", nargs="+", choices=["uniform", "integer"], default=["uniform", "integer"]),
        option("--options", nargs="*", default=[], help="of the method: offspring=8 survivors=2,1 ..."),
    )

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.data.calibration import windows
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import parse_any_target
from megatron_prune.log import read_metrics
from megatron_prune.methods.base import get_method
from megatron_prune.methods.darwinlm import DarwinLM
from megatron_prune.model.forward import logits, window_losses
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.search.candidates import put
from megatron_prune.search.fitness import divergences
from megatron_prune.search.held_out import split
from megatron_prune.search.integer import best_sum
from megatron_prune.search.levels import Levels
from megatron_prune.search.session import REPLACEMENTS
from megatron_prune.search.space import Space
from megatron_prune.statistics.passes import Passes
from megatron_prune.training.stopping import StopRequest

COLUMNS = ["model", "parameters", "start", "generations", "accepted", "KL", "perplexity", "lowest", "highest"]
COLUMNS += ["WikiText-2"]


def written(model: PrunableModel, count: int, length: int) -> Tensor:
    """Windows `[count, length]` that the model writes, token by token, from its first token on."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((count, 1), 1)
    while tokens.shape[1] <= length:
        chances = logits(model, tokens)[:, -1].float().softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    return tokens[:, 1:]


class Grid:
    """Searches of one model and size."""

    def __init__(self, given: Any) -> None:
        self.given = given
        source = open_model(given.model)
        self.model = source.load(backend.Layout())
        self.dense = {name: parameter.detach().clone() for name, parameter in self.model.parameters.items()}
        if given.calibration is None:
            tokens = written(self.model, given.samples + given.windows, given.length)
            calibration, self.texts = tokens[: given.samples], {"same": tokens[given.samples :]}
        else:
            tokenizer = load_tokenizer(source.tokenizer, source.config.vocab_size)
            calibration = windows([given.calibration], tokenizer, given.samples, given.length, 0).tokens
            files = {"same": given.text, "WikiText-2": Texts(given.shared).wikitext}
            self.texts = {name: self.spaced(tokenizer, file) for name, file in files.items()}
        self.passes = Passes(self.model, calibration)
        self.target = parse_any_target(f"parameters={given.parameters}")
        self.known = given.work / "judged.json"
        self.whole: dict[str, dict[int, Tensor]] = {name: {} for name in self.texts}

    def spaced(self, tokenizer: Any, file: Path) -> Tensor:
        """Windows of a text, evenly spaced."""
        ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        step = len(ids) // self.given.windows
        return torch.tensor([ids[n * step : n * step + self.given.length] for n in range(self.given.windows)])

    def method(self, start: str, seed: int) -> DarwinLM:
        options = {**dict(word.split("=") for word in self.given.options), "training_tokens": "0"}
        numbers = {name: int(value) if value.isdigit() else value for name, value in options.items()}
        for name in ("survivors", "fitness_tokens", "training_tokens"):
            numbers |= {name: str(numbers[name])} if name in numbers else {}
        database, generations = str(self.given.work / "levels"), max(self.given.generations)
        found = get_method(
            "darwinlm", start=start, search_seed=seed, generations=generations, database=database, **numbers
        )
        assert isinstance(found, DarwinLM)
        return found

    def searched(self, start: str, seed: int) -> list[tuple[tuple[int, ...], int]]:
        """Parents after 0, 1, 2, ... generations, and how many children had been accepted by then."""
        folder = self.given.work / f"{self.given.parameters}_{start}_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        first = self.given.work / f"{self.given.parameters}_{start}_{self.given.seeds[0]}" / REPLACEMENTS
        if first.is_file() and not (folder / REPLACEMENTS).exists():
            shutil.copy(first, folder)
        method = self.method(start, seed)
        work = {"model": self.model, "config": self.model.config, "passes": self.passes, "folder": folder}
        method.decide(SimpleNamespace(**work, stop=StopRequest()), self.target)  # type: ignore[arg-type]
        self.restore()
        history = read_metrics(folder)
        accepted = [sum(record["replaced"] for record in history[:n]) for n in range(len(history) + 1)]
        parents = [self.start(method, folder), *(tuple(record["parent"]) for record in history)]
        return list(zip(parents, accepted, strict=True))

    def start(self, method: DarwinLM, folder: Path) -> tuple[int, ...]:
        """What the search began with."""
        space = self.space(method)
        if method.start == "uniform":
            return space.start()
        scores = iter(json.loads((folder / REPLACEMENTS).read_text()))
        return best_sum(space, [[0.0, *(next(scores) for _ in range(last))] for last in space.last])

    def space(self, method: DarwinLM) -> Space:
        fit, _ = split(self.passes)
        levels = Levels(self.given.work / "levels", fit, method.levels, method.refit_damping, method.free_groups)
        return Space(self.model.config, levels, self.target)  # type: ignore[arg-type]

    def restore(self) -> None:
        for name, parameter in self.model.parameters.items():
            parameter.data.copy_(self.dense[name])

    def judged(self, space: Space, genome: tuple[int, ...]) -> dict[str, list[float]]:
        """KL from the whole model, and perplexity, of the model that a genome is, by text; kept in the work folder."""
        known = json.loads(self.known.read_text()) if self.known.exists() else {}
        key = str(list(genome))
        if key not in known:
            known[key] = {name: self.judged_on(name, space, genome) for name in self.texts}
            self.known.write_text(json.dumps(known))
        return known[key]

    def judged_on(self, name: str, space: Space, genome: tuple[int, ...]) -> list[float]:
        """The same of one text."""
        tokens = self.texts[name]
        (scores,) = divergences(self.model, space.levels, [genome], tokens, whole=self.whole[name])
        put(self.model, space.levels, genome)
        with torch.no_grad():
            total, count = window_losses(self.model, tokens)
        self.restore()
        return [fmean(scores), math.exp(total / count)]

    def rows(self, start: str) -> list[list[Any]]:
        """One for each number of generations: means and extremes over seeds."""
        space = self.space(self.method(start, 0))
        runs = [self.searched(start, seed) for seed in self.given.seeds]
        rows: list[list[Any]] = []
        for number in [0, *sorted(self.given.generations)]:
            judged = [self.judged(space, run[number][0]) for run in runs]
            apart, perplexities = zip(*(found["same"] for found in judged), strict=True)
            figures = [fmean(apart), fmean(perplexities), min(perplexities), max(perplexities)]
            if "WikiText-2" in self.texts:
                figures.append(fmean(found["WikiText-2"][1] for found in judged))
            rounded = [float(f"{figure:.4g}") for figure in figures]
            accepted = round(fmean(run[number][1] for run in runs), 1)
            row = [self.given.name, self.target.limit, start, number, accepted, *rounded]  # type: ignore[union-attr]
            rows.append([*row, *[""] * (len(COLUMNS) - len(row))])
        return rows


def main() -> None:
    """Run the searches of one model and size, and write the result file."""
    with backend.running(backend.Layout()):
        grid = Grid(GIVEN)
        rows = [row for start in GIVEN.starts for row in grid.rows(start)]
    results = sorted(GIVEN.output.glob("generations_*.json"))
    earlier = json.loads(results[-1].read_text()) if results else {"rows": [], "protocols": {}}
    kept = [row for row in earlier["rows"] if row[:3] not in [other[:3] for other in rows]]
    text = "text that the model wrote" if GIVEN.calibration is None else "Wikipedia"
    key = f"{GIVEN.name}, {grid.target.limit} parameters, {' and '.join(GIVEN.starts)}"  # type: ignore[union-attr]
    told = f"{GIVEN.samples} x {GIVEN.length} tokens of {text}, {GIVEN.windows} windows; seeds {len(GIVEN.seeds)}"
    protocols = earlier["protocols"] | {key: f"{told}; {' '.join(GIVEN.options)}"}
    protocol = (
        "KL and perplexity of other text of the same kind, perplexity of WikiText-2's test part, nothing trained; "
    )
    protocol += "means over seeds of the search, and extremes. "
    protocol += " ".join(f"{name}: {words}." for name, words in sorted(protocols.items()))
    write_result("generations", GIVEN, COLUMNS, sorted([*kept, *rows], key=str), protocol, protocols=protocols)


if __name__ == "__main__":
    main()
