"""A Hugging Face checkpoint becomes a Megatron checkpoint, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from megatron_prune.data.tokenizer import has_tokenizer
from megatron_prune.data.tokenizer_files import check_tokenizer_files
from megatron_prune.decision.mask_file import mask_npz_pattern
from megatron_prune.decision.pruned import made
from megatron_prune.decision.run_folder import is_run
from megatron_prune.decision.source import read_hf
from megatron_prune.errors import UserError
from megatron_prune.exporting.preflight import check_export
from megatron_prune.model.checkpoint import compute_dtype, save_model
from megatron_prune.model.convert import HFReader
from megatron_prune.model.fms import FmsReader, is_fms
from megatron_prune.model.layout import layout_of
from megatron_prune.model.pruning import read_pruning
from megatron_prune.option_groups import Parallelism


def open_hf(source: str, dtype: str | None = None) -> tuple[HFReader, list[str]]:
    """A directory or hub id, found to be a model that can come and go again, and what will not come along, in words.

    UserError otherwise, before any weight is read.
    """
    directory = Path(source)
    if is_run(directory):
        raise UserError(
            f"{source} is a run folder and import reads Hugging Face directories: trim {source} CHECKPOINT makes a "
            "checkpoint of it; export, evaluate, verify and bench take the run as it is"
        )
    reader = FmsReader(directory) if is_fms(directory) else HFReader(source)
    check_tokenizer_files(reader.directory)
    check_export(reader.model_config)
    compute_dtype(dtype or reader.model_config.dtype)
    lacking = [told] if (told := reader.left_behind()) else []
    if reader.in_mxfp4:
        lacking.append(f"{reader.directory} has its experts in MXFP4: they are read as bfloat16, and exported so")
    if reader.in_fp8:
        lacking.append(f"{reader.directory} has its weights in FP8: they are read as bfloat16, and exported so")
    if not has_tokenizer(reader.directory):
        lacking.append(f"{reader.directory} has no tokenizer: none comes along, and what reads text will ask for one")
    return reader, lacking


def import_hf(
    reader: HFReader, output: Path, parallelism: Parallelism, dtype: str | None, mask: Path | None, source: str
) -> str:
    """Write the checkpoint `output`; `mask`, an .npz by Hugging Face names, is applied. A line on what was made.

    By all processes.
    """
    layout = layout_of(parallelism)
    with backend.running(layout):
        model = read_hf(reader, layout, dtype, mask)
        history = {"import": source, "mask": str(mask) if mask else None, **read_pruning(reader.directory)}
        if mask is not None and (pattern := mask_npz_pattern(mask)):
            history["target"] = pattern
        return made(output, model.config, save_model(output, model, history, reader.directory))
