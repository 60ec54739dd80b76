"""What masks learned on general text bring where a domain counts: perplexities of SmolLM2-135M in and out of it.

    python benchmarks/transfer.py --model HF_DIRECTORY --shared ../shared [--general RUN]

The domain is one source of the training text, Python's enhancement proposals unless another is named; every tenth of
its documents is held out. General text is C4 and Wikipedia (bench/study.py), on which the long run of quality.py learns
a mask, or a run that is given has. On the domain each start is then learned on for the same 60 steps of 512 tokens.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from bench.results import HERE, MODEL, SHARED, arguments, note, option, work, write_result
from bench.study import WINDOWS, Study

PATTERN = "2:4"
MASK_ONLY = {"method": "sparsegpt", "target": PATTERN, "update_weights": False}
LONG, SHORT = HERE / "maskllm_long.yaml", HERE / "maskllm_60_steps.yaml"
HELD_OUT = 10
"""Of so many documents of the domain the last is held out."""
COLUMNS = ["mask", "tokens of the domain", "perplexity in the domain", "perplexity outside", "CPU s on the domain"]


class Transfer(Study):
    """Makes the rows."""

    def __init__(self, work: Path, shared: Path, domain: str) -> None:
        super().__init__(work, shared)
        self.domain = domain
        self.learned, self.held_out = (self.work / f"{domain}_{part}" for part in ("learned.jsonl", "held_out.txt"))

    def prepare(self) -> None:
        """Part the domain's documents; SystemExit when there are none."""
        with gzip.open(self.texts.mix, "rt", encoding="utf-8") as mix:
            found = [line for line in map(json.loads, mix) if line["source"] == self.domain]
        if not found:
            raise SystemExit(f"--domain {self.domain}: no document of {self.texts.mix} has that source")
        kept = [line for number, line in enumerate(found) if number % HELD_OUT != HELD_OUT - 1]
        self.learned.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        rest = [line["text"] for number, line in enumerate(found) if number % HELD_OUT == HELD_OUT - 1]
        self.held_out.write_text("\n\n".join(rest), encoding="utf-8")

    def prior(self, name: str, **text: object) -> Path:
        """SparseGPT's mask, calibrated on a text."""
        run = self.work / f"prior_{name}"
        self.verb("prune", input=self.dense, output=run, **MASK_ONLY, **text)
        return run

    def learn(self, name: str, start: Path, recipe: Path, data: Path) -> tuple[Path, float]:
        """A mask learned from another on a text, and the CPU seconds that it took."""
        run = self.work / name
        cost = self.verb("prune", input=self.dense, output=run, config=recipe, prior=start, data=data)
        return run, cost["cpu_s"]

    def line(self, title: str, run: Path | None, tokens: int = 0, spent: float = 0) -> list[Any]:
        """A row of a run's mask on the dense weights, or of the dense model."""
        model = self.dense if run is None else self.work / f"{run.name}_sparse"
        if run is not None:
            self.verb("trim", input=run, output=model)
        found = self.perplexity(model, self.work / f"{model.name}.domain.json", self.held_out)
        return [title, tokens, found, self.perplexity(model), round(spent)]


def main() -> None:
    """Run everything and write the result file."""
    domain = option("--domain", default="peps", help="a source of the training text")
    general = option("--general", type=Path, help="a run that learned a mask on general text; left out: made here")
    given = arguments(__doc__, MODEL, SHARED, work("runs/transfer"), domain, general, note())
    bench = Transfer(given.work, given.shared, given.domain)
    bench.imported(given.model)
    bench.prepare()
    on_general = bench.prior("general", **bench.texts.c1())
    on_domain = bench.prior("domain", calibration=bench.learned, **WINDOWS)
    learned = given.general or bench.learn("general", on_general, LONG, bench.training_text())[0]
    tokens = 60 * 512
    rows = [
        bench.line("dense", None),
        bench.line("SparseGPT's, calibrated on general text", on_general),
        bench.line("SparseGPT's, calibrated on the domain", on_domain, 64 * 512),
        bench.line("learned on general text", learned),
    ]
    for title, name, start in (
        ("learned on the domain, from SparseGPT's of the domain", "scratch", on_domain),
        ("learned on general text, then on the domain", "transferred", learned),
    ):
        run, spent = bench.learn(name, start, SHORT, bench.learned)
        rows.append(bench.line(title, run, tokens, spent))
    protocol = (
        f"2:4 masks on the dense weights. Domain: {given.domain}, every tenth document held out, 32 windows of 1024; "
        "outside: P1 (WikiText-2 test, windows of 1024, first 32). On the domain: 60 steps of 512 tokens, one order of "
        "the data."
    )
    write_result("transfer", given, COLUMNS, rows, protocol)


if __name__ == "__main__":
    main()
