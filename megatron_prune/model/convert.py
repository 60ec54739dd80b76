"""Hugging Face tensors <-> Megatron tensors: pure functions driven by a ``WeightMap``, and a reader of
safetensors checkpoints that holds one tensor at a time. Every function works on weights, on bool masks and on
1-D row numbers.

    linear_qkv (2 query groups, 2 heads each)        linear_fc1, TP = 2
    unsharded rows: q0 q1 k0 v0 | q2 q3 k1 v1        unsharded: gate0 gate1 up0 up1
    rank 0 of 2:    q0 q1 k0 v0                      rank 0:    gate0 up0      rank 1: gate1 up1
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_prune.data.tokenizer_files import TOKENIZER_FILES
from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import fenced, read_json, reason
from megatron_prune.model import carried, fp8_blocks, given, mxfp4, pruning, quantised
from megatron_prune.model.families import ModelConfig, WeightMap, dimensions, family_of, get_family
from megatron_prune.model.mxfp4 import PackedExperts
from megatron_prune.model.published import (
    ADAPTER,
    check_directory,
    check_names,
    check_tensors,
    missing,
    nearest,
    plain_entries,
)
from megatron_prune.model.stored import Entry, read_entries

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WHAT = "a Hugging Face checkpoint"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


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


def experts_together(config: ModelConfig, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights by their Hugging Face names -> the same with those of all experts of a layer in one tensor each.

    A tensor is given as soon as all of its parts have come.
    """
    maps = get_family(config.family).weights(config)
    places = {name: (place, part) for map in maps for name, place, part in map.fused()}
    shapes = {place: shape for map in maps for place, shape in map.fused_shapes(config).items()}
    whole: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for name, tensor in weights:
        if name not in places:
            yield name, tensor
            continue
        place, part = places[name]
        if place not in whole:
            whole[place] = tensor.new_empty(shapes[place])
            missing[place] = whole[place].numel()
        part.of(whole[place]).copy_(tensor)
        missing[place] -= tensor.numel()
        if not missing[place]:
            yield place, whole.pop(place)
    assert not whole, f"parts of {sorted(whole)[:3]} did not come"


def _pad_rows(tensor: Tensor, count: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])]) if count else tensor


def _check_divisible(map: WeightMap, size: int, tp_size: int) -> None:
    units = size // map.shard_unit if not map.pad_rows else size
    if units % tp_size:
        raise UserError(
            f"tensor-model-parallel-size {tp_size} does not divide {map.megatron} into equal parts: it has "
            f"{units} {'query groups' if map.shard_unit > 1 else 'channels'}; choose a divisor of {units}"
        )


