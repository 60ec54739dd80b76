"""The `prune` verb: a Megatron checkpoint and a method in, a run folder with a decision out."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.config import PruneConfig
from megatron_prune.verbs import Verb

VERB = Verb("prune", PruneConfig, "decide which weights stay, by a method from a paper", 30)


def run(config: PruneConfig) -> Path:
    """Prune `config.input` into the run folder `config.output`."""
    from megatron_prune.jobs.prune import prune
    from megatron_prune.log import say

    say(prune(config))
    if config.export is not None:
        from megatron_prune.jobs.released import release

        for line in release(config.output, config.export, config.parallelism):
            say(line)
    return config.output
