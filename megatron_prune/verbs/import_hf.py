"""The `import` verb: a Hugging Face checkpoint becomes a Megatron checkpoint, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from megatron_prune.claims import refuse_existing
from megatron_prune.config import ImportConfig
from megatron_prune.data.tokenizer import has_tokenizer
from megatron_prune.data.tokenizer_files import check_tokenizer_files
from megatron_prune.decision.source import read_hf
from megatron_prune.exporting.preflight import check_export
from megatron_prune.log import say
from megatron_prune.model.checkpoint import compute_dtype, save_model
from megatron_prune.model.convert import HFReader
from megatron_prune.model.fms import FmsReader, is_fms
from megatron_prune.model.layout import layout_of


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
