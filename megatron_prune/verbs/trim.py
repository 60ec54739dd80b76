"""The `trim` verb: a run's decision applied to its weights; a checkpoint without training state comes out."""

from __future__ import annotations

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from megatron_prune.claims import refuse_existing
from megatron_prune.config import TrimConfig
from megatron_prune.decision.pruned import load_pruned
from megatron_prune.decision.run_folder import read_run
from megatron_prune.model.checkpoint import save_model
from megatron_prune.model.layout import layout_of


def run(config: TrimConfig) -> None:
    """Write the checkpoint `config.output` from the run `config.input`."""
    refuse_existing(config.output)
    about = read_run(config.input)
    layout = layout_of(config.parallelism)
    with backend.running(layout):
        model, weights = load_pruned(config.input, layout)
        history = weights.history
        if about.method != "train":
            history = {**history, "method": about.method, "target": about.target}
        save_model(config.output, model, history, weights.tokenizer)
