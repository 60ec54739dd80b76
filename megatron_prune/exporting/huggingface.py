"""A directory that ``from_pretrained`` opens: config.json, dense safetensors with true zeros as +0.0,
tokenizer.

Tensors are written as they come: memory holds one of them, not a shard. A safetensors file is 8 bytes of
header length, a JSON header, the data; the header is padded with spaces (the format allows it), so its room
is reserved first and it is filled in when the file is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.claims import refuse_existing
from megatron_prune.data.tokenizer_files import copy_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.exporting.forms import auto_map, code_file
from megatron_prune.files import new_folder
from megatron_prune.model.convert import experts_together
from megatron_prune.model.families import ModelConfig, get_family
from megatron_prune.model.pruning import write_pruning

_MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ENTRY_BYTES = 160
"""Room in the header for one tensor besides its name: dtype, shape and offsets of up to 15 digits."""


def write_hf(
    directory: Path,
    config: ModelConfig,
    weights: Iterator[tuple[str, Tensor]],
    tokenizer_dir: Path | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    with_code: bool = False,
    history: Mapping[str, Any] | None = None,
) -> None:
    """Write the model to ``directory`` as `write_directory` does.

    ``weights``: Hugging Face name and tensor, each of the model's exactly once, in any order, on any device;
    an output layer tied to the embedding is left out; files may have those of experts in one tensor. ``with_code``: the
    modelling file that transformers needs for layers that differ is written too. ``history``: of the checkpoint, of
    which what it says of pruning is written down. One process writes.
    """
    family = get_family(config.family)
    hf_config = family.to_hf(config)
    code = None
    if with_code:
        code = code_file(config)
        hf_config["auto_map"] = auto_map(config)
    shapes = {name: shape for map in family.weights(config) for name, shape in map.stored(config).items()}
    if family.alternating:
        weights = experts_together(config, weights)
    tied = family.tied_names(config)
    own = ((name, tensor) for name, tensor in weights if name not in tied)
    configs = {"config.json": hf_config}
    write_directory(directory, shapes, own, configs, tokenizer_dir, max_shard_bytes, code, history)


def write_directory(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    weights: Iterator[tuple[str, Tensor]],
    configs: Mapping[str, Any],
    tokenizer_dir: Path | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    code: tuple[str, str] | None = None,
    history: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's files to ``directory``, which must not exist and appears only when complete.

    ``weights``: name and tensor, each of ``shapes`` exactly once; dtypes are kept, -0.0 becomes +0.0. ``configs``: JSON
    files by name. Tokenizer, chat template and generation config files are copied from ``tokenizer_dir``. ``code``:
    name and content of a file of code; ``history``: as `write_hf` takes it.
    """
    refuse_existing(directory, "export")
    if tokenizer_dir is not None and not tokenizer_dir.is_dir():
        raise UserError(f"tokenizer directory {tokenizer_dir} does not exist")
    with new_folder(directory, alone=True) as partial:
        _write_weights(partial, shapes, weights, max_shard_bytes)
        if code is not None:
            (partial / code[0]).write_text(code[1], encoding="utf-8")
        for name, content in configs.items():
            _write_json(partial / name, content)
        write_pruning(partial, history or {})
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, partial)


def positive_zeros(tensor: Tensor) -> Tensor:
    """The same tensor with every zero stored as +0.0; all other values keep their bits."""
    return tensor.masked_fill(tensor == 0, 0.0)


def _write_weights(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    weights: Iterator[tuple[str, Tensor]],
    max_shard_bytes: int,
) -> None:
    missing = dict(shapes)
    room = sum(len(name) + _ENTRY_BYTES for name in missing)
    shards: list[_Shard] = []
    for name, tensor in weights:
        if missing.pop(name, None) != tuple(tensor.shape):
            raise ValueError(f"{name} {list(tensor.shape)} is not a tensor of this model, or came twice")
        if not shards or not shards[-1].fits(tensor, max_shard_bytes):
            if shards:
                shards[-1].close()
            shards.append(_Shard(directory / f"shard-{len(shards)}", room))
        shards[-1].add(name, tensor)
    if missing:
        raise ValueError(f"{len(missing)} tensors of the model were not given, the first is {next(iter(missing))}")
    shards[-1].close()
    _name_shards(directory, shards)


def _name_shards(directory: Path, shards: list[_Shard]) -> None:
    """Give the files their final names and write the index when there are several."""
    if len(shards) == 1:
        os.replace(shards[0].path, directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.replace(shard.path, directory / file)
        weight_map |= dict.fromkeys(shard.entries, file)
    metadata = {"total_size": sum(shard.size for shard in shards)}
    _write_json(directory / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


class _Shard:
    """One safetensors file that is written from front to back."""

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.size = 0
        """Bytes of tensor data so far."""
        self.entries: dict[str, dict[str, Any]] = {}
        self._header = -(-(room + _ENTRY_BYTES) // 8) * 8  # the data starts at a multiple of 8
        self._file = path.open("wb")
        self._file.seek(8 + self._header)

    def fits(self, tensor: Tensor, max_bytes: int) -> bool:
        """Whether the tensor may follow here: within the size, and aligned to its own elements."""
        return self.size + tensor.nbytes <= max_bytes and self.size % tensor.element_size() == 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; weights are {', '.join(map(str, _DTYPES))}")
        data = positive_zeros(tensor.detach()).cpu().contiguous()
        self._file.write(data.view(torch.uint8).reshape(-1).numpy().data)
        offsets = [self.size, self.size + data.nbytes]
        self.entries[name] = {
            "dtype": _DTYPES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": offsets,
        }
        self.size += data.nbytes

    def close(self) -> None:
        """Fill in the header."""
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":")).encode()
        assert len(header) <= self._header, "the reserved header is too small"
        self._file.seek(0)
        self._file.write(self._header.to_bytes(8, "little") + header.ljust(self._header))
        self._file.close()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
