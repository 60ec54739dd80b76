"""Hugging Face directories read and written with numpy alone, one tensor at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from typing_extensions import TypedDict

from megatron_prune.data.tokenizer_files import copy_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.files import new_folder, write_json
from megatron_prune.foreign import fenced, read_json
from megatron_prune.model.families import ModelConfig, family_of, get_family
from megatron_prune.model.pruning import write_pruning
from megatron_prune.schema import RelativeName, Word

MAX_SHARD_BYTES = 5_000_000_000
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WHAT = "a Hugging Face directory with config.json and safetensors"


class _Index(TypedDict):
    """What is read of the index of several files."""

    weight_map: dict[Word, RelativeName]


class HFDirectory:
    """The weights of a Hugging Face directory, checked against its config.json when opened."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        hf_config = read_json(directory / "config.json", _WHAT)
        self.config = family_of(hf_config).from_hf(hf_config)
        self._file = self._files()
        self._check()

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is stored."""
        with self._opened(name) as opened:
            _dtype(_FLOATS[opened.get_slice(name).get_dtype()])  # from here on numpy knows bfloat16
            array: np.ndarray = opened.get_tensor(name)
            return array

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """The file of a tensor; whatever is wrong with it is a UserError."""
        file = self._file[name]
        with fenced(f"cannot read {name} from {file}", "copy it again"), safe_open(file, framework="np") as opened:
            yield opened

    def _files(self) -> dict[str, Path]:
        """Tensor name -> file."""
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index, _WHAT, _Index)["weight_map"]
            return {name: self.directory / file for name, file in weight_map.items()}
        single = self.directory / "model.safetensors"
        with fenced(f"{self.directory} is not {_WHAT}", "give one"), safe_open(single, framework="np") as opened:
            return dict.fromkeys(opened.keys(), single)

    def _check(self) -> None:
        """Names, shapes and types, from the headers of the files."""
        family = get_family(self.config.family)
        maps = family.weights(self.config)
        shapes = {name: shape for map in maps for name, shape in zip(map.hf, map.shapes, strict=True)}
        unknown = set(self._file) - set(shapes) - set(family.tied_names(self.config))
        if unknown or set(shapes) - set(self._file):
            name = sorted(unknown or set(shapes) - set(self._file))[0]
            raise UserError(
                f"{self.directory} {'holds' if unknown else 'lacks'} {name}: its config.json is of another model"
            )
        for name, shape in shapes.items():
            with self._opened(name) as opened:
                about = opened.get_slice(name)
                found, dtype = tuple(about.get_shape()), about.get_dtype()
            if found != shape or dtype not in _FLOATS:
                raise UserError(
                    f"{name} in {self._file[name]} is {dtype} {list(found)}; config.json asks for {list(shape)} in "
                    f"{', '.join(_FLOATS)}"
                )


def write_directory(
    directory: Path,
    config: ModelConfig,
    weights: Iterator[tuple[str, np.ndarray]],
    tokenizer: Path,
    history: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ModelConfig:
    """Write a Hugging Face directory with tokenizer and generation config; `directory` must not exist.

    `weights` in model order, the output layer last: of a tied model it is left out where it still repeats the
    embedding, and else the model becomes one with an output layer of its own. `history`: as `write_pruning` takes it.
    Returns the config written.
    """
    family = get_family(config.family)
    names = {name for map in family.weights(config) for name in map.hf}
    dtype = _dtype(config.dtype)
    with new_folder(directory) as folder:
        shards: list[list[str]] = []
        shard: dict[str, np.ndarray] = {}
        embedding = None
        for name, array in weights:
            values = array.astype(dtype)
            embedding = values if embedding is None else embedding
            if name not in names:  # the output layer of a tied model
                if np.array_equal(values, embedding):
                    continue
                config = replace(config, tie_word_embeddings=False)
            if shard and sum(part.nbytes for part in shard.values()) + values.nbytes > max_shard_bytes:
                _save(folder, shards, shard)
                shard = {}
            shard[name] = values
        _save(folder, shards, shard)
        _name(folder, shards)
        write_json(folder / "config.json", family.to_hf(config))
        copy_tokenizer(tokenizer, folder)
        write_pruning(folder, history or {})
    return config


def _save(folder: Path, shards: list[list[str]], shard: dict[str, np.ndarray]) -> None:
    save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
    shards.append(list(shard))


def _name(folder: Path, shards: list[list[str]]) -> None:
    """Final names, and the index of several files."""
    if len(shards) == 1:
        os.replace(folder / "shard-0", folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{number}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    size = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    content = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", content)


def _dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)
