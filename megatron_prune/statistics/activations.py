"""The L2 norm of every input of a linear layer over the calibration tokens (what Wanda weighs by)."""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS_IN_FLOAT32 = 32
"""Squares of so many tokens are added in float32 before the sum goes on in float64, for speed."""


class InputNorm:
    """Accumulates the sum of squares of each input; the norm is over all tokens of all windows.

    Squares are taken in float32 (exact for bf16 activations) and summed in float64, so that the order of
    tokens, windows and ranks, and how inputs are sharded, does not reach the rounded float32 result.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.needed_tokens = 1
        """With fewer it says little."""
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Add one calibration window x [tokens, in], any floating dtype; an expert may get none of it."""
        self.tokens += x.shape[0]
        if not len(x):
            return
        squares = x.float().square() if x.dtype == torch.float32 else x.float().square_()
        rows = -(-x.shape[0] // TOKENS_IN_FLOAT32)
        first, *rest = squares.split(rows)
        for part in rest:  # elementwise, so that every input is summed alike wherever it stands
            first[: part.shape[0]] += part
        self._squares += first.sum(dim=0, dtype=torch.float64)

    def value(self) -> Tensor:
        """L2 norm of each input, float32 [in]; ones of no tokens: then no input counts more than another."""
        return self._squares.sqrt().float() if self.tokens else torch.ones_like(self._squares, dtype=torch.float32)

    def tensors(self) -> list[Tensor]:
        """The float64 accumulators to sum over ranks, in place."""
        return [self._squares, self.tokens]
