"""The sweep of the second-order solver on a GPU through Triton: the same function as the PyTorch and C paths of
second_order.py. Imported for CUDA tensors; under Triton's interpreter (TRITON_INTERPRET=1) it takes CPU tensors too,
which is how it is tested without a GPU. The kernels are in second_order_kernels.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_prune.kernels import second_order_kernels as kernels
from megatron_prune.kernels.second_order import Factor

ROWS = 16
"""Rows of one program of `inside`."""
WARPS = 4
TILE = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32}
"""What one program of `behind` computes, and how many columns of the block it takes at a time."""


def sweep(weight: Tensor, mask: Tensor, factor: Factor, first: int, last: int, n: int, m: int) -> None:
    """`second_order.sweep` of contiguous tensors on a GPU."""
    rows, columns = weight.shape
    if not rows:
        return
    width = max(int(triton.next_power_of_2(last - first)), TILE["DEPTH"])
    errors = weight.new_empty(rows, width)
    sizes = (rows, columns, first, last)
    with torch.cuda.device_of(weight):
        flags = mask.view(torch.uint8), factor.live.view(torch.uint8)
        kernels.inside[(triton.cdiv(rows, ROWS),)](
            *(weight, flags[0], factor.upper, flags[1], errors, *sizes),
            **{"N": n, "M": m, "ROWS": ROWS, "WIDTH": width, "num_warps": WARPS},
        )
        if last < columns:
            tiles = (triton.cdiv(rows, TILE["ROWS"]), triton.cdiv(columns - last, TILE["COLUMNS"]))
            kernels.behind[tiles](weight, factor.upper, errors, *sizes, WIDTH=width, **TILE, num_warps=WARPS)
