"""Hugging Face tensors <-> Megatron tensors: pure functions driven by a ``WeightMap``, and a reader of
safetensors checkpoints that holds one tensor at a time. Every function works on weights, on bool masks and on
1-D row numbers.

    linear_qkv (2 query groups, 2 heads each)        linear_fc1, TP = 2
    unsharded rows: q0 q1 k0 v0 | q2 q3 k1 v1        unsharded: gate0 gate1 up0 up1
    rank 0 of 2:    q0 q1 k0 v0                      rank 0:    gate0 up0      rank 1: gate1 up1
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.model.description import TOKENIZER_FILES
from megatron_prune.model.families import ModelConfig, WeightMap, dimensions, family_of, get_family

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format


def merge(map: WeightMap, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """Hugging Face tensors, in the order of ``map.hf``, -> the unsharded Megatron tensor [rows, ...]."""
    if len(tensors) != len(map.hf):
        raise ValueError(f"{map.megatron} is made of {len(map.hf)} tensors, {len(tensors)} were given")
    parts = [tensor.t() if map.transposed else tensor for tensor in tensors]
    if map.transform == "fused_qkv":
        parts = list(parts[0].split(_part_rows(map, config)))
    if map.transform in ("qkv", "fused_qkv"):
        return torch.cat([part.unflatten(0, (_groups(map, config), -1)) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def split(map: WeightMap, tensor: Tensor, config: ModelConfig) -> list[Tensor]:
    """The unsharded Megatron tensor -> its Hugging Face tensors in the order of ``map.hf``; inverse of
    ``merge``.
    """
    if tensor.shape[0] != map.shape[0]:
        raise ValueError(f"{map.megatron} has {map.shape[0]} rows, a tensor with {tensor.shape[0]} was given")
    rows = _part_rows(map, config)
    if map.transform in ("qkv", "fused_qkv"):
        groups = _groups(map, config)
        grouped = tensor.unflatten(0, (groups, -1)).split([count // groups for count in rows], dim=1)
        parts = [part.flatten(0, 1) for part in grouped]
    else:
        parts = list(tensor.split(rows))
    if map.transform == "fused_qkv":
        parts = [torch.cat(parts)]
    return [(part.t() if map.transposed else part).contiguous() for part in parts]


def _groups(map: WeightMap, config: ModelConfig) -> int:
    """Query groups of the layer that the tensor is of."""
    return config.block(map.layer).num_query_groups


def _part_rows(map: WeightMap, config: ModelConfig) -> list[int]:
    """Rows of each matrix that the Megatron tensor is made of; a fused one counts as query, key and value."""
    if map.transform != "fused_qkv":
        return [shape[0] for shape in map.row_shapes]
    size = dimensions(config, map.layer)
    return [size["query"], size["key_value"], size["key_value"]]


def shard(map: WeightMap, tensor: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """This rank's part of the unsharded Megatron tensor, contiguous.

    Gated weights give [gate_r; up_r]; vocabulary rows are padded with zeros to a multiple of ``tp_size``.
    UserError when ``tp_size`` does not divide the query groups or channels.
    """
    if map.shard_dim is None:
        return tensor
    if map.pad_rows:
        tensor = _pad_rows(tensor, -tensor.shape[0] % tp_size)
    parts = tensor.chunk(len(map.hf)) if map.transform == "gated" else (tensor,)
    _check_divisible(map, parts[0].shape[map.shard_dim], tp_size)
    mine = [part.chunk(tp_size, dim=map.shard_dim)[tp_rank] for part in parts]
    return torch.cat(mine) if len(mine) > 1 else mine[0].contiguous()


def unshard(map: WeightMap, shards: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """All ranks' parts, in rank order, -> the unsharded Megatron tensor without vocabulary padding.

    ``config`` is the model the shards belong to; replicated tensors must be equal on all ranks.
    """
    if map.shard_dim is None:
        if any(not torch.equal(shards[0], other) for other in shards[1:]):
            raise ValueError(f"{map.megatron} is replicated but differs between tensor-parallel ranks")
        return shards[0]
    if map.transform == "gated":
        halves = [shard.chunk(len(map.hf)) for shard in shards]
        return torch.cat([half[part] for part in range(len(map.hf)) for half in halves])
    whole = torch.cat(list(shards), dim=map.shard_dim)
    return whole[: config.vocab_size] if map.pad_rows else whole


def row_ids(map: WeightMap, config: ModelConfig, tp_rank: int, tp_size: int) -> Tensor:
    """[local rows] int64: the unsharded Megatron row held in each local row; -1 for vocabulary padding."""
    del config  # map.shape says it all
    rows = torch.arange(1, map.shape[0] + 1)
    if map.shard_dim != 0:
        return rows - 1
    return shard(map, rows, tp_rank, tp_size) - 1


def row_blocks(map: WeightMap, config: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face name -> [its rows] int64: where each of its rows lies in the unsharded Megatron tensor."""
    return dict(zip(map.hf, split(map, torch.arange(map.shape[0]), config), strict=True))


