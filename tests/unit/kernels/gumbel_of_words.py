"""The noise that Triton's kernels make of given random words, for tests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_prune.kernels.gumbel_kernels import _gumbel
from megatron_prune.kernels.triton_gumbel import on_nvidia


@triton.jit
def kernel(words, output, size, BLOCK: tl.constexpr, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + lane, mask=lane < size, other=0).to(tl.uint32)
    tl.store(output + lane, _gumbel(word, HARDWARE), mask=lane < size)


def gumbel_of_words(words: Tensor) -> Tensor:
    """fp32 noise of 32-bit words held in int64."""
    output = torch.empty(words.shape, device=words.device)
    kernel[(triton.cdiv(len(words), 256),)](words, output, len(words), BLOCK=256, HARDWARE=on_nvidia())
    return output
