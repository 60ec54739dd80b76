"""Weights in FP8 with a scale for each block, as DeepSeek-V3 and Kimi-K2 are published, read as what they stand for, in
bfloat16, which has room for any of the numbers and rounds their products with the scales.

    NAME              [out, in] float8 (e4m3)
    NAME_scale_inv    [ceil(out / rows), ceil(in / columns)] float32: a number is its code times that of its block

`weight_block_size` of config.json says how large a block is; those at the ends of rows and columns may be smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_prune.errors import UserError, brief, shown
from megatron_prune.model import quantised
from megatron_prune.model.stored import Entry

METHOD = "fp8"
_SCALES = "_scale_inv"
_KEY = "weight_block_size"


class Block(NamedTuple):
    """Rows and columns of a weight that share a scale."""

    rows: int
    columns: int


def dequantised(codes: Tensor, scales: Tensor, block: Block) -> Tensor:
    """`[out, in]` bfloat16 of codes `[out, in]` float8 and a scale for each block."""
    rows, columns = codes.shape
    wide = scales.float().repeat_interleave(block.rows, dim=0)[:rows].repeat_interleave(block.columns, dim=1)
    return (codes.float() * wide[:, :columns]).to(torch.bfloat16)


def block_of(hf_config: Mapping[str, Any]) -> Block | None:
    """The size of blocks, where config.json says that weights are in FP8 with a scale for each; UserError for none."""
    about = hf_config.get(quantised.KEY)
    if not isinstance(about, Mapping) or about.get("quant_method") != METHOD or about.get(_KEY) is None:
        return None
    match about[_KEY]:
        case [int(rows), int(columns)] if rows > 0 and columns > 0 and bool not in map(type, about[_KEY]):
            return Block(rows, columns)
    raise UserError(f"config.json gives {_KEY} = {brief(about[_KEY])}; it must be two whole numbers of at least 1")


def plain_entries(directory: Path, entries: Mapping[str, Entry], block: Block) -> dict[str, Entry]:
    """The same with one entry for codes and scales of a weight; UserError for half of one."""
    found = {name: entry for name, entry in entries.items() if not name.endswith(_SCALES)}
    for name in sorted(entries.keys() - found.keys()):
        scales, codes = entries[name], entries.get(name.removesuffix(_SCALES))
        if codes is None:
            raise UserError(f"{directory} has {shown(name)} without its weight: fetch it again")
        blocks = tuple(-(-size // each) for size, each in zip(codes.shape, block, strict=False))
        if (
            codes.dtype != "F8_E4M3"
            or len(codes.shape) != len(block)
            or (scales.dtype, scales.shape) != ("F32", blocks)
        ):
            raise UserError(
                f"{shown(codes.name)} in {codes.file}: {shown(codes.dtype)} {brief(list(codes.shape))} and "
                f"{shown(scales.dtype)} {brief(list(scales.shape))}; allowed: F8_E4M3 of two dimensions and F32, one "
                f"for each {block.rows} x {block.columns} of it: fetch it again"
            )
        found[codes.name] = replace(codes, dtype="BF16", scales=scales)
    return found
