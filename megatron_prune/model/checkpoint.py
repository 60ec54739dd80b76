"""Megatron checkpoints: any layout saved, any layout loaded, atomic, checked for completeness on load.

A model checkpoint is a folder

    megatron_prune.json   what it is: model shape (and the Hugging Face config it came from), dtype, where from
    tokenizer/            the tokenizer's files
    weights/              megatron-core's distributed checkpoint (torch_dist)
    manifest.json         size of every file above: a truncated copy is found before it is read
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_prune.errors import UserError
from megatron_prune.files import new_folder, read_json, write_json
from megatron_prune.model.build import DTYPES, build_model
from megatron_prune.model.families import ModelConfig
from megatron_prune.model.prunable import PrunableModel

FORMAT = 1
DESCRIPTION = "megatron_prune.json"


@dataclass(frozen=True)
class Description:
    """What a checkpoint folder says about itself."""

    config: ModelConfig
    source: dict[str, Any] = field(default_factory=dict)
    """Where the weights came from and what was done to them, newest last."""

    def to_dict(self) -> dict[str, Any]:
        """As written to disk."""
        return {"format": FORMAT, "model": self.config.to_dict(), "source": self.source}


def metadata() -> dict[str, Any]:
    """What megatron-core's sharded_state_dict must be told about the process groups."""
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def save_sharded(folder: Path, state: dict[str, Any]) -> None:
    """Write a sharded state dict into an existing empty folder, by all ranks."""
    dist_checkpointing.save(state, str(folder), sharded_strategy=("torch_dist", 1))


def load_sharded(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Read a sharded state dict in the present layout; UserError when the folder is damaged or does not fit."""
    try:
        return dist_checkpointing.load(state, str(folder))
    except (CheckpointingException, KeyError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}); it is damaged or belongs to "
            "another model: use another checkpoint"
        ) from error


def write_manifest(folder: Path) -> None:
    """Record the size of every file below `folder`."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(folder / "manifest.json", sizes)


def check_manifest(folder: Path) -> None:
    """UserError when a file of a checkpoint is missing or has another size than when it was written."""
    for name, size in read_json(folder / "manifest.json", "a megatron_prune checkpoint").items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"checkpoint {folder} is damaged: {name} {state}; copy it again or use another checkpoint")


def save_model(path: Path, model: PrunableModel, source: dict[str, Any], tokenizer: Iterable[Path]) -> None:
    """Write a model checkpoint from any layout. Collective; `path` must not exist."""
    with new_folder(path) as folder:
        if backend.rank() == 0:
            write_json(folder / DESCRIPTION, Description(model.config, source).to_dict())
            (folder / "tokenizer").mkdir()
            for file in tokenizer:
                shutil.copyfile(file, folder / "tokenizer" / file.name)
            (folder / "weights").mkdir()
        dist.barrier()
        save_sharded(folder / "weights", _weights_only(model))
        if backend.rank() == 0:
            write_manifest(folder)


def _weights_only(model: PrunableModel) -> dict[str, Any]:
    state = model.model.sharded_state_dict(metadata=metadata())
    return {key: value for key, value in state.items() if "mask_logits" not in key}


def read_description(path: Path) -> Description:
    """What a checkpoint folder holds; UserError when it is none."""
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist; give a folder written by import, trim or train")
    about = read_json(path / DESCRIPTION, "a megatron_prune checkpoint (import makes one from a Hugging Face model)")
    if about.get("format") != FORMAT:
        raise UserError(f"{path} has checkpoint format {about.get('format')}; this version reads format {FORMAT}")
    return Description(ModelConfig.from_dict(about["model"]), about["source"])


def compute_dtype(name: str) -> torch.dtype:
    """The torch type of a dtype name; UserError for one that models cannot have here."""
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} was given; allowed are {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(path: Path, layout: backend.Layout, dtype: str | None = None, **extra: Any) -> PrunableModel:
    """The model of a checkpoint in `layout`; `dtype` overrides the stored type. Collective."""
    description = read_description(path)
    check_manifest(path)
    config = description.config
    model = build_model(config, layout, compute_dtype(dtype or config.dtype), **extra)
    prunable = PrunableModel(config, layout, model)
    state = load_sharded(path / "weights", _weights_only(prunable))
    missing = model.load_state_dict(state, strict=False)
    absent = [key for key in missing.missing_keys if "_extra_state" not in key and "mask_logits" not in key]
    if absent or missing.unexpected_keys:
        raise UserError(f"checkpoint {path} does not fit its own description: {absent + missing.unexpected_keys}")
    return prunable
