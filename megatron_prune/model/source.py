"""A model to start from, in either of its two forms: a Megatron checkpoint or a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from torch import Tensor

from megatron_prune.log import say
from megatron_prune.model import given, published
from megatron_prune.model.checkpoint import load_model
from megatron_prune.model.convert import HFReader
from megatron_prune.model.description import check_tokenizer_files, is_checkpoint, read_description
from megatron_prune.model.families import ModelConfig
from megatron_prune.model.import_hf import read_hf
from megatron_prune.model.prunable import PrunableModel


@dataclass(frozen=True)
class ModelSource:
    """What verbs need of a model on disk, whichever form it has."""

    config: ModelConfig
    history: dict[str, Any]
    """Where the weights came from and what was done to them, newest last."""
    tokenizer: Path
    """Folder to load the tokenizer from."""
    load: Callable[..., PrunableModel]
    """`load(layout, dtype=None, **extra)`: the model in a layout. Collective."""
    reader: HFReader | None = None
    """Of a Hugging Face directory."""
    masks: Callable[[str], Tensor] | None = None
    """Of a pruning run: bool by Hugging Face name of a prunable weight, True = kept; `load` applies them itself."""


def tell_left(source: ModelSource) -> None:
    """Say what of a Hugging Face directory will not come along to what is made of it."""
    if source.reader is not None and (told := source.reader.left_behind()):
        say(told)


def open_model(path: Path) -> ModelSource:
    """Find out what `path` holds, without reading weights; UserError when it is no model."""
    if is_checkpoint(path):
        about = read_description(path)
        folder = path / "tokenizer"

        def load(layout: backend.Layout, dtype: str | None = None, **extra: Any) -> PrunableModel:
            return load_model(path, layout, dtype, **extra)

        return ModelSource(about.config, about.source, folder, load)
    if not (path / "config.json").exists() and not (path / published.ADAPTER).exists():
        raise given.wrong(path, "model")
    reader = HFReader(path)
    check_tokenizer_files(path)

    def read(layout: backend.Layout, dtype: str | None = None, **extra: Any) -> PrunableModel:
        return read_hf(reader, layout, dtype, **extra)

    return ModelSource(reader.model_config, {"import": str(path)}, path, read, reader)
