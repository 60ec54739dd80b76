"""One-shot 2:4 pruning of SmolLM2-135M end to end, ours and other tools', whole processes on one machine.

    git clone https://github.com/locuslab/wanda CHECKOUT
    python benchmarks/peers.py --model HF_DIRECTORY --shared ../shared --work runs/peers --wanda CHECKOUT \\
        --llmcompressor-python VENV1/bin/python --modelopt-python VENV2/bin/python

Ours is `prune`, from the Hugging Face directory and the text to a decision on disk (and the changed weights). Another
tool gets the same calibration windows (C1) as token ids, loads the same directory, prunes it in memory
(`peer_driver.py`), and its clock stops there; what it saves after that is only for its perplexity, which `evaluate`
measures for all (P1). Tools without a path given are left out. Measurements in the work folder are not repeated, so
that a long comparison can be made in parts, with --only; without it the result file is written, with --partial of what
is there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality import C4_TRAINING, HERE, hardware, versions

SAMPLES, LENGTH = 64, 512
OURS = "megatron_prune"


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    method: str
    tool: str
    verb: str
    options: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Name in the work folder."""
        return "_".join([self.tool, self.verb, *(option.strip("-") for option in self.options)])


ENTRIES = [
    Entry("magnitude", OURS, "magnitude"),
    Entry("magnitude", "locuslab/wanda", "magnitude"),
    Entry("magnitude", "nvidia-modelopt", "magnitude"),
    Entry("Wanda", OURS, "wanda"),
    Entry("Wanda", "locuslab/wanda", "wanda"),
    Entry("Wanda", "llm-compressor", "wanda"),
    Entry("SparseGPT, weights updated", OURS, "sparsegpt"),
    Entry("SparseGPT, weights updated, sequential", OURS, "sparsegpt", ("--true-sequential",)),
    Entry("SparseGPT, weights updated", "locuslab/wanda", "sparsegpt"),
    Entry("SparseGPT, weights updated", "llm-compressor", "sparsegpt"),
    Entry("SparseGPT, mask only", OURS, "sparsegpt", ("--no-update-weights",)),
    Entry("SparseGPT, mask only", "nvidia-modelopt", "sparsegpt"),
]
DRIVER_NAMES = {"locuslab/wanda": "wanda", "llm-compressor": "llmcompressor", "nvidia-modelopt": "modelopt"}


class Comparison:
    """Measures each entry once and remembers it in the work folder."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.model, self.work, self.checkout = given.model, given.work, given.wanda
        self.c4 = given.shared / "data" / "c4" / "c4_en_sample.jsonl"
        self.text = given.shared / "data" / "wikitext2" / "wiki.test.joined_nn.txt"
        pythons = {
            "locuslab/wanda": Path(sys.executable) if given.wanda else None,
            "llm-compressor": given.llmcompressor_python,
            "nvidia-modelopt": given.modelopt_python,
        }
        self.pythons = {tool: str(python) for tool, python in pythons.items() if python}

    def entries(self, partial: bool = False) -> list[Entry]:
        """Those whose tool is there, or with `partial` those that have been measured."""
        there = [entry for entry in ENTRIES if entry.tool in (OURS, *self.pythons)]
        return [entry for entry in there if not partial or self._record(entry, "cost").exists()]

    def known_perplexity(self, entry: Entry) -> float | None:
        """P1 if it has been measured."""
        return self.perplexity(entry) if self._record(entry, "p1").exists() else None

    def cost(self, entry: Entry) -> dict[str, float]:
        """Wall and CPU seconds and peak memory of the whole process."""
        output = self._output(entry)
        record = self._record(entry, "cost")
        if not record.exists():
            cost = self._ours(entry, output) if entry.tool == OURS else self._theirs(entry, output)
            record.write_text(json.dumps(cost))
        return json.loads(record.read_text())

    def perplexity(self, entry: Entry) -> float:
        """P1 of what the tool made."""
        output = self._output(entry)
        record = self._record(entry, "p1")
        if not record.exists():
            model = output / "model"
            if entry.tool == OURS:
                model = output.with_name(output.name + "_sparse")
                run(megatron_prune("trim", "--input", output, "--output", model))
            run(megatron_prune("evaluate", "--input", model, "--text", self.text, "--output", record))
        return json.loads(record.read_text())["perplexity"]

    def tokens(self) -> Path:
        """The calibration windows as token ids, for the other tools."""
        path = self.work / "tokens.safetensors"
        if not path.exists():
            from safetensors.torch import save_file

            from megatron_prune.data.calibration import windows
            from megatron_prune.data.tokenizer import load_tokenizer

            found = windows([self.c4], load_tokenizer(self.model), SAMPLES, LENGTH, 0, slice(0, C4_TRAINING))
            save_file({"tokens": found.tokens}, path)
        return path

    def _output(self, entry: Entry) -> Path:
        return self.work / entry.folder.replace("/", "-")

    def _record(self, entry: Entry, what: str) -> Path:
        output = self._output(entry)
        return output.with_name(f"{output.name}.{what}.json")

    def _ours(self, entry: Entry, output: Path) -> dict[str, float]:
        words = ["prune", "--method", entry.verb, "--target", "2:4", *entry.options]
        words += ["--input", self.model, "--output", output]
        if entry.verb != "magnitude":
            words += ["--calibration", self.c4, "--calibration-documents", C4_TRAINING]
            words += ["--calibration-samples", SAMPLES, "--calibration-seq-length", LENGTH]
        wall, usage = run(megatron_prune(*words))
        return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_gib": usage.ru_maxrss / 2**20}

    def _theirs(self, entry: Entry, output: Path) -> dict[str, float]:
        words = [self.pythons[entry.tool], HERE / "peer_driver.py", DRIVER_NAMES[entry.tool], entry.verb]
        words += ["--model", self.model, "--tokens", self.tokens(), "--output", output]
        words += ["--checkout", self.checkout] if entry.tool == "locuslab/wanda" else []
        began = time.time()
        run([str(word) for word in words])
        found = json.loads((output / "cost.json").read_text())
        return {"wall_s": found["at"] - began, "cpu_s": found["cpu_s"], "peak_gib": found["peak_gib"]}


def megatron_prune(*words: object) -> list[str]:
    """A verb's command line."""
    return [sys.executable, "-m", "megatron_prune", *map(str, words)]


