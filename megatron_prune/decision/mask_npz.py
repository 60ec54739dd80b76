"""The portable .npz of masks, without PyTorch: what is in it, and its writer. numpy alone reads it, without pickle.

    "model.layers.0.self_attn.q_proj.weight"        uint8 [ceil(out * in / 8)]: numpy.packbits of the mask
    "model.layers.0.self_attn.q_proj.weight.shape"  int64 [2]: out, in; for GPT-2 in, out, as its weights are
    "__pattern__"                                   text: "2:4" (2 kept of 4) or a sparsity such as "0.5"; may be absent

``numpy.unpackbits(bits, count=out * in).reshape(out, in)`` gives 1 = kept.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_prune.files import new_file, own_file

SHAPE = ".shape"
PATTERN = "__pattern__"
MOST_PATTERN = 20_000_000
"""Bytes of the array of a pattern, which may name every weight that it leaves dense."""


def write_masks(path: Path, masks: Iterable[tuple[str, np.ndarray]], pattern: str | None, anew: bool = False) -> None:
    """Write bool masks by Hugging Face weight name, one in memory at a time; `path` appears whole or not at all.

    `anew`: one of our own is replaced.
    """
    with (
        own_file(path) if anew else new_file(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        if pattern is not None:
            _write(archive, PATTERN, np.array(pattern))
        for name, mask in masks:
            _write(archive, name, np.packbits(mask.reshape(-1)))
            _write(archive, name + SHAPE, np.array(mask.shape, np.int64))


def _write(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(name + ".npy", "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)
