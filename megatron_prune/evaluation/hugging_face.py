"""A Hugging Face model of one process, ready to be evaluated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.errors import UserError
from megatron_prune.exporting.padding import in_transformers
from megatron_prune.model.build import DTYPES
from megatron_prune.model.convert import HFReader
from megatron_prune.model.packed import PackedReader, open_reader
from megatron_prune.option_groups import Parallelism


def open_alone(name: str | Path, layout: Parallelism) -> HFReader:
    """The directory of a model; UserError where several processes were started, or a layout of several was given."""
    if backend.world_size() > 1:
        raise UserError(
            f"{name} is a Hugging Face model and {backend.world_size()} processes were started: use one process, or "
            "import it and evaluate the Megatron checkpoint"
        )
    sizes = [size for flag, size in layout.several().items() if not flag.startswith("--virtual")]
    if sizes:
        raise UserError(
            f"{name} is a Hugging Face model and a layout of {math.prod(sizes)} processes was given: leave it out, or "
            "import it and evaluate the Megatron checkpoint"
        )
    return open_reader(name)


def load(reader: HFReader, dtype: str) -> Any:
    """The transformers model of a directory, on this process's device; `dtype` as configurations name it.

    One that is quantised rounds the inputs of its linears, too, as engines do.
    """
    model = in_transformers(reader, DTYPES.get(dtype, torch.float16)).to(backend.device()).eval()
    if isinstance(reader, PackedReader):
        reader.round_inputs(model)
    return model


def about(reader: HFReader, dtype: str) -> dict[str, Any]:
    """What a result says of the model."""
    form = {"quantised": reader.scheme.name} if isinstance(reader, PackedReader) else {}
    return {"kind": "hugging face", "dtype": dtype, **form}
