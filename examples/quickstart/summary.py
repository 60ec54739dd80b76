"""Prints the quickstart's table; status 1 when the learned mask does not beat its prior, or recovery the mask."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROWS = {
    "dense": "dense, Megatron",
    "prior": "2:4 by SparseGPT, mask only (the prior)",
    "learned": "2:4 by learned masks, dense weights",
    "recovered": "2:4 by learned masks, weights trained",
    "exported": "the same, exported to Hugging Face",
}


def perplexities(results: Path) -> dict[str, float]:
    """Row -> perplexity on the held-out text."""
    return {row: json.loads((results / f"{row}.json").read_text())["perplexity"] for row in ROWS}


def table(values: dict[str, float]) -> Table:
    """Perplexity of each model, and how much of the prior's loss is still there."""
    made = Table("SmolLM2-135M", "perplexity", "of the prior's gap")
    for row, title in ROWS.items():
        share = (values[row] - values["dense"]) / (values["prior"] - values["dense"])
        made.add_row(title, f"{values[row]:.2f}", f"{share:.0%}")
    return made


def main(results: Path) -> int:
    values = perplexities(results)
    Console().print(table(values))
    for better, worse, complaint in (
        ("learned", "prior", "the learned mask does not beat its prior"),
        ("recovered", "learned", "training does not recover what the mask lost"),
    ):
        if not values[better] < values[worse]:
            print(complaint, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
