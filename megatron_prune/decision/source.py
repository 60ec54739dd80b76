"""A model to start from, in either of its two forms: a Megatron checkpoint or a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from torch import Tensor

from megatron_prune.data.tokenizer_files import check_tokenizer_files
from megatron_prune.decision.mask_file import load_mask_npz
from megatron_prune.decision.masks import pack_mask, prunable_shapes, unpack_mask
from megatron_prune.log import say
from megatron_prune.model import convert, given, published
from megatron_prune.model.build import build_model
from megatron_prune.model.checkpoint import compute_dtype, load_model
from megatron_prune.model.convert import HFReader
from megatron_prune.model.description import is_checkpoint, read_description
from megatron_prune.model.families import ModelConfig, WeightMap
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.model.pruning import read_pruning


class WeightReader(Protocol):
    """What a model is loaded from: a `HFReader`, or anything that has the weights by the same names."""

    @property
    def model_config(self) -> ModelConfig:
        """Sizes and type of the model."""

    def read(self, name: str) -> Tensor:
        """The weight of this Hugging Face name."""


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

    history = {"import": str(path), **read_pruning(path)}
    return ModelSource(reader.model_config, history, path, read, reader)


def read_hf(
    reader: WeightReader, layout: backend.Layout, dtype: str | None = None, mask: Path | None = None, **extra: Any
) -> PrunableModel:
    """The model of a Hugging Face checkpoint in `layout`, weights in `dtype` (None: as stored), masked on request.

    `extra`: megatron-core settings, as `build_model` takes them.
    """
    config = replace(reader.model_config, dtype=dtype) if dtype else reader.model_config
    masks = packed_masks(mask, config) if mask else None
    model = PrunableModel(config, layout, build_model(config, layout, compute_dtype(config.dtype), **extra))

    def tensors() -> Iterator[tuple[WeightMap, Tensor]]:
        for map in model.maps:
            if model.needed(map):
                parts = [reader.read(name) for name in map.hf]
                if masks and map.prunable:
                    keep = [masks(name) for name in map.hf]
                    parts = [part.masked_fill(~k, 0.0) for part, k in zip(parts, keep, strict=True)]
                yield map, convert.merge(map, parts, config)

    model.load(tensors())
    return model


def packed_masks(path: Path, config: ModelConfig) -> Callable[[str], Tensor]:
    """Bool mask `[out, in]` by Hugging Face weight name, from a mask .npz; held in memory as bits."""
    shapes = prunable_shapes(config)
    packed = {name: pack_mask(mask) for name, mask in load_mask_npz(path, config)}
    return lambda name: unpack_mask(packed[name], shapes[name])
