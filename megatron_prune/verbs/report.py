"""The `report` verb: one HTML page of runs and results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_prune.errors import UserError
from megatron_prune.options import REQUIRED, Options, option
from megatron_prune.verbs import Verb


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
    """One self-contained HTML page of what runs removed and what it cost; RUN... may stand right after the verb"""

    examples: ClassVar[tuple[str, ...]] = (
        "run dense.json sparse.json --output page.html",
        "run_a run_b --output page.html --title 'Two methods'",
    )

    positional: ClassVar[tuple[str, ...]] = ("inputs",)

    inputs: tuple[Path, ...] = option(
        (), "run folders, checkpoints, Hugging Face directories, JSON results of evaluate, verify and bench"
    )
    output: Path = option(REQUIRED, "HTML file to write; must not exist")
    title: str = option("megatron_prune report", "heading of the page")


VERB = Verb("report", ReportConfig, "one HTML page of runs and results", 130, alone=True)


def run(config: ReportConfig) -> Path:
    """Collect, draw, and write the page; it appears whole or not at all."""
    from megatron_prune.files import new_file
    from megatron_prune.log import say
    from megatron_prune.reporting.collect import collect
    from megatron_prune.reporting.report import render

    if not config.inputs:
        raise UserError("report: no run given; allowed: report RUN... --output PAGE.html")
    page = render(collect(config.inputs), config.title)
    with new_file(config.output, "page") as partial:
        partial.write_text(page, encoding="utf-8")
    say(f"{config.output}: {len(page.encode()) / 2**20:.1f} MiB")
    return config.output
