"""Which tensors the safetensors files of a directory hold, and where: from their headers alone, which are checked.

A safetensors file is 8 bytes of header length, a JSON header (name -> type, shape, first and last byte), the data.
Files are opened only when they are ordinary ones that lie in the directory itself.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from megatron_prune.errors import UserError, brief, shown
from megatron_prune.foreign import bounded, check_shape, names, open_regular, parse_json, read_json, strict

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 20_000_000  # bytes: of 150,000 tensors; the format allows five times as much, which takes long to check
_METADATA = "__metadata__"
_WHAT = "a Hugging Face checkpoint"
_FETCH = "fetch it again"
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Of an element; types that are missing here are refused later, as the types of weights."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Part:
    """Which part a tensor is of one that all experts of a layer are in, `[experts, out, in]` with gate above up."""

    expert: int
    half: int | None = None
    """Of gate and up the first or the second; None: it has no halves."""
    alternating: bool = False
    """The tensor is `[experts, in, out]`, and gate and up alternate in it."""

    def of(self, whole: Any) -> Any:
        """A view of PyTorch's tensor, or what is read of one in a file: `[out, in]`, of a bias `[out]`."""
        found = whole[self.expert]
        if not self.alternating:
            rows = len(found) // 2
            return found if self.half is None else found[self.half * rows : (self.half + 1) * rows]
        return (found if self.half is None else found[..., self.half :: 2]).t()


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file, its name there, safetensors dtype (``BF16``), shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    part: Part | None = None
    """Of the tensor of that name in the file; None: it is all of it."""
    scales: Entry | None = None
    """Where its scales are, if those are codes."""


class _Tensor(TypedDict):
    """One entry of a header."""

    __pydantic_config__ = strict()  # type: ignore[misc]
    dtype: str
    shape: Annotated[list[bounded(0, 2**40)], Field(max_length=16)]  # type: ignore[valid-type]
    data_offsets: Annotated[list[bounded(0, 2**60)], Field(min_length=2, max_length=2)]  # type: ignore[valid-type]


def read_entries(directory: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint, from the headers of its one or many safetensors files.

    As in transformers the one file counts where there are many, too.
    """
    if os.path.lexists(directory / SINGLE):
        return file_entries(directory / SINGLE)
    if os.path.lexists(directory / INDEX):
        return _indexed_entries(directory, directory / INDEX)
    raise UserError(_without_weights(directory))


def weight_files(directory: Path) -> set[str]:
    """Names of the files that `read_entries` reads."""
    if os.path.lexists(directory / SINGLE):
        return {SINGLE}
    return {INDEX, *_weight_map(directory / INDEX).values()} if os.path.lexists(directory / INDEX) else set()


def _without_weights(directory: Path) -> str:
    """Why a directory without the files that are looked for cannot be read, by what it holds instead."""
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        own = (
            "that is the form of the model's authors; give the repository's form for transformers"
            if others[0].startswith("consolidated")
            else f"name one file {SINGLE}, or write the index, as save_pretrained does"
        )
        return f"{directory} holds {names(others, 2)}, but neither {SINGLE} nor {INDEX}: {own}"
    if pickles:
        return (
            f"{directory} holds {brief(pickles[0])} but no safetensors; pickle files are not read because opening one "
            "can run code. Convert: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return f"{directory} holds neither {SINGLE} nor {INDEX}; give a directory that save_pretrained has written"


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of a file in the same directory."""
    weight_map = read_json(index, _WHAT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map (tensor name -> file name); {_FETCH}")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise UserError(f"{index} has no weight_map of file names: {brief(name)} has {brief(file)}; {_FETCH}")
        if file in (".", "..", "") or Path(file).name != file:
            raise UserError(f"{index} names the file {brief(file)}; allowed: files in its own directory; {_FETCH}")
    return weight_map


def _indexed_entries(directory: Path, index: Path) -> dict[str, Entry]:
    weight_map = _weight_map(index)
    files = {name: _named_entries(directory / name, index) for name in sorted(set(weight_map.values()))}
    entries: dict[str, Entry] = {}
    for found in files.values():
        for name, entry in found.items():
            if name in entries:
                both = f"{entries[name].file.name} and {entry.file.name}"
                raise UserError(f"{directory} has {shown(name)} twice, in {both}: one of them is not its own; {_FETCH}")
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in files[file]:
            raise UserError(f"{index} places {shown(name)} in {shown(file)}, which does not hold it; {_FETCH}")
    return entries


def _named_entries(file: Path, index: Path) -> dict[str, Entry]:
    if not os.path.lexists(file):
        raise UserError(f"{file} does not exist, but {index.name} names it; is the checkpoint complete?")
    return file_entries(file)


def file_entries(file: Path) -> dict[str, Entry]:
    """Tensors of one safetensors file; UserError when it is missing, truncated or corrupt."""
    header, data_bytes = _read_header(file)
    header.pop(_METADATA, None)
    tensors: dict[str, _Tensor] = check_shape(
        header, f"{file} is not a valid safetensors file: its header", dict[str, _Tensor], _FETCH
    )
    _check_offsets(file, tensors, data_bytes)
    return {name: Entry(file, name, one["dtype"], tuple(one["shape"])) for name, one in tensors.items()}


def _check_offsets(file: Path, tensors: Mapping[str, _Tensor], data_bytes: int) -> None:
    """The tensors lie one behind the other, each as long as its type and shape say, and fill the file."""
    end = max((one["data_offsets"][1] for one in tensors.values()), default=0)
    if end != data_bytes:
        raise UserError(
            f"{file} is truncated or damaged: its header describes {end} bytes of tensors, the file holds "
            f"{data_bytes}; {_FETCH}"
        )
    places = sorted((*one["data_offsets"], name) for name, one in tensors.items())
    for (_, before, _), (first, _, name) in itertools.pairwise([(0, 0, ""), *places]):
        if first != before:
            raise UserError(f"{file} is damaged: {shown(name)} begins at byte {first}, not at {before}; {_FETCH}")
    for name, one in tensors.items():
        first, last = one["data_offsets"]
        bits = _BITS.get(one["dtype"])
        if bits is not None and math.prod(one["shape"]) * bits != (last - first) * 8:
            raise UserError(
                f"{file} is damaged: {shown(name)}, {brief(one['dtype'])} {one['shape']}, has {last - first} bytes; "
                f"{_FETCH}"
            )


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """JSON header of a safetensors file and the number of data bytes."""
    with open_regular(file, _WHAT, most=None) as opened:
        start = opened.read(8)
        size = opened.seek(0, 2)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(_HEADER_LIMIT, size - 8):
            raise UserError(f"{file} is truncated or not a safetensors file ({size} bytes); {_FETCH}")
        opened.seek(8)
        header = opened.read(length)
    where = f"the header of {file}"
    return parse_json(header, where, dict[str, Any], f"it is not a valid safetensors file, {_FETCH}"), size - 8 - length
