"""The `export` verb: a checkpoint as a Hugging Face directory, or a run's masks as one .npz file."""

from __future__ import annotations

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)

from megatron_prune.apply.decision import Masks
from megatron_prune.apply.run_folder import decision_of
from megatron_prune.config import ExportConfig
from megatron_prune.export.huggingface import write_hf
from megatron_prune.export.mask_file import save_mask_npz
from megatron_prune.files import refuse_existing
from megatron_prune.model.checkpoint import load_model
from megatron_prune.model.import_hf import layout_of


def run(config: ExportConfig) -> None:
    """Write `config.output` in `config.format`."""
    refuse_existing(config.output)
    if config.format == "mask-npz":
        if backend.rank() == 0:
            save_mask_npz(config.output, Masks.load(decision_of(config.input)))
        return
    layout = layout_of(config.parallelism)
    with backend.running(layout):
        model = load_model(config.input, layout)
        weights = model.hf_weights()
        if backend.rank() == 0:
            write_hf(config.output, model.config, weights, config.input / "tokenizer")
        else:
            for _ in weights:  # every rank takes part in gathering each tensor
                pass
