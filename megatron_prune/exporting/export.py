"""A checkpoint becomes a directory for Hugging Face, fms or MaxText, or a run's masks one .npz file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from torch import Tensor

from megatron_prune.config import ExportConfig
from megatron_prune.decision.mask_file import save_mask_npz
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.pruned import open_source
from megatron_prune.decision.run_folder import decision_of, is_run
from megatron_prune.decision.source import ModelSource
from megatron_prune.errors import UserError
from megatron_prune.exporting.forms import Form, costs, form_of
from megatron_prune.exporting.huggingface import write_directory, write_hf
from megatron_prune.exporting.maxtext import export_maxtext
from megatron_prune.exporting.padding import kept_history, padded
from megatron_prune.model import fms, given
from megatron_prune.model.description import is_checkpoint
from megatron_prune.model.families import ModelConfig, check_exportable, get_family
from megatron_prune.model.layout import layout_of
from megatron_prune.model.summary import summary, told_bytes
from megatron_prune.ranks import by_leader

Weights = Iterator[tuple[str, Tensor]]


def export(config: ExportConfig) -> list[str]:
    """Write `config.output` in `config.format`; in words, what its form costs and what was made. By all processes."""
    if config.format == "mask-npz":
        with backend.running(backend.Layout()):  # joined: no process looks for the output once another has made it
            by_leader(lambda: save_mask_npz(config.output, Masks.load(decision_of(config.input))))
        size = told_bytes(config.output.stat().st_size)
        return [f"{config.output}: mask file, {size}; for import --mask and prune --prior, and numpy.load opens it"]
    if config.format == "maxtext":
        export_maxtext(config)
        return [f"{config.output}: model for MaxText; python -m megatron_prune.maxtext opens it"]
    return _directory(config)


def _directory(config: ExportConfig) -> list[str]:
    source = open_exported(config.input)
    stored = source.config
    form = form_of(stored, config.layers)
    written = get_family(stored.family).uniform(stored) if form == "padded" else stored
    check_exportable(written)
    history = kept_history(source.history) if written != stored else source.history
    write, layout = _writer(config, written, form, source.tokenizer, history), layout_of(config.parallelism)
    told = costs(stored, form) if form else []
    with backend.running(layout):
        model = source.load(layout)
        zeros, weights = model.zeros(), model.hf_weights()
        if form == "padded":
            weights = padded(stored, weights)
        if backend.rank() == 0:
            cost = write(weights)
            about = f"{summary(written, config.output)}; of the model {zeros.told()}"
            return [*told, f"{config.output}: {about}; {_opened(config, form)}", *cost]
        for _ in weights:  # every rank takes part in gathering each tensor
            pass
    return told


def _opened(config: ExportConfig, form: Form | None) -> str:
    """Who opens an export, in words."""
    if config.format == "fms":
        return "ibm-fms opens it, and import"
    if config.quantize is not None:
        return "TensorRT-LLM opens it" + ("" if config.quantize == "int4_awq" else ", and vLLM")
    if form == "blocks":
        return "import opens it"
    trust = ", trust_remote_code=True" if form == "custom" else ""
    return f"AutoModelForCausalLM.from_pretrained({str(config.output)!r}{trust}) opens it"


def open_exported(path: Path) -> ModelSource:
    """A checkpoint, or a run with its decision applied; UserError for what is neither, or holds half of a result."""
    if not is_checkpoint(path) and not is_run(path):
        raise given.wrong(path, "checkpoint")
    source = open_source(path)
    if is_checkpoint(path) and source.history.get("weights") and not source.history.get("method"):
        raise UserError(
            f"{path} has the weights of a {source.history['weights']} run before its decision is applied; give the run "
            "itself, or the checkpoint that trim writes from it"
        )
    return source


def _writer(
    config: ExportConfig, model: ModelConfig, form: Form | None, tokenizer: Path, history: Mapping[str, Any]
) -> Callable[[Weights], list[str]]:
    """What makes a directory of the weights, and lines about it; what can be refused before they are loaded is."""
    if config.quantize is not None:
        from megatron_prune.exporting.quantise import prepare, write_quantised

        plan = prepare(config, model, tokenizer)
        return lambda weights: write_quantised(config.output, model, weights, plan, history)
    if config.format == "fms":
        fms.check_model(model)
    return lambda weights: _write(config, model, weights, tokenizer, form == "custom", history)


def _write(
    config: ExportConfig,
    model: ModelConfig,
    weights: Weights,
    tokenizer: Path,
    with_code: bool,
    history: Mapping[str, Any],
) -> list[str]:
    if config.format == "fms":
        about = fms.fms_config(model) | {fms.HF_CONFIG: get_family(model.family).to_hf(model)}
        shapes, own = fms.tensor_shapes(model), fms.to_fms(model, weights)
        write_directory(config.output, shapes, own, {fms.CONFIG: about}, tokenizer, history=history)
    else:
        write_hf(config.output, model, weights, tokenizer, with_code=with_code, history=history)
    return []
