"""The `report` verb: one HTML page of runs and results."""

from __future__ import annotations

from megatron_prune.claims import refuse_existing
from megatron_prune.config import ReportConfig
from megatron_prune.errors import UserError
from megatron_prune.files import new_file
from megatron_prune.log import say
from megatron_prune.reporting.collect import collect
from megatron_prune.reporting.report import render


def run(config: ReportConfig) -> None:
    """Collect, draw, and write the page; it appears whole or not at all."""
    refuse_existing(config.output, "page")
    if not config.inputs:
        raise UserError("report: no run given; allowed: report RUN... --output PAGE.html")
    page = render(collect(config.inputs), config.title)
    with new_file(config.output, "page") as partial:
        partial.write_text(page, encoding="utf-8")
    say(f"{config.output}: {len(page.encode()) / 2**20:.1f} MiB")
