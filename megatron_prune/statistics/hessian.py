"""The second-order statistic of a linear layer's inputs: H = 2 X^T X / tokens (what SparseGPT solves with).

H is the Hessian of the layer's squared output error, the same for every output row. Memory is 8 bytes times
the square of the input width while accumulating: 134 MB at 4096, 6.6 GB at 28672.

Only the tiles on and above the diagonal are computed. On processors with bf16 instructions bf16 activations
are multiplied by them: products of bf16 numbers are exact, sums are float32. Together 3.5 times faster at
1536.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TILE_CPU = 256
TILE_GPU = 2048

WIDE_PRODUCTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
"""This PyTorch multiplies bf16 matrices on a GPU into a float32 result."""


class Hessian:
    """Accumulates X^T X: each window in float32, windows in float64.

    The float64 sum keeps the order of windows and ranks out of the rounded float32 result.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self._gram = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Add one calibration window x [tokens, in], any floating dtype."""
        self.tokens += x.shape[0]
        tile = TILE_GPU if x.is_cuda else TILE_CPU
        operand = x if x.is_cuda else x.float()
        with exact_bf16_products(x):
            for first in range(0, x.shape[1], tile):
                band = product(operand[:, first : first + tile], operand[:, first:])
                self._gram[first : first + tile, first:] += band

    def value(self) -> Tensor:
        """H = 2 X^T X / tokens, float32 [in, in], exactly symmetric; zeros before the first token."""
        upper = (self._gram * (2.0 / self.tokens.clamp(min=1.0))).float().triu_()
        return upper + upper.triu(1).t()

    def tensors(self) -> list[Tensor]:
        """The float64 accumulators to sum over ranks, in place."""
        return [self._gram, self.tokens]


def product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, float32 [a, b] of [tokens, a] and [tokens, b]; a bf16 result would have 8 bits."""
    if WIDE_PRODUCTS and left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.float().t() @ right.float()


def has_bf16_products() -> bool:
    """Whether this processor multiplies bf16 itself and this PyTorch (2.10 on) tells so and can be asked to."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    return capabilities is not None and bool(capabilities().get("avx512_bf16", False))


@contextmanager
def exact_bf16_products(x: Tensor) -> Iterator[None]:
    """While active, CPU products of float32 may round operands to bf16: exact when those come from bf16."""
    if x.is_cuda or x.dtype != torch.bfloat16 or not has_bf16_products():
        yield
        return
    precision = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
    before = precision.fp32_precision
    precision.fp32_precision = "bf16"
    try:
        yield
    finally:
        precision.fp32_precision = before
