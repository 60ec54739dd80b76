"""What `prune` and `train` write beside their run on request: the result as a Hugging Face directory, proved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import psutil

from megatron_prune.config import ExportConfig, VerifyConfig
from megatron_prune.decision.pruned import open_source
from megatron_prune.decision.run_folder import FINISHED, read_run
from megatron_prune.errors import UserError
from megatron_prune.evaluation.verify import told, verify
from megatron_prune.exporting.export import export
from megatron_prune.model.cost import parameters
from megatron_prune.option_groups import Parallelism
from megatron_prune.ranks import from_leader

ROOM = 0.5
"""Share of the free memory that a whole float32 model may take, for its logits to be compared."""


def release(run: Path, output: Path, parallelism: Parallelism) -> Iterable[str]:
    """Export a run to the Hugging Face directory `output` and verify that; lines on both. By all processes.

    UserError where the directory is not what the run decided: then it stays, to be looked at.
    """
    if read_run(run).state not in FINISHED:
        yield f"{output} is not written: the run has not finished"
        return
    yield from export(ExportConfig(input=run, output=output, parallelism=parallelism))
    source = open_source(run)
    against = str(run) if _fits(parameters(source.config)) else None
    if against is None:
        yield "logits are not compared: a whole model in float32 would take more than half of the free memory"
        if not source.history.get("target"):
            return
    result = verify(VerifyConfig(input=output, against=against, parallelism=parallelism))
    yield from told(result)
    if result["checked"] and not result["holds"]:
        raise UserError(f"{output} is not what {run} has decided, see above: do not use it, and export the run again")


def _fits(count: int) -> bool:
    """Whether process 0's machine has room for a model of so many parameters. Collective."""
    with backend.running(backend.Layout()):
        return bool(from_leader(4 * count <= ROOM * psutil.virtual_memory().available))
