"""A checkpoint becomes a directory for Hugging Face, fms or MaxText, or a run's masks one .npz file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from torch import Tensor

from megatron_prune.config import ExportConfig
from megatron_prune.decision.mask_file import save_mask_npz
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.run_folder import decision_of
from megatron_prune.errors import UserError
from megatron_prune.exporting.forms import Form, costs, form_of
from megatron_prune.exporting.huggingface import write_directory, write_hf
from megatron_prune.exporting.maxtext import export_maxtext
from megatron_prune.exporting.padding import padded
from megatron_prune.model import fms
from megatron_prune.model.checkpoint import load_model
from megatron_prune.model.description import read_description
from megatron_prune.model.families import ModelConfig, check_exportable, get_family
from megatron_prune.model.layout import layout_of
from megatron_prune.ranks import by_leader

Weights = Iterator[tuple[str, Tensor]]


def export(config: ExportConfig) -> list[str]:
    """Write `config.output` in `config.format`; in words, what its form costs. By all processes."""
    if config.format == "mask-npz":
        with backend.running(backend.Layout()):  # joined: no process looks for the output once another has made it
            by_leader(lambda: save_mask_npz(config.output, Masks.load(decision_of(config.input))))
        return []
    if config.format == "maxtext":
        export_maxtext(config)
        return []
    return _directory(config)


def _directory(config: ExportConfig) -> list[str]:
    about = read_description(config.input)
    if about.source.get("weights") and not about.source.get("method"):
        raise UserError(
            f"{config.input} has the weights of a {about.source['weights']} run before its decision is applied; give "
            "the checkpoint that trim writes from the run"
        )
    stored = about.config
    form = form_of(stored, config.layers)
    written = get_family(stored.family).uniform(stored) if form == "padded" else stored
    check_exportable(written)
    write, layout = _writer(config, written, form), layout_of(config.parallelism)
    told = costs(stored, form) if form else []
    with backend.running(layout):
        weights = load_model(config.input, layout).hf_weights()
        if form == "padded":
            weights = padded(stored, weights)
        if backend.rank() == 0:
            return [*told, *write(weights)]
        for _ in weights:  # every rank takes part in gathering each tensor
            pass
    return told


def _writer(config: ExportConfig, model: ModelConfig, form: Form | None) -> Callable[[Weights], list[str]]:
    """What makes a directory of the weights, and lines about it; what can be refused before they are loaded is."""
    tokenizer = config.input / "tokenizer"
    if config.quantize is not None:
        from megatron_prune.exporting.quantise import prepare, write_quantised

        plan = prepare(config, model)
        return lambda weights: write_quantised(config.output, model, weights, plan)
    if config.format == "fms":
        fms.check_model(model)
    return lambda weights: _write(config, model, weights, tokenizer, form == "custom")


def _write(config: ExportConfig, model: ModelConfig, weights: Weights, tokenizer: Path, with_code: bool) -> list[str]:
    if config.format == "fms":
        _write_fms(config.output, model, weights, tokenizer)
    else:
        write_hf(config.output, model, weights, tokenizer, with_code=with_code)
    return []


def _write_fms(output: Path, model: ModelConfig, weights: Weights, tokenizer: Path) -> None:
    about = fms.fms_config(model) | {fms.HF_CONFIG: get_family(model.family).to_hf(model)}
    write_directory(output, fms.tensor_shapes(model), fms.to_fms(model, weights), {fms.CONFIG: about}, tokenizer)
