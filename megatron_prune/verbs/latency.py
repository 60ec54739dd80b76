"""The `latency` verb: the time of a layer's parts at several sizes, for budgets."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.config import LatencyConfig
from megatron_prune.verbs import Verb

VERB = Verb("latency", LatencyConfig, "time a layer's parts at several sizes, for budgets", 110, alone=True)


def run(config: LatencyConfig) -> Path:
    """Measure and write the table."""
    from megatron_prune.log import say
    from megatron_prune.search.latency import measured

    table, whole = measured(config)
    table.save(config.output)
    say(f"{config.output}: the whole model takes {whole} us for {config.batch_size} x {config.prompt_length} tokens")
    return config.output