def _pad_rows(tensor: Tensor, count: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])]) if count else tensor


def _check_divisible(map: WeightMap, size: int, tp_size: int) -> None:
    units = size // map.shard_unit if not map.pad_rows else size
    if units % tp_size:
        raise UserError(
            f"tensor-model-parallel-size {tp_size} does not divide {map.megatron} into equal parts: it has "
            f"{units} {'query groups' if map.shard_unit > 1 else 'channels'}; choose a divisor of {units}"
        )


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: file, its name there, safetensors dtype (``BF16``), shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


class HFReader:
    """A Hugging Face checkpoint (directory or hub id), checked when opened, read one tensor at a time.

    Only safetensors is read. Opening reads the file headers alone and raises UserError for a missing
    directory, file or tensor, a shape that contradicts config.json, an unknown tensor, and a truncated or
    corrupt file.
    """

    def __init__(self, source: str | Path) -> None:
        self.directory = _local_directory(source)
        self.config: dict[str, Any] = _read_json(self.directory / "config.json")
        self._entries = read_entries(self.directory)
        self.model_config = self._model_config()
        family = get_family(self.model_config.family)
        self._maps = family.weights(self.model_config)
        self._entries = _full_names(self._entries, self._maps[0].hf[0], family.prefix)
        self._check_tensors()

    def names(self) -> list[str]:
        """Hugging Face names of the weights the model needs, in model order."""
        return [name for map in self._maps for name in map.hf]

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, in the dtype it is stored in."""
        if name not in self._entries:
            raise UserError(f"{self.directory} has no tensor {name}{_nearest(name, self._entries)}")
        file = self._entries[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(self._entries[name].name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {name} from {file}: {error}") from error

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last``, that one not included, of the tensor ``name``; nothing else of it is read."""
        entry = self._entries[name]
        try:
            with safe_open(entry.file, framework="pt") as opened:
                return opened.get_slice(entry.name)[first:last]
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {name} from {entry.file}: {error}") from error

    def _model_config(self) -> ModelConfig:
        config = family_of(self.config).from_hf(self.config)
        if self.config.get("dtype") or self.config.get("torch_dtype"):
            return config
        stored = {entry.dtype for entry in self._entries.values()} & set(_FLOATS)
        if len(stored) != 1:
            raise UserError(
                f"{self.directory}/config.json has no dtype and the tensors are {sorted(stored)}; "
                f'add "dtype" ({", ".join(sorted(_FLOATS.values()))})'
            )
        return replace(config, dtype=_FLOATS[stored.pop()])

    def _check_tensors(self) -> None:
        for map in self._maps:
            for name, shape in zip(map.hf, map.shapes, strict=True):
                self._check_tensor(name, shape)
        family = get_family(self.model_config.family)
        tied = family.tied_names(self.model_config)
        needed = {*self.names(), *tied}
        for name in sorted(set(self._entries) - needed):
            if not any(fnmatch.fnmatch(name, pattern) for pattern in family.ignored):
                raise UserError(
                    f"{self._entries[name].file} holds {name}, which a {family.name} model does not have"
                    f"{_nearest(name, needed)}; it would be lost"
                )
        for name in set(tied) & set(self._entries):
            self._check_tied(name, self._maps[0].hf[0])

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._entries:
            raise UserError(
                f"{self.directory} has no tensor {name}, which config.json asks for; is the checkpoint complete?"
            )
        entry = self._entries[name]
        if entry.shape != shape:
            raise UserError(f"{name} in {entry.file} has shape {list(entry.shape)}; config.json asks for {list(shape)}")
        if entry.dtype not in _FLOATS:
            raise UserError(
                f"{name} in {entry.file} has dtype {entry.dtype}; supported: {', '.join(_FLOATS)} "
                "(a quantised checkpoint must be converted first)"
            )

    def _check_tied(self, name: str, embedding: str) -> None:
        """config.json ties the output layer to the embedding: a stored copy must repeat it."""
        if self._entries[name].shape != self._entries[embedding].shape or not torch.equal(
            self.read(name), self.read(embedding)
        ):
            raise UserError(
                f"{self._entries[name].file}: config.json has tie_word_embeddings true, but {name} differs "
                f"from {embedding}; set tie_word_embeddings to false or remove {name}"
            )


