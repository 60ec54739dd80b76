"""A structured decision on disk: which units of a model stay.

    DIR/trim.json           what decided (method, target, seed, calibration), sizes before and after, checksum
    DIR/units.safetensors   int32: layers, hidden, and for each layer that stays its heads, groups and ffn
                            ("layers.00017.heads", numbered as in the whole model)

The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_prune.apply.decision import MaskInfo
from megatron_prune.errors import UserError
from megatron_prune.files import read_json, refuse_existing, write_json
from megatron_prune.model.cost import parameters
from megatron_prune.model.families import ModelConfig
from megatron_prune.model.units import BlockUnits, Units

FILE = "trim.json"
UNITS = "units.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class Trim:
    """A structured decision."""

    info: MaskInfo
    units: Units

    def save(self, folder: Path, whole: ModelConfig) -> None:
        """Write into `folder`, which must not exist. One process writes; the caller names the folder when complete."""
        refuse_existing(folder, "decision")
        folder.mkdir(parents=True)
        save_file(_tensors(self.units), folder / UNITS)
        content = {
            "format": _FORMAT,
            **asdict(self.info),
            "before": sizes(whole),
            "after": sizes(self.units.config(whole)),
            "parameters": parameters(self.units.config(whole)),
            "sha256": hashlib.sha256((folder / UNITS).read_bytes()).hexdigest(),
        }
        write_json(folder / FILE, content)

    @classmethod
    def load(cls, folder: Path) -> Trim:
        """The decision in `folder`; UserError when it is none or damaged."""
        about = read_json(folder / FILE, "a structured decision")
        if about.get("format") != _FORMAT:
            raise UserError(f"{folder} has decision format {about.get('format')}; this version reads format {_FORMAT}")
        file = folder / UNITS
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != about["sha256"]:
            raise UserError(f"{file} is missing or not what was written: the decision is damaged, prune again")
        info = {key: about[key] for key in MaskInfo.__dataclass_fields__}
        return cls(MaskInfo(**info), _units(file))

    def check_model(self, config: ModelConfig) -> None:
        """UserError when the decision is about another model."""
        if self.info.model_hash != config.fingerprint():
            raise UserError(
                f"the decision was made for another {self.info.family} model than this one: use the checkpoint that "
                "was pruned"
            )


def is_trim(folder: Path) -> bool:
    """Whether a decision folder holds a structured decision (and not masks)."""
    return (folder / FILE).is_file()


def sizes(config: ModelConfig) -> dict[str, Any]:
    """The sizes that structured pruning changes."""
    names = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups".split()
    return {name: getattr(config, name) for name in names}


def _tensors(units: Units) -> dict[str, torch.Tensor]:
    tensors = {"layers": units.layers, "hidden": units.hidden}
    for layer, block in zip(units.layers, units.blocks, strict=True):
        for name, numbers in asdict(block).items():
            tensors[f"layers.{layer:05d}.{name}"] = numbers
    return {name: torch.tensor(numbers, dtype=torch.int32) for name, numbers in tensors.items()}


def _units(file: Path) -> Units:
    try:
        found = {name: tuple(tensor.tolist()) for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}): prune again") from error
    blocks = [
        BlockUnits(**{name: found[f"layers.{layer:05d}.{name}"] for name in BlockUnits.__dataclass_fields__})
        for layer in found["layers"]
    ]
    return Units(found["layers"], found["hidden"], tuple(blocks))
