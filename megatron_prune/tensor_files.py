"""Tensors in a safetensors file that knows its own checksum: a changed bit is found before anything is made of it.

The checksum stands in the file's metadata, so any reader of safetensors reads the file. One without a checksum, from an
earlier version, is read as it is.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY = "crc32"
"""Of the metadata: CRC-32 of names, types, shapes and bytes in the order of the names."""


class Damaged(ValueError):
    """A file that is missing, or not what was written."""


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a file with its checksum."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(content, file, metadata={KEY: tensors_checksum(content)})


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file; Damaged, in a few words, when it cannot be read or is not what was written."""
    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
            expected = (opened.metadata() or {}).get(KEY)
    except (OSError, SafetensorError) as error:
        raise Damaged(str(error)) from error
    if expected not in (None, tensors_checksum(found)):
        raise Damaged("it has changed since it was written")
    return found


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of tensors, as eight hexadecimal digits."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode(), value)
        value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
