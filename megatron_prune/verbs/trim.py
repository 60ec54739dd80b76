"""The `trim` verb: a run's decision applied to its weights; a checkpoint without training state comes out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_prune.option_groups import Parallelism
from megatron_prune.options import REQUIRED, Options, group, option
from megatron_prune.verbs import Verb, deliver


@dataclass(frozen=True, kw_only=True)
class TrimConfig(Options):
    """A pruning run -> a released checkpoint: removed weights zero, removed units gone, training state gone"""

    basic: ClassVar[tuple[str, ...]] = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
    )
    examples: ClassVar[tuple[str, ...]] = (
        "run sparse",
        "run sparse --tensor-model-parallel-size 2",
    )

    input: Path = option(REQUIRED, "run folder of `prune` or `train`")
    output: Path = option(REQUIRED, "Megatron checkpoint to write; must not exist")
    parallelism: Parallelism = group(Parallelism)


VERB = Verb("trim", TrimConfig, "apply a decision: a checkpoint with true zeros", 60)


def run(config: TrimConfig) -> Path:
    """Write the checkpoint `config.output` from the run `config.input`."""
    from megatron_prune.decision.pruned import trim

    deliver([trim(config.input, config.output, config.parallelism)])
    return config.output