def _local_directory(source: str | Path) -> Path:
    """The directory itself, or the local copy of a hub repository."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; give the directory that holds config.json and *.safetensors")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise UserError(f"{source} does not exist; give a directory or a hub id such as HuggingFaceTB/SmolLM2-135M")
    return _download(source)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=[
                    "*.safetensors",
                    "*.safetensors.index.json",
                    "config.json",
                    *TOKENIZER_FILES,
                ],
            )
        )
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{hub_id} is neither a local directory nor a repository that could be fetched from the hub "
            f"({type(error).__name__}: {reason})"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist; a Hugging Face checkpoint directory holds config.json and *.safetensors"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} does not hold a JSON object")
    return values


def read_entries(directory: Path) -> dict[str, _Entry]:
    """Every tensor of the checkpoint, from the headers of its one or many safetensors files."""
    index = directory / "model.safetensors.index.json"
    if index.is_file() and not (directory / "model.safetensors").is_file():
        return _indexed_entries(directory, index)
    if (directory / "model.safetensors").is_file():
        return _file_entries(directory / "model.safetensors")
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    if pickles:
        raise UserError(
            f"{directory} holds {pickles[0]} but no safetensors; pickle files are not read because opening "
            "one can run code. Convert: AutoModelForCausalLM.from_pretrained(DIR)"
            ".save_pretrained(NEW_DIR)"
        )
    raise UserError(f"{directory} holds neither model.safetensors nor model.safetensors.index.json")


def _full_names(entries: dict[str, _Entry], embedding: str, prefix: str) -> dict[str, _Entry]:
    """The entries by full names: a checkpoint saved from the bare transformer (as GPT-2's own) lacks their start."""
    bare = embedding not in entries and embedding.removeprefix(prefix) in entries
    return {prefix + name: entry for name, entry in entries.items()} if bare else entries


def _indexed_entries(directory: Path, index: Path) -> dict[str, _Entry]:
    weight_map = _read_json(index).get("weight_map")
    named = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    if not named or not weight_map:
        raise UserError(f"{index} has no weight_map (tensor name -> file name)")
    entries: dict[str, _Entry] = {}
    for file_name in sorted(set(weight_map.values())):
        entries |= _file_entries(directory / file_name)
    for name, file_name in weight_map.items():
        if name not in entries or entries[name].file.name != file_name:
            raise UserError(f"{index} places {name} in {file_name}, which does not hold it")
    return entries


def _file_entries(file: Path) -> dict[str, _Entry]:
    """Tensors of one safetensors file; UserError when it is missing, truncated or corrupt."""
    header, data_bytes = _read_header(file)
    try:
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        entries = {name: _Entry(file, name, entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{file} is not a valid safetensors file: its header is malformed ({error!r})") from error
    if end != data_bytes:
        raise UserError(
            f"{file} is truncated or damaged: its header describes {end} bytes of tensors, "
            f"the file holds {data_bytes}; fetch it again"
        )
    return entries


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """JSON header of a safetensors file (8 bytes length, JSON, data) and the number of data bytes."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0] if size >= 8 else 0
            header = json.loads(opened.read(length)) if 0 < length <= min(_HEADER_LIMIT, size - 8) else None
    except FileNotFoundError:
        raise UserError(f"{file} does not exist, but the index names it; is the checkpoint complete?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a valid safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise UserError(f"{file} is truncated or not a safetensors file ({size} bytes)")
    return header, size - 8 - length


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (nearest: {near[0]})" if near else ""
