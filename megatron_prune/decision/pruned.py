"""A run's decision applied to its weights: zeros where a mask is closed, or a smaller model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.decision.masks import Masks
from megatron_prune.decision.run_folder import RunDescription, decision_of, is_run, read_run, weights_of
from megatron_prune.decision.source import ModelSource, open_model
from megatron_prune.decision.trimming import Trim, is_trim
from megatron_prune.decision.units import Units
from megatron_prune.model import convert
from megatron_prune.model.build import build_model
from megatron_prune.model.checkpoint import save_model
from megatron_prune.model.cost import parameters
from megatron_prune.model.families import ModelConfig
from megatron_prune.model.layout import layout_of
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.model.summary import Zeros, summary
from megatron_prune.option_groups import Parallelism


@torch.no_grad()
def apply_masks(model: PrunableModel, masks: Masks) -> None:
    """Set every removed weight of this rank to +0.0."""
    for linear in model.linears():
        whole = convert.merge(linear.map, [masks.get(name) for name in linear.map.hf], model.config)
        weight = linear.module.weight
        weight.masked_fill_(~model.shard(linear.map, whole).to(weight.device), 0.0)


@torch.no_grad()
def cut(model: PrunableModel, units: Units, **extra: Any) -> PrunableModel:
    """The smaller model in the same layout and types. Collective; UserError when the layout does not fit it.

    `extra`: megatron-core settings, as `build_model` takes them.
    """
    config = units.config(model.config)
    dtype = next(iter(model.parameters.values())).dtype
    smaller = PrunableModel(config, model.layout, build_model(config, model.layout, dtype, **extra))
    for map in smaller.maps:
        source = model.by_name[units.source(map)]
        smaller.assign(map, units.cut(model.config, source, model.whole(source), map))
    return smaller


def open_trained(run: Path) -> ModelSource:
    """The weights of a finished `train` run; a Hugging Face directory has no record of its pattern, the run does."""
    weights = open_model(weights_of(run))
    return replace(weights, history={"target": read_run(run).target, **weights.history})


def load_pruned(run: Path, layout: backend.Layout, dtype: str | None = None) -> tuple[PrunableModel, ModelSource]:
    """The model of a run with its decision applied, or trained, and where its weights come from. Collective."""
    read_run(run)
    source = open_source(run)
    return source.load(layout, dtype), source


def open_source(path: Path) -> ModelSource:
    """The model of a checkpoint, a Hugging Face directory or a run, with its decision applied; UserError otherwise."""
    if not is_run(path):
        return open_model(path)
    about = read_run(path)
    if about.method == "train":
        return open_trained(path)
    decision = decision_of(path)
    weights = open_model(weights_of(path))
    if is_trim(decision):
        return _smaller(weights, Trim.load(decision), about)
    masks = Masks.load(decision)
    masks.check_model(weights.config)
    masks.check_origin(weights.config)

    def load(layout: backend.Layout, dtype: str | None = None, **extra: Any) -> PrunableModel:
        model = weights.load(layout, dtype, **extra)
        apply_masks(model, masks)
        return model

    history = {**weights.history, "method": about.method, "target": about.target}
    return replace(weights, load=load, masks=masks.get, history=history)


def _smaller(weights: ModelSource, trim: Trim, about: RunDescription) -> ModelSource:
    """The smaller model that a run has decided on."""
    trim.check_model(weights.config)

    def load(layout: backend.Layout, dtype: str | None = None, **extra: Any) -> PrunableModel:
        return cut(weights.load(layout, dtype), trim.units, **extra)

    smaller = trim.units.config(weights.config)
    history = {**weights.history, "method": about.method, "target": about.target, "parameters": parameters(smaller)}
    return replace(weights, config=smaller, load=load, reader=None, history=history)


def trim(run: Path, output: Path, parallelism: Parallelism) -> str:
    """Write the checkpoint `output`: a run's weights with its decision applied, no training state; a line on it.

    By all processes.
    """
    layout = layout_of(parallelism)
    with backend.running(layout):
        model, source = load_pruned(run, layout)
        zeros = save_model(output, model, source.history, source.tokenizer)
        return made(output, model.config, zeros)


def made(checkpoint: Path, config: ModelConfig, zeros: Zeros) -> str:
    """A line on a checkpoint that was just written: what it is, and what it is for."""
    return f"{checkpoint}: {summary(config, checkpoint)}; {zeros.told()}; for prune, train, export and evaluate"
