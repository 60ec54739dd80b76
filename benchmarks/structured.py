"""Perplexity of SmolLM2-135M after structured pruning, through the verbs a user would type.

    python benchmarks/structured.py --model HF_DIRECTORY --shared ../shared --calibration TRAIN.jsonl

Protocol P1 (see bench/study.py). TRAIN.jsonl is Wikipedia text as examples/quickstart/fetch_text.py makes it; windows
of 512 tokens, seed 0; methods that run candidates take fewer of them. Rows that are in neither the work folder nor
`--only` are left out of the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import CALIBRATION, MODEL, SHARED, arguments, option, work, write_result
from bench.study import Study, folder_name


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
        more = ["wikitext"] * self.in_domain + [f"{self.samples}-windows"] * (self.samples > 64)
        return folder_name(self.method, self.target, *self.options, *more)


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
    Row(
        "llm_pruner",
        "ffn_hidden_size=1013,num_query_groups=2",
        ("--refit=none", "--gradient-windows=0", "--gradient-length=0"),
        samples=16,
    ),
    Row("llm_pruner", "ffn_hidden_size=1013,num_query_groups=2", (), "", samples=16),
    Row("flap", "parameters=107M", ("--refit=none",)),
    Row("flap", "parameters=107M"),
    *depth(27, "37.41", "40.06"),
    *depth(24, "71.80", "63.22"),
    *depth(21, "134.4", "162.1"),
]
COLUMNS = ["method", "target", "options", "windows", "parameters", "perplexity", "other code"]
PROTOCOL = (
    "Perplexity P1, bf16, no recovery training. Calibration: windows of 512 tokens of Wikipedia; in domain: of "
    "WikiText-2's validation part. Other code: measured earlier with its own Wikipedia text; @16 is the first 16 "
    "windows, where dense is 22.87."
)


def line(bench: Study, row: Row, calibration: Path) -> list[Any]:
    """Prune, trim and evaluate."""
    run = bench.work / row.folder
    text: dict[str, Any] = {"calibration": bench.texts.wikitext_validation if row.in_domain else calibration}
    if row.method in ("shortgpt", "minitron", "flap") and not row.in_domain:  # one pass serves all their rows
        text["statistics"] = bench.work / f"statistics_{row.samples}"
    windows = {"calibration_samples": row.samples, "calibration_seq_length": 512}
    what = {"input": bench.dense, "method": row.method, "target": row.target}
    bench.verb("prune", *row.options, output=run, **what, **text, **windows)
    small = bench.trimmed(run)
    options = " ".join([*(word.strip("-") for word in row.options), *["calibrated in domain"] * row.in_domain])
    found = [bench.parameters(run), bench.perplexity(small)]
    return [row.method, row.target, options, row.samples, *found, row.other]


def main() -> None:
    """Run everything and write the result file."""
    only = option("--only", help="run just the rows whose folder's name has this in it")
    given = arguments(__doc__, MODEL, SHARED, CALIBRATION, work("runs/structured"), only)
    bench = Study(given.work, given.shared)
    bench.imported(given.model)
    wanted = [row for row in ROWS if (given.only or "") in row.folder or (bench.work / row.folder).exists()]
    dense = ["dense", "", "", "", 134_515_008, bench.perplexity(bench.dense), "24.19"]
    rows = [dense, *(line(bench, row, given.calibration) for row in wanted)]
    write_result("structured", given, COLUMNS, rows, PROTOCOL)


if __name__ == "__main__":
    main()
