"""The `train` verb: a model in, the same model with better weights out; what was pruned stays zero."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.config import TrainConfig
from megatron_prune.verbs import Verb

VERB = Verb("train", TrainConfig, "recover a pruned model: text, a teacher, LoRA; zeros stay", 50)


def run(config: TrainConfig) -> Path:
    """Train `config.input` into the run folder `config.output`."""
    from megatron_prune.jobs.train import train
    from megatron_prune.log import say

    say(train(config))
    if config.export is not None:
        from megatron_prune.jobs.released import release

        for line in release(config.output, config.export, config.parallelism):
            say(line)
    return config.output
