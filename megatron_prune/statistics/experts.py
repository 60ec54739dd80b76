"""What the experts of a layer do over the calibration tokens: how many they get, and how much they add for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class ExpertActivity:
    """Of every expert of a layer, sums over the tokens that are sent to it, float64 `[experts]`.

    They are the router's own choices and gates: renormalised where the model does so.
    """

    def __init__(self, experts: int, device: torch.device | str | None = None) -> None:
        self.sums = torch.zeros(4, experts, dtype=torch.float64, device=device)

    def update(self, counts: Tensor, gates: Tensor, outputs: Tensor) -> None:
        """Add some tokens, sorted by expert: `counts [experts]`, gates `[tokens]`, gated outputs `[tokens, hidden]`."""
        owner = torch.repeat_interleave(torch.arange(len(counts), device=gates.device), counts.to(gates.device))
        gated, gates = torch.linalg.vector_norm(outputs.float(), dim=-1).double(), gates.double()
        plain = torch.where(gates > 0, gated / gates.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        for total, values in zip(self.sums, (torch.ones_like(gates), gates, gated, plain), strict=True):
            total.index_add_(0, owner, values)

    @property
    def tokens(self) -> Tensor:
        """Tokens that each expert gets."""
        return self.sums[0]

    @property
    def gates(self) -> Tensor:
        """Sum of its gates."""
        return self.sums[1]

    @property
    def gated_norms(self) -> Tensor:
        """Sum of gate times Euclidean norm of what it gives: of what reaches the residual stream."""
        return self.sums[2]

    @property
    def norms(self) -> Tensor:
        """Sum of the Euclidean norms of what it gives."""
        return self.sums[3]

    def tensors(self) -> list[Tensor]:
        """The float64 accumulators to sum over ranks, in place."""
        return [self.sums]


class ExpertLikeness:
    """How alike the experts of a layer are, were every token sent to each of them (REAM, see `statistics/merging.py`).

    Sums over tokens, float64: of what each gives, times its gate, `[experts, hidden]`; products of the router's logits
    `[experts, experts]`.
    """

    def __init__(self, experts: int, hidden: int, device: torch.device | str | None = None) -> None:
        self.outputs = torch.zeros(experts, hidden, dtype=torch.float64, device=device)
        self.logits = torch.zeros(experts, experts, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, outputs: Iterable[Tensor]) -> None:
        """Add some tokens: logits `[tokens, experts]`, and expert by expert gated outputs `[tokens, hidden]`."""
        wide = logits.double()
        self.logits += wide.t() @ wide
        for total, output in zip(self.outputs, outputs, strict=True):
            total += output.sum(0, dtype=torch.float64)

    def value(self) -> Tensor:
        """The mean of both cosines, float64 `[experts, experts]`; one with a vector of length 0 is 0."""
        pairs = [self.outputs @ self.outputs.t(), self.logits]
        return torch.stack([cosines(x, x.diagonal(), x.diagonal()) for x in pairs]).mean(0)

    def tensors(self) -> list[Tensor]:
        """The float64 accumulators to sum over ranks, in place."""
        return [self.outputs, self.logits]


def cosines(products: Tensor, squares: Tensor, other_squares: Tensor) -> Tensor:
    """Cosines `[n, m]` of vectors with these inner products `[n, m]` and squared lengths; 0 where one has length 0."""
    lengths = torch.sqrt(squares[:, None] * other_squares)
    return torch.where(lengths > 0, products / lengths.clamp(min=torch.finfo(products.dtype).tiny), 0.0)
