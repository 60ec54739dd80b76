"""The `permute` verb: a dense model's channels in an order that suits a pattern; what it computes stays."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.config import PermuteConfig
from megatron_prune.verbs import Verb

VERB = Verb("permute", PermuteConfig, "order a dense model's channels so that N:M patterns keep more", 25)


def run(config: PermuteConfig) -> Path:
    """Write the checkpoint `config.output` from the model `config.input`."""
    from megatron_prune.jobs.permute import permute
    from megatron_prune.verbs import deliver

    deliver(permute(config))
    return config.output
