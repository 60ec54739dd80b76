"""Masks for models in MaxText: read from a mask .npz, and what they say of a tree of parameters.

The format is that of `export --format mask-npz` (`decision.mask_npz`). A file beside a MaxText model has the mask of
every prunable weight, and padding counts as removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from megatron_prune.decision.mask_npz import MOST_PATTERN, PATTERN, SHAPE, write_masks
from megatron_prune.errors import UserError, brief
from megatron_prune.maxtext.layout import Leaf, kernel, masked_leaves, places, shapes, weight_shape
from megatron_prune.model.families import ModelConfig
from megatron_prune.npz import Npz


class PackedMasks(Mapping[str, np.ndarray]):
    """Bool masks by Hugging Face weight name, held as bits; UserError unless each prunable weight has one."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._shapes = prunable_shapes(config)
        self._bits: dict[str, np.ndarray] = {}
        with Npz(path, "a mask .npz (export --format mask-npz makes one)") as archive:
            self.pattern = archive.text(PATTERN, MOST_PATTERN) if PATTERN in archive else None
            extra = set(archive.names()) - {name + end for name in self._shapes for end in ("", SHAPE)} - {PATTERN}
            if extra:
                raise UserError(f"{path} holds {brief(sorted(extra)[0])}, which is not a prunable weight of this model")
            for name, shape in self._shapes.items():
                if name not in archive:
                    raise UserError(f"{path} lacks the mask of {name}")
                self._bits[name] = _bits(f"{path}: {name}", archive, name, shape)

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        return np.unpackbits(self._bits[name], count=math.prod(shape)).astype(bool).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def save(self, path: Path) -> None:
        """Write them as a mask .npz."""
        write_masks(path, self.items(), self.pattern)


def prunable_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every weight that masks apply to."""
    return {name: weight_shape(leaf, config) for leaf in masked_leaves(config) for name, _ in places(leaf, config)}


def stacked(leaf: Leaf, masks: Mapping[str, np.ndarray], config: ModelConfig) -> np.ndarray:
    """The masks of every layer, and expert, in the shape of the tree's array."""
    array = np.empty(shapes(config)[leaf.path], bool)
    for name, place in places(leaf, config):
        array[place] = kernel(leaf, masks[name], config)
    return array


def _bits(where: str, archive: Npz, name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = archive.array(name, 8 * math.prod(shape))
    stated = tuple(archive.array(name + SHAPE, 64).reshape(-1).tolist()) if name + SHAPE in archive else shape
    if stated != shape or array.dtype != np.uint8 or array.size != -(-math.prod(shape) // 8):
        raise UserError(f"{where} is {array.dtype} of {array.size}, shape {list(stated)}; the weight is {list(shape)}")
    return array
