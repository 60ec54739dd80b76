"""Learnable N:M masks on a GPU through Triton: the same functions as the PyTorch and C paths of gumbel.py, with the
same noise. Imported for CUDA tensors; under Triton's interpreter (TRITON_INTERPRET=1) it takes CPU tensors too, which
is how it is tested without a GPU. The kernels are in gumbel_kernels.py, and in gumbel_wide_kernels.py for patterns of
many choices."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_prune.kernels import gumbel_kernels, gumbel_wide_kernels
from megatron_prune.kernels.gumbel import Call, pattern_bits

BLOCK = 128
"""Groups of one program, one for each of its threads."""
MAX_CHUNK = 8
"""Widest tile that is read or written at once, in values of a group; no more than that is read value by value."""

MOST_UNROLLED = 28
"""Choices of a pattern up to which kernels have them unrolled: 4:8, with 70, would take minutes to compile."""

WIDE_FROM = 2**31
"""Elements from which on they are counted in 64 bits, which is slower."""


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on tensors in CPU memory."""
    return not isinstance(gumbel_kernels.forward, triton.runtime.JITFunction)


def forward(weight: Tensor, logits: Tensor, call: Call) -> Tensor:
    """weight * mask, in the weight's dtype."""
    output = torch.empty_like(weight)
    _run(kernels(logits.shape[2]).forward, logits, call, (weight, output))
    return output


def backward(
    weight: Tensor,
    logits: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor | None,
    grad_logits: Tensor | None,
    add: bool,
    call: Call,
) -> None:
    """Fills grad_weight and fills or (add) adds to grad_logits, where they are wanted."""
    gradients = [grad_output if wanted is None else wanted for wanted in (grad_weight, grad_logits)]
    flags = {"WEIGHT": grad_weight is not None, "LOGITS": grad_logits is not None, "ADD": add}
    _run(
        kernels(logits.shape[2]).backward, logits, call, (weight, grad_output, *gradients, call.regularization), **flags
    )


def winners(logits: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """Index of the largest logit of each group, uint8 [out, groups]; the sums of their probabilities and
    of the entropies, float64 [2].
    """
    index = torch.empty(logits.shape[:2], dtype=torch.uint8, device=logits.device)
    sums = torch.empty(_programs(logits), 2, device=logits.device)
    known = constants(logits.shape[2]) | {"HARDWARE": on_nvidia()}
    _launch(kernels(logits.shape[2]).winners, logits, (logits, index, sums, index.numel(), sharpness), known)
    return index, sums.sum(0, dtype=torch.float64)


def _run(kernel: Any, logits: Tensor, call: Call, own: tuple[Any, ...], **flags: bool) -> None:
    """Launch a kernel with what all need to draw the masks, then the arguments and flags that are its own."""
    low, high = call.key or (0, 0)
    key = low | (high - ((high & 0x80000000) << 1)) << 32  # as int64: one type, so one compilation
    where = call.position
    arguments = (
        *(logits, where.row_ids.to(logits.device), logits.shape[0] * logits.shape[1], logits.shape[1]),
        *(where.first_group, where.groups_per_row, key, call.scale, 1.0 / call.temperature),
    )
    patterns = logits.shape[2]
    known = constants(patterns) | mask_constants(call, patterns) | flags
    bits = (_bits(call.n, call.m, logits.device),) if patterns > MOST_UNROLLED else ()
    _launch(kernel, logits, (*arguments, *own, *bits), known)


def _launch(kernel: Any, logits: Tensor, arguments: tuple[Any, ...], known: dict[str, Any]) -> None:
    elements = (_programs(logits) + 1) * BLOCK * max(logits.shape[2], 8)  # 8: inputs of a group, at most
    index = tl.int64 if elements >= WIDE_FROM else tl.int32
    if logits.numel():
        with torch.cuda.device_of(logits):
            kernel[(_programs(logits),)](*arguments, INDEX=index, **known, num_warps=BLOCK // 32)


def kernels(patterns: int) -> ModuleType:
    """Those for so many choices."""
    return gumbel_kernels if patterns <= MOST_UNROLLED else gumbel_wide_kernels


def constants(patterns: int) -> dict[str, Any]:
    """What every kernel knows when it is compiled."""
    known = {"P": patterns, "BLOCK": BLOCK}
    if patterns <= MOST_UNROLLED:
        known["P_LOAD"] = MAX_CHUNK if patterns > MAX_CHUNK else 1
    return known


def mask_constants(call: Call, patterns: int) -> dict[str, Any]:
    """What the kernels that draw masks know besides."""
    return _mask_constants(call.n, call.m, patterns, call.key is not None, call.hard)


@functools.cache
def _mask_constants(n: int, m: int, patterns: int, noise: bool, hard: bool) -> dict[str, Any]:
    """The same, made once for what it hangs on: a linear asks at every pass."""
    known = {"M": m, "NOISE": noise, "HARD": hard, "HARDWARE": on_nvidia()}
    if patterns > MOST_UNROLLED:
        return known | {"WIDTH": _chunk(m)}
    tiles = {"M_LOAD": _chunk(m) if patterns > MAX_CHUNK else 1, "M_CHUNK": _chunk(m), "P_CHUNK": _chunk(patterns)}
    return known | tiles | {"TABLE": _table(n, m)}


def on_nvidia() -> bool:
    """Whether kernels may use instructions of NVIDIA's."""
    return torch.version.cuda is not None and not interpreted()


def _programs(logits: Tensor) -> int:
    return int(triton.cdiv(logits.shape[0] * logits.shape[1], BLOCK))


def _chunk(width: int) -> int:
    return min(int(triton.next_power_of_2(width)), MAX_CHUNK)


@functools.cache
def _bits(n: int, m: int, device: torch.device) -> Tensor:
    """`pattern_bits` in the memory of the GPU."""
    return pattern_bits(n, m).to(device)


@functools.cache
def _table(n: int, m: int) -> int:
    """Bit 8 k + i is set where pattern k keeps input i."""
    return sum(bits << (8 * k) for k, bits in enumerate(pattern_bits(n, m).tolist()))
