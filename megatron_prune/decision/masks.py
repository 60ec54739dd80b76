"""A pruning decision on disk: which weights are kept, as packed bits per Hugging Face weight.

    DIR/decision.json              what decided (method, target, seed, calibration), sizes,
                                   sha256 of every layer file
    DIR/layer_00017.safetensors    Hugging Face weight name -> uint8 [ceil(out * in / 8)], row-major, first
                                   weight in the highest bit (numpy.packbits);
                                   metadata "shapes": JSON {name: [out, in]}, as the weight is stored (GPT-2: [in, out])

The folder appears whole or not at all: it is written as ``DIR.partial`` and renamed. Layers are written and
read one at a time.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_prune.claims import refuse_existing
from megatron_prune.decision.target import NM, Target, parse_target
from megatron_prune.decision.tiles import Grid, broken_groups
from megatron_prune.errors import UserError, brief
from megatron_prune.files import abandon_folder, begin_folder, publish_folder, write_json, writing
from megatron_prune.foreign import fenced, read_format, strict
from megatron_prune.model.families import ModelConfig, get_family
from megatron_prune.schema import Above0, Count, Layer, Sha256, TargetText, Word

_FORMAT = 1
_FILE = "decision.json"
MOST_WEIGHTS = 2**42
"""In one matrix; beyond any memory."""


@dataclass(frozen=True)
class MaskInfo:
    """Where a decision comes from."""

    __pydantic_config__ = strict()

    method: Word
    """Registered name of the method."""
    target: TargetText
    """As ``str(target)``: ``2:4`` or ``0.5``."""
    hyperparameters: dict[str, Any]
    family: Word
    model_hash: Word
    """``ModelConfig.fingerprint()`` of the model the decision is about."""
    seed: Count | None = None
    calibration: dict[str, Any] | None = None
    """Source, count, length, seed and hash of the calibration windows; None for methods without data."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Anything else that is JSON."""


@dataclass(frozen=True)
class Weight:
    """What a decision says of one weight."""

    __pydantic_config__ = strict()

    layer: Layer
    shape: tuple[Above0, Above0]
    """As the weight is stored."""
    kept: Count
    size: Above0

    def __post_init__(self) -> None:
        if self.size != self.shape[0] * self.shape[1] or self.kept > self.size or self.size > MOST_WEIGHTS:
            raise ValueError(f"{self.kept} of {self.size} weights are kept, in the shape {list(self.shape)}")


@dataclass(frozen=True, kw_only=True)
class _File(MaskInfo):
    """What is in decision.json."""

    format: Literal[1]
    kind: Literal["masks"]
    files: dict[Annotated[str, Field(pattern=r"^layer_[0-9]{5}\.safetensors$")], Sha256]
    weights: Annotated[dict[Annotated[Word, Field(pattern=r"\.")], Weight], Field(min_length=1)]

    def __post_init__(self) -> None:
        needed = {_layer_file(weight.layer) for weight in self.weights.values()}
        if needed != set(self.files):
            raise ValueError(f"the weights are of {len(needed)} layers, the files of {len(self.files)}")


class MaskRow(NamedTuple):
    """One line of a summary: a projection of a layer."""

    layer: int
    projection: str
    size: int
    """Weights."""
    kept: int
    density: float
    """kept / size"""


def pack_mask(mask: Tensor) -> np.ndarray:
    """Bool mask of any shape -> uint8 [ceil(numel / 8)], row-major, first weight in the highest bit."""
    return np.packbits(mask.detach().cpu().numpy().reshape(-1))


def unpack_mask(bits: np.ndarray, shape: Iterable[int]) -> Tensor:
    """Inverse of ``pack_mask``: uint8 bits -> bool ``shape``."""
    shape = tuple(shape)
    flat = np.unpackbits(np.ascontiguousarray(bits).reshape(-1), count=int(np.prod(shape)))
    return torch.from_numpy(flat.view(np.bool_)).reshape(shape)


def check_mask(mask: Tensor, target: Target, name: str) -> None:
    """Prove that mask [out, in] is what the target asks for; UserError names the first place where it is not.

    N:M is exact in every group. Unstructured sparsity is exact up to the rounding of the unit the method
    counts in: one weight per output row or per column; with a spread, a layer may differ by as much. What the target
    leaves dense is kept whole.
    """
    if target.leaves(name):
        if not mask.all():
            raise UserError(f"the mask of {name} keeps {int(mask.sum())} of {mask.numel()} weights; {target} keeps all")
        return
    if isinstance(target, NM):
        _check_groups(mask, target, name)
        return
    excess = int(mask.sum()) - target.density * mask.numel()
    if abs(excess) > max(mask.shape) + target.spread * mask.numel():
        raise UserError(
            f"the mask of {name} keeps {int(mask.sum())} of {mask.numel()} weights; sparsity {target} "
            f"keeps about {target.density * mask.numel():.0f}"
        )


