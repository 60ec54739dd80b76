"""Masks of a decision as one portable .npz (`decision.mask_npz` says what is in it), and such files read.

Reading also takes plain bool or 0/1 arrays in the weight's shape, and packed bits whose shape entry is left out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_prune.claims import refuse_existing
from megatron_prune.decision.mask_npz import MOST_PATTERN, PATTERN, SHAPE, write_masks
from megatron_prune.decision.masks import Masks, check_mask, prunable_shapes, unpack_mask
from megatron_prune.decision.target import Target, parse_target
from megatron_prune.errors import UserError, brief
from megatron_prune.model.families import ModelConfig, get_family
from megatron_prune.npz import MOST_HEADER, Npz

WHAT = "a mask .npz"
MOST_PACKED = 64
"""Times that a mask may be as large as the file that it is packed in."""
MOST_SHAPE = 64
"""Bytes of an array that tells a shape."""


def save_mask_npz(path: Path, masks: Masks) -> None:
    """Write a decision as one .npz, one mask in memory at a time; refuses an existing file, atomic."""
    refuse_existing(path, "mask file")
    write_masks(path, ((name, masks.get(name).numpy()) for name in masks.names()), masks.info.target)


def load_mask_npz(path: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Name and bool mask [out, in] of every prunable weight of the model, in model order, one at a time.

    UserError at once for a file that is none, or that names unknown weights or lacks some; and while reading
    for a wrong shape or type, damage, and a mask that breaks the pattern the file claims.
    """
    shapes = prunable_shapes(config)
    archive = Npz(path, WHAT)
    try:
        _check_names(path, set(archive.names()), shapes)
        target = parse_target(archive.text(PATTERN, MOST_PATTERN)) if PATTERN in archive else None
    except BaseException:
        archive.close()
        raise
    return _masks(path, archive, config, target)


def mask_npz_pattern(path: Path) -> str | None:
    """The pattern the file claims, such as ``2:4``; None when it does not say."""
    with Npz(path, WHAT) as archive:
        return archive.text(PATTERN, MOST_PATTERN) if PATTERN in archive else None


def mask_npz_kept(path: Path) -> tuple[int, int]:
    """How many weights the file keeps, and how many it is about; arrays of one element for each weight count, too."""
    kept = size = 0
    most = MOST_HEADER + MOST_PACKED * path.stat().st_size
    with Npz(path, WHAT) as archive:
        names = set(archive.names())
        for name in sorted(names - {PATTERN} - {name + SHAPE for name in names}):
            array, shape = archive.array(name, most), name + SHAPE
            count = math.prod(archive.array(shape, MOST_SHAPE).reshape(-1).tolist()) if shape in names else array.size
            if array.size == -(-count // 8) and array.dtype == np.uint8 and shape in names:
                array = np.unpackbits(array.reshape(-1), count=count)
            if array.size != count or array.dtype.kind not in "bui":
                raise UserError(f"{path}: {brief(name)} is no mask of {brief(count)} weights: export the masks again")
            kept, size = kept + int(np.count_nonzero(array)), size + count
    return kept, size


def _check_names(path: Path, names: set[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    known = {PATTERN, *shapes, *(name + SHAPE for name in shapes)}
    for name in sorted(names - known):
        near = difflib.get_close_matches(name, shapes, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise UserError(f"{path} holds {brief(name)}, which is not a prunable weight of this model{hint}")
    missing = [name for name in shapes if name not in names]
    if missing:
        raise UserError(f"{path} lacks the masks of {len(missing)} weights of this model, the first is {missing[0]}")


def _masks(path: Path, archive: Npz, config: ModelConfig, target: Target | None) -> Iterator[tuple[str, Tensor]]:
    with archive:
        for name, shape in prunable_shapes(config).items():
            stated = archive.array(name + SHAPE, MOST_SHAPE) if name + SHAPE in archive else None
            mask = _mask(f"{path}: {name}", archive.array(name, 8 * math.prod(shape)), stated, shape)
            if target is not None:
                check_mask(get_family(config.family).as_rows(mask), target, name)
            yield name, mask


def _mask(where: str, array: np.ndarray, stated: np.ndarray | None, shape: tuple[int, ...]) -> Tensor:
    """An array of the file -> bool ``shape``: packed bits, or one element for each weight."""
    if stated is not None and tuple(stated.reshape(-1).tolist()) != shape:
        raise UserError(f"{where} is a mask of shape {brief(stated.tolist())}; the weight is {list(shape)}")
    if array.dtype not in (np.bool_, np.uint8, np.int8):
        raise UserError(f"{where} has dtype {array.dtype}; masks are bool, 0/1 bytes or packed bits (uint8)")
    if array.shape == shape:
        if array.max(initial=0) > 1 or array.min(initial=0) < 0:
            raise UserError(f"{where} holds values other than 0 and 1")
        return torch.from_numpy(array.astype(np.bool_))
    packed_bytes = -(-int(np.prod(shape)) // 8)
    if array.dtype == np.uint8 and array.size == packed_bytes:
        return unpack_mask(array, shape)
    raise UserError(f"{where} has shape {list(array.shape)}; expected {list(shape)} or {packed_bytes} packed bytes")
