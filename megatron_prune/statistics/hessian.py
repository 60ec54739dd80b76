"""The second-order statistic of a linear layer's inputs: H = 2 X^T X / tokens (what SparseGPT solves with).

H is the Hessian of the layer's squared output error, the same for every output row. Memory is 8 bytes times
the square of the input width while accumulating: 134 MB at 4096, 6.6 GB at 28672.

Only the tiles on and above the diagonal are computed. On processors with bf16 instructions bf16 activations
are multiplied by them: products of bf16 numbers are exact, sums are float32. Together 3.5 times faster at
1536. Products of float32 are oneDNN's where torch's are slower (kernels/products.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.kernels.memory import expect_writes
from megatron_prune.kernels.products import fast_products

TILE_CPU = 256
TILE_GPU = 2048

WIDE_PRODUCTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
"""This PyTorch multiplies bf16 matrices on a GPU into a float32 result."""


class Hessian:
    """Accumulates X^T X: each window in float32, windows in float64.

    Of fewer tokens than inputs it is singular before it is damped.

    The float64 sum keeps the order of windows and ranks out of the rounded float32 result.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.needed_tokens = in_features
        """With fewer it is singular."""
        fresh = torch.empty(in_features, in_features, dtype=torch.float64, device=device)
        self._gram = expect_writes(fresh).zero_()

    def update(self, x: Tensor) -> None:
        """Add one calibration window x [tokens, in], any floating dtype; an expert may get none of it."""
        self.tokens += x.shape[0]
        if not len(x):
            return
        tile = TILE_GPU if x.is_cuda else TILE_CPU
        turned = x.t() if x.is_cuda else x.t().float().contiguous()
        with torch.no_grad(), exact_bf16_products(x) or fast_products():
            for first in range(0, x.shape[1], tile):
                band = product(turned[first : first + tile], turned[first:])
                self._gram[first : first + tile, first:] += band

    def value(self) -> Tensor:
        """H = 2 X^T X / tokens, float32 [in, in], exactly symmetric.

        The identity of no tokens: then no input counts more than another, and nothing makes up for what is removed.
        """
        if not self.tokens:
            return torch.eye(len(self._gram), device=self._gram.device)
        scale = 2.0 / self.tokens.clamp(min=1.0)
        whole = expect_writes(torch.empty_like(self._gram, dtype=torch.float32))
        for first in range(0, len(whole), TILE_CPU):
            last = first + TILE_CPU
            band = (self._gram[first:last, first:] * scale).float()
            whole[first:, first:last] = band.t()
            whole[first:last, first:] = band
            whole[first:last, first:last].triu_().add_(band[:, :TILE_CPU].triu(1).t())
        return whole

    def tensors(self) -> list[Tensor]:
        """The float64 accumulators to sum over ranks, in place."""
        return [self._gram, self.tokens]


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T, float32 [a, b] of [a, tokens] and [b, tokens]; a bf16 result would have 8 bits."""
    if WIDE_PRODUCTS and left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right.t(), out_dtype=torch.float32)
    return F.linear(left.float(), right.float())


def has_bf16_products() -> bool:
    """Whether this processor multiplies bf16 itself and this PyTorch (2.10 on) tells so and can be asked to."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    return capabilities is not None and bool(capabilities().get("avx512_bf16", False))


def exact_bf16_products(x: Tensor) -> AbstractContextManager[None] | None:
    """While active CPU products of float32 round operands to bf16; None where that is not exact, or not faster."""
    exact = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return _bf16_products() if exact and has_bf16_products() else None


@contextmanager
def _bf16_products() -> Iterator[None]:
    precision = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
    before = precision.fp32_precision
    precision.fp32_precision = "bf16"
    try:
        yield
    finally:
        precision.fp32_precision = before