class HFReader:
    """A Hugging Face checkpoint (directory or hub id), checked when opened, read one tensor at a time.

    Only safetensors is read. Opening reads the file headers alone and raises UserError for a missing
    directory, file or tensor, a shape that contradicts config.json, an unknown tensor, and a truncated or
    corrupt file.
    """

    in_mxfp4 = False
    """Experts are in MXFP4, and what is read of them is bfloat16."""
    in_fp8: fp8_blocks.Block | None = None
    """Weights are in FP8 with a scale for each such block, and what is read of them is bfloat16."""
    configs: ClassVar[tuple[str, ...]] = ("config.json",)
    """Files that the sizes come from."""

    def __init__(self, source: str | Path) -> None:
        self.directory = local_directory(source)
        self._check_directory()
        if not os.path.lexists(self.directory / "config.json"):
            raise given.wrong(self.directory, "hugging face")
        self.config = self._read_config()
        self._entries = self._read_entries()
        with located(self.directory):
            self.model_config = self._model_config()
        family = get_family(self.model_config.family)
        self._maps = family.weights(self.model_config)
        self._entries = plain_entries(self.directory, self._entries, family, self.model_config)
        self._check_tensors()

    def names(self) -> list[str]:
        """Hugging Face names of the weights the model needs, in model order."""
        return [name for map in self._maps for name in map.hf]

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, in the dtype it is stored in."""
        return self._read(name)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last``, that one not included, of the tensor ``name``; nothing else of it is read."""
        return self._read(name, lambda whole: whole[first:last])

    def left_behind(self) -> str | None:
        """One line about what of the directory does not come along to a checkpoint or an export."""
        known = {*self.names(), *get_family(self.model_config.family).tied_names(self.model_config)}
        buffers = sorted(name for name in self._entries if name not in known)
        return carried.told(self.directory, self.config, self.configs, buffers)

    def _check_directory(self) -> None:
        """UserError for files that make it another thing than a plain model."""
        check_directory(self.directory)

    def _read_config(self) -> dict[str, Any]:
        """What config.json says of the model."""
        config: dict[str, Any] = read_json(self.directory / "config.json", _WHAT)
        self.in_mxfp4 = mxfp4.is_packed(config) and family_of(config).alternating
        with located(self.directory):
            block = fp8_blocks.block_of(config)
        self.in_fp8 = block if block and family_of(config).fp8_blocks else None
        plain = self.in_mxfp4 or self.in_fp8
        return {key: value for key, value in config.items() if key != quantised.KEY} if plain else config

    def _read_entries(self) -> dict[str, Entry]:
        """The tensors by the names and types that they have as plain weights."""
        entries = read_entries(self.directory)
        if self.in_mxfp4:
            entries = mxfp4.plain_entries(self.directory, entries)
        if self.in_fp8:
            entries = fp8_blocks.plain_entries(self.directory, entries, self.in_fp8)
        check_tensors(self.directory, entries)
        return entries

    def _read(self, name: str, part: Callable[[Any], Any] | None = None) -> Tensor:
        if name not in self._entries:
            raise UserError(f"{self.directory} has no tensor {name}{nearest(name, self._entries)}")
        entry = self._entries[name]
        with fenced(f"cannot read {name} from {entry.file}", "fetch it again"), safe_open(entry.file, "pt") as opened:
            if entry.scales is not None and self.in_fp8:
                tensor = self._of_blocks(opened.get_tensor(entry.name), entry.scales)
                return tensor if part is None else part(tensor)
            if entry.part is None:
                return opened.get_tensor(entry.name) if part is None else part(opened.get_slice(entry.name))
            whole = opened.get_slice(entry.name)
            if entry.scales is None:
                tensor = entry.part.of(whole)
            else:
                with safe_open(entry.scales.file, "pt") as beside:
                    tensor = entry.part.of(PackedExperts(whole, beside.get_slice(entry.scales.name)))
            return (tensor if part is None else part(tensor)).contiguous()

    def _of_blocks(self, codes: Tensor, scales: Entry) -> Tensor:
        assert self.in_fp8 is not None
        with safe_open(scales.file, "pt") as beside:
            return fp8_blocks.dequantised(codes, beside.get_tensor(scales.name), self.in_fp8)

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
        beyond = [name for name in self._entries if family.beyond(name, self.model_config)]
        check_names(self._entries, {*self.names(), *tied, *beyond}, family)
        for name in set(tied) & set(self._entries):
            self._check_tied(name, self._maps[0].hf[0])

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._entries:
            family = get_family(self.model_config.family)
            raise UserError(missing(self.directory, name, self._entries, family, self.config))
        entry = self._entries[name]
        if entry.shape != shape:
            raise UserError(
                f"{name} in {entry.file} has shape {brief(list(entry.shape))}; config.json asks for {list(shape)}: "
                "one of the two is of another model, fetch both again"
            )
        if entry.dtype not in _FLOATS:
            raise UserError(
                f"{name} in {entry.file} has dtype {brief(entry.dtype)[1:-1]}; supported: {', '.join(_FLOATS)}: save "
                "the model in one of them (dtype=torch.bfloat16), or give the unquantised one if it is quantised"
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


def local_directory(source: str | Path) -> Path:
    """The directory itself, or the local copy of a hub repository."""
    path = Path(source)
    if path.is_dir():
        return path
    if os.path.lexists(path):
        raise given.wrong(path, "hugging face")
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
                    ADAPTER,
                    pruning.FILE,
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
        raise UserError(
            f"{hub_id} is neither a local directory nor a repository that could be fetched from the hub "
            f"({type(error).__name__}: {reason(error)})"
        ) from error


@contextlib.contextmanager
def located(directory: Path) -> Iterator[None]:
    """While active, a UserError about config.json says whose."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"^config\.json", lambda _: str(directory / "config.json"), str(error))) from error