def _check_groups(mask: Tensor, target: NM, name: str) -> None:
    target.check(mask.shape[-1], name)
    kept = mask.reshape(mask.shape[0], -1, target.m).sum(-1)
    broken = broken_groups(mask, target)
    if target.share != 1 and not broken.any():
        _check_tiles(kept, target, name)
        return
    wrong = (broken | (kept < target.n)).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        raise UserError(
            f"the mask of {name} keeps {int(kept[row, group])} of the {target.m} inputs from "
            f"{group * target.m} on in row {row}; {target} keeps exactly {target.n} "
            f"(wrong groups: {len(wrong)})"
        )


def _check_tiles(kept: Tensor, target: NM, name: str) -> None:
    """UserError for a tile that is neither dense nor in the pattern."""
    grid = Grid.of((kept.shape[0], kept.shape[1] * target.m), target)
    sizes = grid.sizes()
    whole = grid.sums(kept == target.m) == sizes
    pruned = grid.sums(kept == target.n) == sizes
    if not (whole | pruned).all():
        raise UserError(
            f"the mask of {name} has tiles of {target.tiles} that are neither dense nor {target.n}:{target.m}"
        )


class MaskWriter:
    """Writes a decision layer by layer; use as a context manager, or end with ``close`` or ``discard``.

    Refuses an existing folder; leaves nothing under the final name unless closed. Every mask is checked
    against the target. One process writes.
    """

    def __init__(self, directory: Path, info: MaskInfo) -> None:
        refuse_existing(directory, "decision")
        self.directory = directory
        self.info = info
        self.notes: dict[str, Any] = dict(info.notes)
        """Stored at ``close``; more may be added until then."""
        self._target = parse_target(info.target)
        self._weights: dict[str, dict[str, Any]] = {}
        self._files: dict[str, str] = {}
        self._partial = begin_folder(directory, alone=True)

    def add_layer(self, layer: int, masks: Mapping[str, Tensor]) -> None:
        """Store one layer: Hugging Face weight name -> bool in the shape of the weight, True = kept."""
        file = _layer_file(layer)
        repeated = [name for name in masks if name in self._weights]
        if file in self._files or repeated or not masks:
            raise ValueError(f"layer {layer} is empty or was already written: {repeated or list(masks)}")
        for name, mask in masks.items():
            self._weights[name] = self._describe(name, mask, layer)
        packed = {name: torch.from_numpy(pack_mask(mask)) for name, mask in masks.items()}
        shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
        with writing(self.directory):
            save_file(packed, self._partial / file, metadata={"shapes": shapes})
        self._files[file] = _sha256(self._partial / file)

    def close(self) -> Masks:
        """Write decision.json, give the folder its name and open it."""
        content = asdict(self.info) | {
            "format": _FORMAT,
            "kind": "masks",
            "notes": self.notes,
            "files": self._files,
            "weights": self._weights,
        }
        try:
            write_json(self._partial / _FILE, content)
        except UserError:
            self.discard()
            raise
        publish_folder(self.directory, alone=True)
        return Masks.load(self.directory)

    def discard(self) -> None:
        """Remove what was written so far."""
        abandon_folder(self.directory, alone=True)

    def __enter__(self) -> MaskWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
        elif self._partial.is_dir():
            self.close()

    def _describe(self, name: str, mask: Tensor, layer: int) -> dict[str, Any]:
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"the mask of {name} is {mask.dtype} {list(mask.shape)}; expected bool [out, in]")
        check_mask(get_family(self.info.family).as_rows(mask), self._target, name)
        return {"layer": layer, "shape": list(mask.shape), "kept": int(mask.sum()), "size": mask.numel()}


