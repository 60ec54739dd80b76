"""The `plan` verb: memory of each process of a mask-learning run, or of each TPU, before it is begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_prune.config import PruneConfig
from megatron_prune.errors import UserError
from megatron_prune.option_groups import MOST_PROCESSES
from megatron_prune.options import REQUIRED, MayExist, option
from megatron_prune.verbs import Verb, deliver


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PruneConfig):
    """Memory on each process of a mask-learning run, or layouts that fit, from the same options and YAML as `prune`"""

    basic: ClassVar[tuple[str, ...]] = (
        "target",
        "processes",
        "gpus",
        "gpu_memory",
        "gpus_per_node",
        "tpu",
        "seq_length",
        "global_batch_size",
        "micro_batch_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "sequence_parallel",
        "use_distributed_optimizer",
        "recompute",
        "output",
    )
    examples: ClassVar[tuple[str, ...]] = (
        "Llama-2-7b-hf --processes 8 --tensor-model-parallel-size 8",
        "Llama-2-7b-hf --gpus 64 --gpu-memory 80",
    )

    output_may_exist: ClassVar[MayExist] = "never"

    input: Path = option(REQUIRED, "Megatron checkpoint, or Hugging Face directory with config.json")
    output: Path | None = option(None, "JSON file for the result; left out: printed only")  # type: ignore[assignment]
    method: str = option("maskllm", "method that learns masks, the only kind with a plan: maskllm")
    target: str = option("2:4", "N:M that the masks will have")
    processes: int | None = option(
        None, "processes of the job, over all nodes: one a GPU", at_least=1, at_most=MOST_PROCESSES
    )
    gpus: int | None = option(None, "the same as processes", at_least=1, at_most=MOST_PROCESSES)
    gpu_memory: float | None = option(
        None,
        "GB of a GPU: layouts that fit are proposed, fastest first, instead of looking at one; a tenth stays free",
        above=0,
        at_most=1e6,
    )
    gpus_per_node: int = option(8, "with gpu-memory: GPUs of a machine", at_least=1, at_most=MOST_PROCESSES)
    tpu: str | None = option(
        None, "in place of processes, a slice of TPUs that MaxText would train and learn on: v5p-64"
    )

    def idle(self) -> Mapping[str, str]:
        """What the proposals settle, and what only they need."""
        if self.gpu_memory is None:
            return {"gpus_per_node": "without --gpu-memory"}
        own = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel")
        return dict.fromkeys((*own, "use_distributed_optimizer"), "with --gpu-memory, which proposes it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus is not None:
            if self.processes not in (None, self.gpus):
                raise UserError(f"--gpus {self.gpus} and --processes {self.processes} given; give one of them")
            object.__setattr__(self, "processes", self.gpus)
        if (self.processes is None) == (self.tpu is None):
            given = "both were given" if self.tpu is not None else "neither was given"
            raise UserError(f"--processes (GPUs) or --tpu (a slice, such as v5p-64): {given}; give one of them")


VERB = Verb("plan", PlanConfig, "memory that learning masks will take on each GPU", 40, alone=True, light=True)


def run(config: PlanConfig) -> dict[str, Any]:
    """Print the memory of each pipeline stage's processes; the largest is what a GPU needs."""
    if config.tpu is not None:
        return _tpu(config, config.tpu)
    from megatron_prune.jobs.plan import job_of, plan, told

    assert config.processes is not None, "checked by the configuration"
    if config.gpu_memory is not None:
        return _layouts(config, config.processes, config.gpu_memory)
    job = job_of(config, config.processes)
    stages = plan(job)
    result = {"processes": config.processes, "stages": [asdict(stage) for stage in stages]}
    deliver(told(job, stages), result, config.output)
    return result


def _layouts(config: PlanConfig, gpus: int, gpu_memory: float) -> dict[str, Any]:
    from megatron_prune.jobs import layouts

    found = layouts.layouts(config, gpus, gpu_memory, config.gpus_per_node)
    result = {"processes": gpus, "gpu_memory": gpu_memory, "layouts": [layouts.record(each) for each in found]}
    deliver(layouts.told(found, gpus, config.gpus_per_node), result, config.output)
    return result


def _tpu(config: PlanConfig, name: str) -> dict[str, Any]:
    from megatron_prune.jobs.plan import asked_pattern
    from megatron_prune.jobs.plan_tpu import plan_tpu, told

    target = asked_pattern(config)
    found = plan_tpu(config.input, target, name)
    result = asdict(found)
    deliver(told(found, target), result, config.output)
    return result
