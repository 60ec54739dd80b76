"""Perplexity of SmolLM2-135M after structured pruning, through the verbs a user would type. One command:

    python benchmarks/structured.py --model HF_DIRECTORY --shared ../shared --calibration TRAIN.jsonl

Protocol P1 as in quality.py. TRAIN.jsonl is Wikipedia text as examples/quickstart/fetch_text.py makes it; windows of
512 tokens, seed 0; methods that run candidates take fewer of them. Stages that are already in the work folder are not
done again; rows that are in neither the work folder nor `--only` are left out of the result. Writes
benchmarks/results/structured_DATE.json, of which a document's table is made.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality import Bench, write_result


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    target: str
    options: tuple[str, ...] = ()
    other: str = ""
    """The same request by other code on this model, text and protocol."""
    samples: int = 64
    """Calibration windows of 512 tokens."""
    in_domain: bool = False
    """Calibrated on WikiText-2's validation part instead of Wikipedia."""

    @property
    def folder(self) -> str:
        """Name of the run folder."""
        words = [self.method, self.target.translate(str.maketrans("=,", "--")), *(o.strip("-") for o in self.options)]
        words += ["wikitext"] * self.in_domain + [f"{self.samples}-windows"] * (self.samples > 64)
        return "_".join(words).replace("=", "-")


def depth(layers: int, *found: str) -> list[Row]:
    """Every way to choose layers, for one number of them; those that measure losses have fewer windows."""
    target = f"num_layers={layers}"
    return [
        Row("shortgpt", target, (), found[0]),
        Row("minitron", target, ("--depth=contiguous",), found[1], samples=16),
        Row("minitron", target, (), "best of these", samples=8),
        Row("minitron", target, (), "best of these", samples=8, in_domain=True),
    ]


def width(target: str, plain: str, best: str, attention: bool = False) -> list[Row]:
    """One target, as published and with the compensation."""
    published = ("--heads=activations",) if attention else ()
    with_activations = [Row("minitron", target, published, best)] if attention else []
    return [
        Row("minitron", target, ("--refit=none", "--no-norm-gain", *published), plain),
        *with_activations,
        Row("minitron", target, (), best),
    ]


ROWS = [
    *width("ffn_hidden_size=1152", "45.05", "35.55 (@16)"),
    Row("minitron", "ffn_hidden_size=1152", ("--sequence=l2",), "35.55 (@16)"),
    Row("minitron", "ffn_hidden_size=1152", ("--sequence=l2", "--refit=propagated"), "35.55 (@16)"),
    *width("num_attention_heads=6", "684.3", "33.04 (@16)", attention=True),
    Row("minitron", "num_attention_heads=6", (), "33.04 (@16)", samples=128),
    *width("num_query_groups=2", "72.03", "47.06 (@16)", attention=True),
    *width("hidden_size=504", "", ""),
    *width("hidden_size=432", "", ""),
    *width("ffn_hidden_size=1152,num_attention_heads=6", "2800.5", "49.18"),
    Row("minitron", "parameters=100M", samples=32),
    Row("llm_pruner", "ffn_hidden_size=1013,num_query_groups=2", ("--refit=none",), "144.2", samples=16),
    Row("llm_pruner", "ffn_hidden_size=1013,num_query_groups=2", (), "", samples=16),
    Row("flap", "parameters=107M", ("--refit=none",)),
    Row("flap", "parameters=107M"),
    *depth(27, "37.41", "40.06"),
    *depth(24, "71.80", "63.22"),
    *depth(21, "134.4", "162.1"),
]


class StructuredBench(Bench):
    """Runs the rows."""

    calibration: Path

    def row(self, row: Row, run_it: bool) -> list[Any] | None:
        """Prune, trim and evaluate; None when it has not been run and is not to be."""
        run = self.work / row.folder
        if not run.exists() and not run_it:
            return None
        text = self.shared / "data" / "wikitext2" / "wiki.valid.raw" if row.in_domain else self.calibration
        words = ["--calibration", text, "--calibration-samples", row.samples, "--calibration-seq-length", 512]
        given = ["prune", "--input", self.dense, "--method", row.method, "--target", row.target, *row.options]
        if row.method in ("shortgpt", "minitron", "flap") and not row.in_domain:  # one pass serves all their rows
            words += ["--statistics", self.work / f"statistics_{row.samples}"]
        self.verb(*given, *words, output=run)
        small, size = self.trimmed(run)
        options = " ".join([*(o.strip("-") for o in row.options), *(["calibrated in domain"] if row.in_domain else [])])
        return [row.method, row.target, options, row.samples, size, self.perplexity(small)["perplexity"], row.other]


def main() -> None:
    """Run everything and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/structured"))
    parser.add_argument("--only", help="run just the rows whose folder's name has this in it")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    bench = StructuredBench(given.model, given.shared, given.work)
    bench.calibration = given.calibration
    bench.verb("import", "--input", given.model, output=bench.dense)
    dense = ["dense", "", "", "", 134_515_008, bench.perplexity(bench.dense)["perplexity"], "24.19"]
    found = [bench.row(row, given.only is None or given.only in row.folder) for row in ROWS]
    result = {
        "columns": ["method", "target", "options", "windows", "parameters", "perplexity", "other code"],
        "rows": [dense, *(row for row in found if row is not None)],
        "protocol": "Perplexity P1, bf16, no recovery training. "
        "Calibration: windows of 512 tokens of Wikipedia; in domain: of WikiText-2's validation part. "
        "Other code: measured earlier with its own Wikipedia text; "
        "@16 is the first 16 windows, where dense is 22.87.",
    }
    write_result("structured", result)


if __name__ == "__main__":
    main()
