"""The `latency` verb: the time of a layer's parts at several sizes, for budgets."""

from __future__ import annotations

from dataclasses import replace

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from megatron_prune.claims import refuse_existing
from megatron_prune.config import LatencyConfig
from megatron_prune.decision.source import open_model
from megatron_prune.errors import UserError
from megatron_prune.log import say
from megatron_prune.search.latency import measure


def run(config: LatencyConfig) -> None:
    """Measure and write the table."""
    refuse_existing(config.output)
    if backend.world_size() > 1:
        raise UserError(f"{backend.world_size()} processes were started; latency takes one process and one device")
    model = open_model(config.input).config
    model.check_length(config.prompt_length)
    with backend.running(backend.Layout()):
        table = measure(model, config)
    table.save(config.output)
    whole = table.of(replace(model, dtype=config.dtype or model.dtype))
    say(f"{config.output}: the whole model takes {whole} us for {config.batch_size} x {config.prompt_length} tokens")