def run(command: list[str]) -> tuple[float, Any]:
    """Wall seconds and resource usage (peak memory: of the process or its largest child) of a command."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - began, usage


def main() -> None:
    """Measure what is asked for and, when nothing was left out, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, default=Path("runs/peers"))
    parser.add_argument("--wanda", type=Path, help="a checkout of github.com/locuslab/wanda")
    parser.add_argument("--llmcompressor-python", type=Path, help="python of an environment with llmcompressor")
    parser.add_argument(
        "--modelopt-python", type=Path, help="python of one with nvidia-modelopt, transformers, requests"
    )
    parser.add_argument("--only", nargs="*", help="measure just these folders' costs, without a result file")
    parser.add_argument("--partial", action="store_true", help="write what has been measured, measure nothing")
    parser.add_argument("--note", default="", help="what the result file must say of how these rows came about")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(given)
    if given.only is not None:
        for entry in comparison.entries():
            if not given.only or entry.folder in given.only:
                print(entry.folder, comparison.cost(entry), flush=True)
        return
    print(write(comparison, given.note, given.partial))


def write(comparison: Comparison, note: str, partial: bool) -> Path:
    """The result file, of which a document's table is made."""
    rows = []
    for entry in comparison.entries(partial):
        cost = comparison.cost(entry)
        p1 = comparison.known_perplexity(entry) if partial else comparison.perplexity(entry)
        rows.append([f"{entry.method} 2:4", entry.tool, p1, *cost.values()])
    today = datetime.date.today().isoformat()
    result = {
        "columns": ["method", "tool", "perplexity", "wall s", "CPU s", "peak GiB"],
        "rows": rows,
        "protocol": "Whole processes, one after the other, bf16, calibration C1, perplexity P1. Ours reads text and "
        f"writes its decision; the others get token ids, and the clock stops when the model is pruned. {note}".rstrip(),
        "hardware": hardware(),
        "date": today,
        "versions": {**versions(), **peer_versions(comparison)},
    }
    path = HERE / "results" / f"speed_{today}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def peer_versions(comparison: Comparison) -> dict[str, str]:
    """Versions of the other tools, and of the PyTorch each of them ran on."""
    found = {}
    if comparison.checkout:
        command = ["git", "-C", str(comparison.checkout), "rev-parse", "HEAD"]
        found["locuslab/wanda"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    for tool, package in (("llm-compressor", "llmcompressor"), ("nvidia-modelopt", "nvidia-modelopt")):
        if tool in comparison.pythons:
            code = f"from importlib.metadata import version as v; print(v({package!r}), 'on torch', v('torch'))"
            command = [comparison.pythons[tool], "-c", code]
            found[tool] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found


if __name__ == "__main__":
    main()
