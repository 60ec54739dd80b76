"""The `plan` verb: memory of each process of a mask-learning run, before it is begun."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_prune.config import PruneConfig
from megatron_prune.option_groups import MOST_PROCESSES
from megatron_prune.options import REQUIRED, MayExist, option
from megatron_prune.verbs import Verb, deliver


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PruneConfig):
    """Memory on each process of a mask-learning run, from the same options and YAML as `prune`"""

    output_may_exist: ClassVar[MayExist] = "never"

    input: Path = option(REQUIRED, "Megatron checkpoint, or Hugging Face directory with config.json")
    output: Path | None = option(None, "JSON file for the result; left out: printed only")  # type: ignore[assignment]
    processes: int = option(REQUIRED, "processes of the job, over all nodes", at_least=1, at_most=MOST_PROCESSES)


VERB = Verb("plan", PlanConfig, "memory that learning masks will take on each GPU", 40, alone=True, light=True)


def run(config: PlanConfig) -> dict[str, Any]:
    """Print the memory of each pipeline stage's processes; the largest is what a GPU needs."""
    from megatron_prune.jobs.plan import job_of, plan, told

    job = job_of(config, config.processes)
    stages = plan(job)
    result = {"processes": config.processes, "stages": [asdict(stage) for stage in stages]}
    deliver(told(job, stages), result, config.output)
    return result
