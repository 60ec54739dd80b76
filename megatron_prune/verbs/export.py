"""The `export` verb: a checkpoint for Hugging Face, fms or MaxText, or a run's masks as one .npz file."""

from __future__ import annotations

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)

from megatron_prune.claims import refuse_existing
from megatron_prune.config import ExportConfig
from megatron_prune.decision.mask_file import save_mask_npz
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.run_folder import decision_of
from megatron_prune.exporting.forms import costs, form_of
from megatron_prune.exporting.huggingface import write_directory, write_hf
from megatron_prune.exporting.padding import padded
from megatron_prune.log import say
from megatron_prune.model import fms
from megatron_prune.model.checkpoint import load_model
from megatron_prune.model.description import read_description
from megatron_prune.model.families import check_exportable, get_family
from megatron_prune.model.layout import layout_of
from megatron_prune.ranks import by_leader


def run(config: ExportConfig) -> None:
    """Write `config.output` in `config.format`."""
    refuse_existing(config.output)
    if config.format == "mask-npz":
        with backend.running(backend.Layout()):  # joined: no process looks for the output once another has made it
            by_leader(lambda: save_mask_npz(config.output, Masks.load(decision_of(config.input))))
        return
    if config.format == "maxtext":
        from megatron_prune.exporting.maxtext import export_maxtext

        export_maxtext(config)
        return
    stored = read_description(config.input).config
    form = form_of(stored, config.layers)
    written = get_family(stored.family).uniform(stored) if form == "padded" else stored
    check_exportable(written)
    if config.format == "fms":
        fms.check_model(written)
    layout = layout_of(config.parallelism)
    with backend.running(layout):
        model = load_model(config.input, layout)
        weights = model.hf_weights()
        if form == "padded":
            weights = padded(stored, weights)
        tokenizer = config.input / "tokenizer"
        if backend.rank() == 0 and config.format == "fms":
            about = fms.fms_config(written) | {fms.HF_CONFIG: get_family(written.family).to_hf(written)}
            tensors = fms.to_fms(written, weights)
            write_directory(config.output, fms.tensor_shapes(written), tensors, {fms.CONFIG: about}, tokenizer)
        elif backend.rank() == 0:
            write_hf(config.output, written, weights, tokenizer, with_code=form == "custom")
        else:
            for _ in weights:  # every rank takes part in gathering each tensor
                pass
        for line in costs(stored, form) if form else []:
            say(line)
