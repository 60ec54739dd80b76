"""A structured decision on disk: which units of a model stay.

    DIR/trim.json           what decided (method, target, seed, calibration), sizes before and after, checksum
    DIR/units.safetensors   int32: layers, hidden, and for each layer that stays its heads, groups and ffn
                            ("layers.00017.heads", numbered as in the whole model); with experts these too, and
                            where they lost neurons expert_ffn, those of one expert after those of the other

The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load, save_file

from megatron_prune.claims import refuse_existing
from megatron_prune.decision.masks import MaskInfo
from megatron_prune.decision.target import parse_any_target
from megatron_prune.decision.units import BlockUnits, Units
from megatron_prune.errors import UserError, brief
from megatron_prune.files import new_folder, write_json
from megatron_prune.foreign import fenced, names, read_format, read_regular, strict
from megatron_prune.model.config_json import LARGEST
from megatron_prune.model.cost import parameters
from megatron_prune.model.families import ModelConfig
from megatron_prune.schema import Above0, Sha256

FILE = "trim.json"
UNITS = "units.safetensors"
_FORMAT = 1
ADDED = ("experts", "expert_ffn", "shared_ffn")
"""Units that a layer without them has no tensor of: decisions on other models are written as they always were."""
MOST_UNITS = 2**28
"""Neurons of all layers together."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that structured pruning changes."""

    __pydantic_config__ = strict()

    num_layers: Above0
    hidden_size: Above0
    ffn_hidden_size: Above0
    num_attention_heads: Above0
    num_query_groups: Above0
    num_moe_experts: Above0 | None = None
    moe_ffn_hidden_size: Above0 | None = None
    moe_shared_expert_intermediate_size: Above0 | None = None

    def __post_init__(self) -> None:
        if (self.num_moe_experts is None) != (self.moe_ffn_hidden_size is None):
            raise ValueError("num_moe_experts and moe_ffn_hidden_size go together")
        for name, value in self.given().items():
            if value > LARGEST[name]:
                raise ValueError(f"{name} is {brief(value)}; allowed: at most {LARGEST[name]}")
        widest = max(self.ffn_hidden_size, self.moe_ffn_hidden_size or 0, self.num_moe_experts or 0)
        if self.num_layers * widest > MOST_UNITS:
            raise ValueError(f"{self.num_layers} layers of {widest} neurons; a report draws {MOST_UNITS}")

    def given(self) -> dict[str, int]:
        """Those that the model has."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Record(MaskInfo):
    """What is in trim.json."""

    format: Literal[1]
    before: Sizes
    after: Sizes
    parameters: Above0
    """Of what stays."""
    sha256: Sha256


def read_record(folder: Path) -> Record:
    """What a structured decision says about itself; UserError when `folder` is none."""
    found: Record = read_format(folder / FILE, "a structured decision", _FORMAT, Record)
    parse_any_target(found.target)
    return found


@dataclass(frozen=True)
class Trim:
    """A structured decision."""

    info: MaskInfo
    units: Units

    def save(self, folder: Path, whole: ModelConfig) -> None:
        """Write `folder`, which must not exist and appears whole. One process writes."""
        refuse_existing(folder, "decision")
        with new_folder(folder, alone=True) as partial:
            self._write(partial, whole)

    def _write(self, folder: Path, whole: ModelConfig) -> None:
        save_file(_tensors(self.units), folder / UNITS)
        content = {
            "format": _FORMAT,
            **asdict(self.info),
            "before": sizes(whole).given(),
            "after": sizes(self.units.config(whole)).given(),
            "parameters": parameters(self.units.config(whole)),
            "sha256": hashlib.sha256((folder / UNITS).read_bytes()).hexdigest(),
        }
        write_json(folder / FILE, content)

    @classmethod
    def load(cls, folder: Path) -> Trim:
        """The decision in `folder`; UserError when it is none or damaged."""
        about = read_record(folder)
        data = read_regular(folder / UNITS, "a structured decision")
        if hashlib.sha256(data).hexdigest() != about.sha256:
            raise UserError(f"{folder / UNITS} is not what was written: the decision is damaged, prune again")
        with fenced(f"{folder / UNITS} is damaged", "prune again or restore it"):
            units = _units(data)
            check_units(units, about.before, about.after)
        return cls(MaskInfo(**{key: getattr(about, key) for key in MaskInfo.__dataclass_fields__}), units)

    def check_model(self, config: ModelConfig) -> None:
        """UserError when the decision is about another model."""
        if self.info.model_hash != config.fingerprint():
            raise UserError(
                f"the decision was made for another {self.info.family} model than this one: use the checkpoint that "
                "was pruned"
            )
        try:
            smaller = self.units.config(config)
            if smaller.num_moe_experts and smaller.num_moe_experts < (smaller.moe_router_topk or 0):
                raise ValueError(
                    f"{smaller.num_moe_experts} experts stay and each token goes to {smaller.moe_router_topk}"
                )
        except ValueError as error:
            raise UserError(f"the decision's units make no model ({error}); restore the run, or prune again") from None


def is_trim(folder: Path) -> bool:
    """Whether a decision folder holds a structured decision (and not masks)."""
    return (folder / FILE).is_file()


def sizes(config: ModelConfig) -> Sizes:
    """The sizes of a model that structured pruning changes."""
    return Sizes(**{name: getattr(config, name) for name in Sizes.__dataclass_fields__})


def _tensors(units: Units) -> dict[str, torch.Tensor]:
    tensors = {"layers": units.layers, "hidden": units.hidden}
    for layer, block in zip(units.layers, units.blocks, strict=True):
        flat = asdict(block) | {"expert_ffn": tuple(itertools.chain(*block.expert_ffn))}
        for name, numbers in flat.items():
            if numbers or name not in ADDED:
                tensors[f"layers.{layer:05d}.{name}"] = numbers
    return {name: torch.tensor(numbers, dtype=torch.int32) for name, numbers in tensors.items()}


def _units(data: bytes) -> Units:
    found = {name: _numbers(name, tensor) for name, tensor in load(data).items()}
    blocks = []
    for layer in found["layers"]:
        start = f"layers.{layer:05d}."
        needed = {name: found.pop(start + name) for name in ("groups", "heads", "ffn")}
        added = {name: found.pop(start + name, ()) for name in ADDED}
        expert_ffn = _of_each(added.pop("expert_ffn"), len(added["experts"]))
        blocks.append(BlockUnits(**needed, **added, expert_ffn=expert_ffn))
    if set(found) != {"layers", "hidden"}:
        raise ValueError(f"unknown {names(sorted(set(found) - {'layers', 'hidden'}))}")
    return Units(found["layers"], found["hidden"], tuple(blocks))


def _of_each(numbers: tuple[int, ...], experts: int) -> tuple[tuple[int, ...], ...]:
    """Neurons of each expert, from those of one after those of the other; none where there are none."""
    if not numbers:
        return ()
    if not experts or len(numbers) % experts:
        raise ValueError(f"{len(numbers)} neurons of {experts} experts: not equally many")
    width = len(numbers) // experts
    return tuple(numbers[start : start + width] for start in range(0, len(numbers), width))


def _numbers(name: str, tensor: torch.Tensor) -> tuple[int, ...]:
    if tensor.dtype != torch.int32 or tensor.dim() != 1:
        raise ValueError(f"{name} is {tensor.dtype} of shape {list(tensor.shape)}; int32 in a row are allowed")
    return tuple(tensor.tolist())


def check_units(units: Units, before: Sizes, after: Sizes) -> None:
    """ValueError unless the units are rising numbers below the sizes before, and make the sizes after."""
    most = LARGEST["moe_shared_expert_intermediate_size"]  # of models that count shared experts: `Units` compares
    rows = [("layers", units.layers, before.num_layers), ("hidden", units.hidden, before.hidden_size)]
    for block in units.blocks:
        width = (before.moe_ffn_hidden_size or 0) if block.experts else before.ffn_hidden_size
        rows += [("heads", block.heads, before.num_attention_heads), ("ffn", block.ffn, width)]
        rows += [("groups", block.groups, before.num_query_groups)]
        rows += [("experts", block.experts, before.num_moe_experts or 0)]
        rows += [("ffn of an expert", neurons, width) for neurons in block.expert_ffn]
        rows += [("shared ffn", block.shared_ffn, before.moe_shared_expert_intermediate_size or most)]
    for what, numbers, count in rows:
        if list(numbers) != sorted(set(numbers)) or (numbers and not 0 <= numbers[0] <= numbers[-1] < count):
            raise ValueError(f"{what} are not rising numbers below {count}")
    for block in units.blocks:
        sparse = (len(block.experts), block.ffn_width) == (after.num_moe_experts, after.moe_ffn_hidden_size)
        if block.experts and not sparse:
            raise ValueError(f"{len(block.experts)} experts of {block.ffn_width} neurons stay; {FILE} has other sizes")
    if after.num_moe_experts and not any(block.experts for block in units.blocks):
        raise ValueError(f"no layer has experts; {FILE} has {after.num_moe_experts}")
    if (len(units.layers), len(units.hidden)) != (after.num_layers, after.hidden_size):
        raise ValueError(f"{len(units.layers)} layers and {len(units.hidden)} channels stay; {FILE} has other sizes")
