"""One-shot 2:4 pruning of SmolLM2-135M end to end, ours and other tools', whole processes on one machine.

    git clone https://github.com/locuslab/wanda CHECKOUT
    python benchmarks/peers.py --model HF_DIRECTORY --shared ../shared --work runs/peers --wanda CHECKOUT \\
        --llmcompressor-python VENV1/bin/python --modelopt-python VENV2/bin/python

Ours is `prune`, from the Hugging Face directory and the text to a decision on disk (and the changed weights). Another
tool gets the same calibration windows (C1, see bench/study.py) as token ids, loads the same directory, prunes it in
memory (`peer_driver.py`), and its clock stops there; what it saves after that is only for its perplexity, which
`evaluate` measures for all (P1). Tools without a path given are left out. With --dtype float32, for processors that
cannot multiply bfloat16, the others prune in it, and what they made is rounded. A long comparison can be made in parts,
with --only; without it the result file is written, with --partial of what is there.

With --recovered another table, with --partial of those whose pruning has been measured: what each tool's SparseGPT,
and the paper's recipe for learned masks in a short run, come to after the same recovery, `train` from the dense model's
logits; text and judges are those of road.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import HERE, MODEL, SHARED, arguments, commit, option, work, write_result
from bench.running import Times, kept, run
from bench.study import C4_TRAINING, LENGTH, SMALL_LENGTH, SMALL_STEPS, Row, Study, folder_name

OURS, WANDA, LLMCOMPRESSOR, MODELOPT = "megatron_prune", "locuslab/wanda", "llm-compressor", "nvidia-modelopt"
DRIVERS = {WANDA: "wanda", LLMCOMPRESSOR: "llmcompressor", MODELOPT: "modelopt"}
"""Names for `peer_driver.py`."""
PACKAGES = {LLMCOMPRESSOR: "llmcompressor", MODELOPT: "nvidia-modelopt"}


@dataclass(frozen=True)
class Entry(Row):
    """One line of the table, by one tool."""

    tool: str = OURS

    @property
    def folder(self) -> str:
        """Name in the work folder."""
        return folder_name(self.tool, self.method, *self.options)


def by(name: str, method: str, *tools: str, options: tuple[str, ...] = ()) -> list[Entry]:
    """The same by several tools."""
    return [Entry(name, method, "2:4", options, tool=tool) for tool in tools]


ENTRIES = [
    *by("magnitude", "magnitude", OURS, WANDA, MODELOPT),
    *by("Wanda", "wanda", OURS, WANDA, LLMCOMPRESSOR),
    *by("SparseGPT, weights updated", "sparsegpt", OURS),
    *by("SparseGPT, weights updated, sequential", "sparsegpt", OURS, options=("--true-sequential",)),
    *by("SparseGPT, weights updated", "sparsegpt", WANDA, LLMCOMPRESSOR),
    *by("SparseGPT, mask only", "sparsegpt", OURS, options=("--no-update-weights",)),
    *by("SparseGPT, mask only", "sparsegpt", MODELOPT),
]
COLUMNS = ["method", "tool", "perplexity", "wall s", "CPU s", "peak GiB"]
LEARNED = Entry("learned masks, the paper's recipe, 60 steps of 512 tokens", "maskllm", "2:4")
BY_SPARSEGPT = [entry for entry in ENTRIES if entry.method == "sparsegpt" and "sequential" not in entry.name]
MASK_ONLY = next(entry for entry in BY_SPARSEGPT if entry.tool == OURS and entry.options)
RECOVERY = 80
"""Steps of training: with the pruning before, about five CPU minutes."""
RECOVERED_COLUMNS = ["pruned by", "tool", "perplexity", "after recovery", "held-out C4", "CPU min"]


class Comparison(Study):
    """Measures each entry once."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(given.work, given.shared)
        self.model, self.checkout, self.dtype = given.model, given.wanda, given.dtype
        pythons = {
            WANDA: sys.executable if given.wanda else None,
            LLMCOMPRESSOR: given.llmcompressor_python,
            MODELOPT: given.modelopt_python,
        }
        self.pythons = {tool: python for tool, python in pythons.items() if python}

    def record(self, entry: Entry, what: str) -> Path:
        """Where a measurement of an entry is kept."""
        return self.work / f"{entry.folder}.{what}.json"

    def entries(self, partial: bool = False) -> list[Entry]:
        """Those whose tool is there, or with `partial` those that have been measured."""
        there = [entry for entry in ENTRIES if entry.tool in (OURS, *self.pythons)]
        return [entry for entry in there if not partial or self.record(entry, "cost").exists()]

    def cost(self, entry: Entry) -> Times:
        """Wall and CPU seconds and peak memory of the whole process."""
        return kept(self.record(entry, "cost"), lambda: (self.ours if entry.tool == OURS else self.theirs)(entry))

    def ours(self, entry: Entry) -> Times:
        """Of the verb."""
        more: dict[str, Any] = {} if entry.method == "magnitude" else self.texts.c1()
        if entry.method == "maskllm":
            self.cost(MASK_ONLY)
            batch = {"seq_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 1}
            start = {"recipe": "paper", "prior": self.work / MASK_ONLY.folder}
            more = {"data": self.training_text(), "train_iters": 60, **batch, **start}
        what = {"method": entry.method, "target": entry.target, "input": self.model}
        return self.verb("prune", *entry.options, output=self.work / entry.folder, **what, **more)

    def theirs(self, entry: Entry) -> Times:
        """Of the other tool, until its model is pruned."""
        output = self.work / entry.folder
        words = [self.pythons[entry.tool], HERE / "peer_driver.py", DRIVERS[entry.tool], entry.method]
        words += ["--model", self.model, "--tokens", self.tokens(), "--output", output, "--dtype", self.dtype]
        words += ["--checkout", self.checkout] if entry.tool == WANDA else []
        began = time.time()
        run(words)
        found = json.loads((output / "cost.json").read_text())
        return {"wall_s": found["at"] - began, "cpu_s": found["cpu_s"], "peak_gib": found["peak_gib"]}

    def p1(self, entry: Entry) -> float:
        """Perplexity of what the tool made."""
        run, record = self.work / entry.folder, self.record(entry, "p1")
        if record.exists():
            return float(json.loads(record.read_text())["perplexity"])
        return self.perplexity(self.trimmed(run, "_sparse") if entry.tool == OURS else run / "model", record)

    def recovered(self, entry: Entry) -> list[Any]:
        """One line of the table of recovery."""
        costs = [self.cost(each) for each in ([MASK_ONLY, entry] if entry is LEARNED else [entry])]
        pruned = self.work / entry.folder / ("" if entry.tool == OURS else "model")
        run = self.work / f"{entry.folder}_recovered"
        options = {**SMALL_STEPS, "teacher": self.model, "train_iters": RECOVERY}
        costs.append(self.verb("train", input=pruned, output=run, data=self.training_text(), **options))
        model = self.trimmed(run, "_sparse")
        minutes = round(sum(cost["cpu_s"] for cost in costs) / 60, 1)
        return [entry.name, entry.tool, self.p1(entry), self.perplexity(model), self.on_held_out(model), minutes]

    def tokens(self) -> Path:
        """The calibration windows as token ids, for the other tools."""
        path = self.work / "tokens.safetensors"
        if not path.exists():
            from safetensors.torch import save_file

            from megatron_prune.data.tokenizer import load_tokenizer

            save_file({"tokens": self.texts.c1_windows(load_tokenizer(self.model))}, path)
        return path

    def row(self, entry: Entry, partial: bool) -> list[Any]:
        """One line of the table; with `partial` without a perplexity that was not measured."""
        cost = self.cost(entry)
        known = self.record(entry, "p1").exists() or not partial
        return [f"{entry.name} {entry.target}", entry.tool, self.p1(entry) if known else None, *cost.values()]

    def versions(self) -> dict[str, str]:
        """Of the other tools, and of the PyTorch each of them ran on."""
        found = {WANDA: str(commit(self.checkout))} if self.checkout else {}
        for tool, package in PACKAGES.items():
            if tool in self.pythons:
                code = f"from importlib.metadata import version as v; print(v({package!r}), 'on torch', v('torch'))"
                found[tool] = run([self.pythons[tool], "-c", code])[1].strip()
        return found


def main() -> None:
    """Measure what is asked for and, when nothing was left out, write the result file."""
    given = arguments(
        __doc__,
        MODEL,
        SHARED,
        work("runs/peers"),
        option("--wanda", type=Path, help="a checkout of github.com/locuslab/wanda"),
        option("--llmcompressor-python", type=Path, help="python of an environment with llmcompressor"),
        option("--modelopt-python", type=Path, help="python of one with nvidia-modelopt, transformers, requests"),
        option("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="that other tools prune in"),
        option("--only", nargs="*", help="measure just these folders' costs, without a result file"),
        option("--partial", action="store_true", help="write what has been measured, measure nothing"),
        option("--recovered", action="store_true", help="the table of recovery instead, and its result file"),
    )
    comparison = Comparison(given)
    if given.recovered:
        entries = [entry for entry in comparison.entries(given.partial) if entry in BY_SPARSEGPT] + [LEARNED]
        protocol = (
            f"2:4 by each tool, calibration C1, then {RECOVERY} steps of {SMALL_LENGTH} tokens, KL from the dense "
            f"model's logits, zeros kept. Perplexity P1; held-out C4: the documents after the first {C4_TRAINING}."
        )
        lines = [comparison.recovered(entry) for entry in entries]
        write_result("recovered", given, RECOVERED_COLUMNS, lines, protocol, versions=comparison.versions())
        return
    if given.only is not None:
        for entry in comparison.entries():
            if not given.only or entry.folder in map(folder_name, given.only):
                print(entry.folder, comparison.cost(entry), flush=True)
        return
    rows = [comparison.row(entry, given.partial) for entry in comparison.entries(given.partial)]
    protocol = (
        "Whole processes, one after the other, bf16, calibration C1, perplexity P1. Ours reads text and writes its "
        "decision; the others get token ids, and the clock stops when the model is pruned."
    )
    write_result("speed", given, COLUMNS, rows, protocol, versions=comparison.versions())


if __name__ == "__main__":
    main()
