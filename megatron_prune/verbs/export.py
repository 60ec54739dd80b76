"""The `export` verb: a checkpoint for Hugging Face, fms or MaxText, or a run's masks as one .npz file."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.config import ExportConfig
from megatron_prune.verbs import Verb, deliver

VERB = Verb("export", ExportConfig, "Megatron checkpoint -> Hugging Face directory, MaxText or masks", 70)


def run(config: ExportConfig) -> Path:
    """Write `config.output` in `config.format`, and say what its form costs."""
    from megatron_prune.exporting.export import export

    deliver(export(config))
    return config.output
