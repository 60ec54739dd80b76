"""Experts' weights in MXFP4, as gpt-oss is published, read as what they stand for, in bfloat16, which has room for it.

By the Open Compute Project's Microscaling Formats 1.0 (5.3.3, 5.4.1) 32 numbers share a power of two, 2^(byte - 127),
and a number is a float of 4 bits (e2m1: sign, two bits of exponent, one of mantissa). Of all experts of a layer, the
first of two numbers in the low half of a byte:

    NAME_blocks   [experts, out, in / 32, 16] bytes
    NAME_scales   [experts, out, in / 32] bytes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.errors import UserError, brief, shown
from megatron_prune.model import quantised
from megatron_prune.model.stored import Entry

BLOCK = 32
METHOD = "mxfp4"
_CODES, _SCALES = "_blocks", "_scales"
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""Values of the codes 0 to 7; the codes from 8 on are their negatives."""


def fp4_values(codes: Tensor) -> Tensor:
    """Bytes `[..., n]` -> the floats of 4 bits in them, `[..., 2 n]` float32."""
    return torch.cat([FP4, -FP4])[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()]


def dequantised(codes: Tensor, scales: Tensor) -> Tensor:
    """`[..., 32 n]` bfloat16 of codes `[..., n, 16]` and scales `[..., n]`, both bytes."""
    return torch.ldexp(fp4_values(codes), scales.int()[..., None] - 127).flatten(-2).to(torch.bfloat16)


class PackedExperts:
    """The weights of all experts of a layer, as `Part` takes them: an expert `[in, out]` at a time."""

    def __init__(self, codes: Any, scales: Any) -> None:
        """Two tensors in files, of which is read what is sliced."""
        self.codes = codes
        self.scales = scales

    def __getitem__(self, expert: int) -> Tensor:
        return dequantised(self.codes[expert], self.scales[expert]).t()


def is_packed(hf_config: Mapping[str, Any]) -> bool:
    """Whether config.json says that weights are in MXFP4."""
    about = hf_config.get(quantised.KEY)
    return isinstance(about, Mapping) and about.get("quant_method") == METHOD


def plain_entries(directory: Path, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The same with one entry, of the weight `[experts, in, out]`, for codes and scales; UserError for half of one."""
    found = {name: entry for name, entry in entries.items() if not name.endswith((_CODES, _SCALES))}
    for name in sorted(entries.keys() - found.keys()):
        start = name.removesuffix(_CODES).removesuffix(_SCALES)
        codes, scales = entries.get(start + _CODES), entries.get(start + _SCALES)
        if codes is None or scales is None:
            raise UserError(f"{directory} has {shown(name)} alone; {_CODES} and {_SCALES} go together: fetch it again")
        shape = codes.shape
        if {codes.dtype, scales.dtype} != {"U8"} or len(shape) != 4 or (*scales.shape, BLOCK // 2) != shape:
            raise UserError(
                f"{shown(start)} in {codes.file}: {shown(codes.dtype)} {brief(list(shape))} and {shown(scales.dtype)} "
                f"{brief(list(scales.shape))}; allowed: U8 [experts, out, in / {BLOCK}, {BLOCK // 2}] and the same "
                "without the last dimension: fetch it again"
            )
        found[start] = replace(codes, dtype="BF16", shape=(shape[0], shape[2] * BLOCK, shape[1]), scales=scales)
    return found