class Masks:
    """A decision that was read from disk and verified; masks are read when asked for."""

    def __init__(self, directory: Path, info: MaskInfo, weights: Mapping[str, Weight]) -> None:
        self.directory = directory
        self.info = info
        self._weights = weights

    @classmethod
    def load(cls, directory: Path) -> Masks:
        """Open a decision folder; UserError when it is none, incomplete or damaged (by sha256)."""
        found: _File = read_format(directory / _FILE, "a pruning decision", _FORMAT, _File)
        parse_target(found.target)
        info = MaskInfo(**{item.name: getattr(found, item.name) for item in fields(MaskInfo)})
        for name, digest in found.files.items():
            _verify(directory / name, digest)
        return cls(directory, info, found.weights)

    @classmethod
    def save(cls, directory: Path, info: MaskInfo, layers: Iterable[tuple[int, Mapping[str, Tensor]]]) -> Masks:
        """Write a whole decision (layer number, its masks) and open it."""
        with MaskWriter(directory, info) as writer:
            for layer, masks in layers:
                writer.add_layer(layer, masks)
        return cls.load(directory)

    @property
    def target(self) -> Target:
        """The target the masks were made for."""
        return parse_target(self.info.target)

    @property
    def density(self) -> float:
        """Share of the masked weights that are kept."""
        return sum(row.kept for row in self.summary()) / sum(row.size for row in self.summary())

    def names(self) -> list[str]:
        """Hugging Face names of the masked weights."""
        return list(self._weights)

    def layers(self) -> list[int]:
        """Numbers of the masked layers, ascending."""
        return sorted({weight.layer for weight in self._weights.values()})

    def get(self, name: str) -> Tensor:
        """Bool in the shape of the weight as it is stored, True = kept."""
        if name not in self._weights:
            near = difflib.get_close_matches(name, self._weights, n=1)
            raise UserError(f"{self.directory} has no mask for {name}" + (f"; nearest: {near[0]}" if near else ""))
        weight = self._weights[name]
        file = self.directory / _layer_file(weight.layer)
        with (
            fenced(f"cannot read the mask of {brief(name)} from {file}", "prune again or restore it"),
            safe_open(file, framework="np") as opened,
        ):
            about = opened.get_slice(name)
            if (about.get_dtype(), about.get_shape()) != ("U8", [-(-weight.size // 8)]):
                raise ValueError(f"{about.get_dtype()} {about.get_shape()} for {weight.size} bits")
            mask = unpack_mask(opened.get_tensor(name), weight.shape)
        if int(mask.sum()) != weight.kept:
            raise UserError(f"{file} is damaged: the mask of {name} does not keep the {weight.kept} weights it should")
        return mask

    def summary(self) -> list[MaskRow]:
        """Size and density of every layer and projection, in model order."""
        return [
            MaskRow(
                weight.layer,
                name.split(".")[-2],
                weight.size,
                weight.kept,
                weight.kept / weight.size,
            )
            for name, weight in self._weights.items()
        ]

    def check(self, target: Target | str | None = None) -> None:
        """Prove every mask against ``target`` (default: the one it was made for); UserError names what breaks
        it.
        """
        target = self.target if target is None else parse_target(target)
        for name in self.names():
            check_mask(get_family(self.info.family).as_rows(self.get(name)), target, name)

    def check_origin(self, config: ModelConfig) -> None:
        """UserError when the masks were decided for another model, be it of the same shapes."""
        if (self.info.model_hash, self.info.family) != (config.fingerprint(), config.family):
            raise UserError(
                f"{self.directory} was made for another {self.info.family} model than this {config.family} one: use "
                "the checkpoint that was pruned"
            )

    def check_model(self, config: ModelConfig) -> None:
        """UserError unless there is a mask of the right shape for every prunable weight of the model, and no
        other.
        """
        shapes = prunable_shapes(config)
        for name in sorted(set(shapes) ^ set(self._weights)):
            where = "the model does not have" if name in self._weights else "the decision has no mask for"
            raise UserError(f"{self.directory} was made for another model: {where} {name}")
        for name, shape in shapes.items():
            if self._weights[name].shape != shape:
                raise UserError(
                    f"{self.directory} was made for another model: the mask of {name} has shape "
                    f"{list(self._weights[name].shape)}, the weight {list(shape)}"
                )


def prunable_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, as stored, of every weight that masks apply to, in model order."""
    maps = get_family(config.family).weights(config)
    return {name: shape for map in maps if map.prunable for name, shape in zip(map.hf, map.shapes, strict=True)}


def _layer_file(layer: int) -> str:
    return f"layer_{layer:05d}.safetensors"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _verify(file: Path, digest: str) -> None:
    if not file.is_file():
        raise UserError(f"{file} is missing: the decision is incomplete; prune again or restore it")
    if _sha256(file) != digest:
        raise UserError(f"{file} is damaged: its sha256 is not the one in {_FILE}; prune again or restore it")


class Kept(NamedTuple):
    """Outcome of a method in two numbers."""

    kept: int
    """Weights that stay."""
    size: int
    """Weights that were decided about."""
