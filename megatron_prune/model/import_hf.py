"""The `import` verb: a Hugging Face checkpoint becomes a Megatron checkpoint, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from torch import Tensor

from megatron_prune.apply.decision import pack_mask, prunable_shapes, unpack_mask
from megatron_prune.config import ImportConfig, Parallelism
from megatron_prune.data.tokenizer import has_tokenizer
from megatron_prune.export.mask_file import load_mask_npz
from megatron_prune.export.preflight import check_export
from megatron_prune.files import refuse_existing
from megatron_prune.log import say
from megatron_prune.model import convert
from megatron_prune.model.build import build_model
from megatron_prune.model.checkpoint import compute_dtype, save_model
from megatron_prune.model.convert import HFReader
from megatron_prune.model.description import check_tokenizer_files
from megatron_prune.model.families import ModelConfig, WeightMap
from megatron_prune.model.fms import FmsReader, is_fms
from megatron_prune.model.prunable import PrunableModel


def layout_of(parallelism: Parallelism) -> backend.Layout:
    """The layout that the parallel flags ask for."""
    return backend.Layout(
        tensor=parallelism.tensor_model_parallel_size,
        pipeline=parallelism.pipeline_model_parallel_size,
        context=parallelism.context_parallel_size,
        sequence_parallel=parallelism.sequence_parallel,
        virtual_pipeline=parallelism.virtual_pipeline_model_parallel_size,
    )


def read_hf(
    reader: HFReader, layout: backend.Layout, dtype: str | None = None, mask: Path | None = None, **extra: Any
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


def run(config: ImportConfig) -> None:
    """Import `config.input` and write `config.output`."""
    refuse_existing(config.output)
    directory = Path(config.input)
    reader = FmsReader(directory) if is_fms(directory) else HFReader(config.input)
    check_tokenizer_files(reader.directory)
    check_export(reader.model_config)
    compute_dtype(config.dtype or reader.model_config.dtype)
    if told := reader.left_behind():
        say(told)
    if not has_tokenizer(reader.directory):
        say(f"{reader.directory} has no tokenizer: none comes along, and what reads text will ask for one")
    layout = layout_of(config.parallelism)
    with backend.running(layout):
        model = read_hf(reader, layout, config.dtype, config.mask)
        source = {"import": str(config.input), "mask": str(config.mask) if config.mask else None}
        save_model(config.output, model, source, reader.directory)
