"""A model for MaxText on disk, as `export --format maxtext` writes it.

megatron_prune_maxtext.json   what it is: sizes and constants, and the Hugging Face config they came from
maxtext.yml                   MaxText's configuration: sizes, rotary embedding, where the weights are
weights/0/                    an Orbax checkpoint with scanned layers, in float32 or bfloat16
masks.npz                     which weights stay zero; absent where none do
pruning.json                  how it was pruned (megatron_prune.model.pruning); absent where it was not
tokenizer/                    tokenizer, chat template and generation config

Read and written here; Orbax and JAX are needed for the weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import with_config
from typing_extensions import TypedDict

from megatron_prune.data.tokenizer_files import copy_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.files import new_folder, write_json, write_text
from megatron_prune.foreign import fenced, read_format, strict
from megatron_prune.maxtext import layout
from megatron_prune.maxtext.checkpoints import damaged, fault
from megatron_prune.maxtext.masks import PackedMasks
from megatron_prune.model.description import checked_config
from megatron_prune.model.families import ModelConfig
from megatron_prune.model.pruning import write_pruning

FORMAT = 1
DESCRIPTION = "megatron_prune_maxtext.json"
SETTINGS = "maxtext.yml"
MASKS = "masks.npz"
TOKENIZER = "tokenizer"
WEIGHTS = Path("weights", "0")
_CHUNK_BYTES = 2**28
"""Largest piece of an array in the checkpoint: what a host reads is a multiple of it."""


@with_config(strict())
class _File(TypedDict):
    """What is in the description."""

    format: Literal[1]
    model: ModelConfig


@dataclass(frozen=True)
class Folder:
    """A model for MaxText that has been looked at; its weights are read when asked for."""

    path: Path
    config: ModelConfig

    @classmethod
    def open(cls, path: Path) -> Folder:
        """UserError when `path` is none."""
        what = "a model for MaxText (export --format maxtext makes one)"
        about = read_format(path / DESCRIPTION, what, FORMAT, _File, plain=True)
        return cls(path, checked_config(about["model"], path / DESCRIPTION))

    def masks(self) -> PackedMasks | None:
        """Its masks; None where every weight may change."""
        file = self.path / MASKS
        return PackedMasks(file, self.config) if file.is_file() else None

    @property
    def tokenizer(self) -> Path:
        """Folder of its tokenizer."""
        return self.path / TOKENIZER

    def step(self, checkpoint: Path | None) -> Path:
        """Where its weights are, or those of the run `checkpoint` that has trained it."""
        return self.path / WEIGHTS if checkpoint is None else newest_step(checkpoint)

    def arguments(self) -> list[str]:
        """What MaxText's own programs are given first; right also where the folder has been moved."""
        here = self.path.resolve()
        return [str(here / SETTINGS), f"load_parameters_path={here / WEIGHTS}", f"tokenizer_path={here / TOKENIZER}"]


def is_folder(path: Path) -> bool:
    """Whether a path is a model for MaxText."""
    return (path / DESCRIPTION).is_file()


def write_folder(
    path: Path,
    tree: layout.Tree,
    config: ModelConfig,
    masks: PackedMasks | None,
    tokenizer: Path,
    history: Mapping[str, Any],
) -> None:
    """Write a model for MaxText; `path` must not exist and appears whole or not at all.

    `history`: of the checkpoint, from which what it says of pruning is written down; a pattern of zeros where masks
    hold it in training.
    """
    layout.check(config)
    layout.check_tree(tree, config)
    with new_folder(path) as folder:
        write_json(folder / DESCRIPTION, {"format": FORMAT, "model": config.to_dict()})
        write_settings(folder, path, config)
        (folder / TOKENIZER).mkdir()
        copy_tokenizer(tokenizer, folder / TOKENIZER)
        if masks is not None:
            masks.save(folder / MASKS)
        write_pruning(folder, history if masks is not None or history.get("parameters") else {})
        save_weights(folder / WEIGHTS, tree)


def write_settings(folder: Path, path: Path, config: ModelConfig) -> None:
    """Write MaxText's configuration into `folder`, of a model that will be at `path`."""
    write_text(folder / SETTINGS, _yaml(path.resolve(), config))


def _yaml(path: Path, config: ModelConfig) -> str:
    values = {
        "base_config": "base.yml",
        **layout.settings(config),
        "load_parameters_path": str(path / WEIGHTS),
        "tokenizer_type": "huggingface",
        "tokenizer_path": str(path / TOKENIZER),
    }
    head = (
        "# MaxText's configuration of this model: python -m maxtext.trainers.pre_train.train FOLDER/maxtext.yml ...\n"
        "# rope_type and the rows of query and key in the checkpoint belong together: do not change one of them.\n"
        "# That program lets zeros go; python -m megatron_prune.maxtext train --input FOLDER ... keeps them.\n"
    )
    return head + yaml.safe_dump(values, sort_keys=False)


def save_weights(step: Path, tree: Mapping[str, np.ndarray]) -> None:
    """Write parameters as one step of an Orbax checkpoint that MaxText's trainer and its library read."""
    import jax
    import orbax.checkpoint as ocp

    nested = {"params": {"params": nest(tree)}}
    arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), nested)
    handler = ocp.CompositeCheckpointHandler(items=ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))
    with ocp.Checkpointer(handler) as saver:
        items = ocp.args.PyTreeSave(nested, save_args=arguments)
        saver.save(step.resolve(), args=ocp.args.Composite(items=items), custom_metadata={"scan_layers": True})


def read_weights(step: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters of a step, without the optimizer's state; UserError unless they are those of the model."""
    import jax
    import orbax.checkpoint as ocp

    items = step.resolve() / "items"
    if not items.is_dir():
        raise UserError(f"{step} is no step of a MaxText checkpoint; give RUN/checkpoints/NUMBER")
    wrong = fault(step)
    if wrong is not None:
        raise damaged(step, wrong)
    told = f"{step} cannot be read", "it is damaged: restore it, or give an older step, RUN/checkpoints/NUMBER"
    with fenced(*told), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored: dict[str, Any] = reader.metadata(items).item_metadata.tree
        wanted = {"params": {"params": (stored.get("params") or {}).get("params") or {}}}
        layout.check_tree(flatten(wanted["params"]["params"]), config)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        return flatten(reader.restore(items, args=arguments)["params"]["params"])


def nest(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Paths with slashes -> nested dictionaries."""
    nested: dict[str, Any] = {}
    for path, value in tree.items():
        *parents, last = path.split("/")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return nested


def flatten(nested: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Inverse of `nest`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{start}{key}/") if isinstance(value, Mapping) else {start + key: value}
    return flat


def newest_step(path: Path) -> Path:
    """A step of a checkpoint: `path` itself, or the newest of a run folder; UserError when there is none."""
    if path.name.isdigit() and (path / "items").is_dir():
        return path
    for folder in (path / "checkpoints", path):
        steps = [step for step in folder.glob("[0-9]*") if step.name.isdigit() and (step / "items").is_dir()]
        if steps:
            return max(steps, key=lambda step: int(step.name))
    raise UserError(f"{path} holds no MaxText checkpoint; give a run folder or RUN/checkpoints/NUMBER")
