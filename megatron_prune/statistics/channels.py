"""Statistics of the channels that enter a submodule, and of what a layer does to the residual stream.

All are sums in float64 over windows, each in float32, so that ranks' shares add up to the same numbers in every layout;
they can be saved and serve any target. All but the second moments are small, a few numbers a channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.statistics.hessian import Hessian

RESIDUAL = "layer"
"""The site whose statistic sees the residual stream before and after a layer; all others are submodules' inputs."""
AGGREGATIONS = ("mean", "l2", "var")
"""Over the tokens of a window, and of those numbers over windows: mean(|x|), sqrt(sum x^2), mean (x - mean x)^2."""


class ChannelActivations:
    """Size of each channel, aggregated over the tokens of every window and then over windows.

    Minitron (Muralidharan et al. 2024, arXiv:2407.14679, section 2.2): importance agg_batch(agg_seq(x)).
    """

    def __init__(self, channels: int, device: torch.device | str | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.windows = zeros(1)
        self.token_count = zeros(1)
        self.sums = zeros(2, channels)
        """Over tokens: of x and of x^2."""
        self.aggregated = {name: zeros(2, channels) for name in AGGREGATIONS}
        """By the aggregation over a window's tokens: sum over windows of the aggregate, and of its square."""

    def update(self, x: Tensor) -> None:
        """Add windows x `[s, b, channels]`."""
        x = x.float()
        self.windows += x.shape[1]
        self.token_count += x.shape[0] * x.shape[1]
        means, squares = x.mean(0).double(), x.square().mean(0).double()
        self.sums += x.shape[0] * torch.stack([means.sum(0), squares.sum(0)])
        variances = x.var(0, unbiased=False).double()
        seen = {"mean": x.abs().mean(0).double(), "l2": (x.shape[0] * squares).sqrt(), "var": variances}
        for name, value in seen.items():
            self.aggregated[name] += torch.stack([value.sum(0), value.square().sum(0)])

    def tensors(self) -> list[Tensor]:
        """The accumulators."""
        return [self.windows, self.token_count, self.sums, *self.aggregated.values()]

    def importance(self, batch: str = "l2", sequence: str = "mean") -> Tensor:
        """float64 `[channels]`."""
        total, squares = self.aggregated[sequence]
        if batch == "l2":
            return squares.sqrt()
        mean = total / self.windows
        return mean if batch == "mean" else (squares / self.windows - mean.square()).clamp(min=0)

    def mean(self) -> Tensor:
        """Of each channel over all tokens, float64 `[channels]`."""
        return self.sums[0] / self.token_count

    def variance(self) -> Tensor:
        """Of each channel over all tokens, float64 `[channels]`: how much it fluctuates."""
        return (self.sums[1] / self.token_count - self.mean().square()).clamp(min=0)


class BlockInfluence:
    """1 - mean cosine of a layer's input and output over all tokens (ShortGPT, Men et al. 2024, arXiv:2403.03853)."""

    def __init__(self, channels: int, device: torch.device | str | None = None) -> None:
        del channels
        self.total = torch.zeros(2, dtype=torch.float64, device=device)

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add windows: hidden states `[s, b, hidden]` before and after the layer."""
        cosines = F.cosine_similarity(before.float(), after.float(), dim=-1).double()
        self.total += torch.stack([cosines.sum(), self.total.new_tensor(float(cosines.numel()))])

    def tensors(self) -> list[Tensor]:
        """The accumulators."""
        return [self.total]

    def value(self) -> float:
        """0 where the layer only scales its input."""
        return float(1 - self.total[0] / self.total[1])


class Regression:
    """What is needed to fit `targets = W a` from `b`: sums of a b^T, b b^T, a and b over tokens."""

    def __init__(self, wide: int, narrow: int, device: torch.device | str | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.cross, self.gram = zeros(wide, narrow), zeros(narrow, narrow)
        self.wide_sum, self.narrow_sum = zeros(wide), zeros(narrow)
        self.count = zeros(1)

    def update(self, a: Tensor, b: Tensor) -> None:
        """Add tokens `a [..., wide]`, `b [..., narrow]`."""
        a, b = a.flatten(0, -2).float(), b.flatten(0, -2).float()
        self.cross += a.t() @ b
        self.gram += b.t() @ b
        self.wide_sum += a.sum(0, dtype=torch.float64)
        self.narrow_sum += b.sum(0, dtype=torch.float64)
        self.count += a.shape[0]

    def tensors(self) -> list[Tensor]:
        """The accumulators."""
        return [self.cross, self.gram, self.wide_sum, self.narrow_sum, self.count]


class Gram(Hessian):
    """Second moments of a submodule's inputs, 2 X^T X / tokens; see `Hessian`."""

    def update(self, x: Tensor) -> None:
        """Add windows x `[s, b, channels]`."""
        super().update(x.flatten(0, -2))


class ChannelMoments(ChannelActivations):
    """Sizes of the channels and their second moments in one pass."""

    def __init__(self, channels: int, device: torch.device | str | None = None) -> None:
        super().__init__(channels, device)
        self.gram = Gram(channels, device)

    def update(self, x: Tensor) -> None:
        """Add windows x `[s, b, channels]`."""
        super().update(x)
        self.gram.update(x)

    def tensors(self) -> list[Tensor]:
        """The accumulators."""
        return [*super().tensors(), *self.gram.tensors()]

    def settle(self) -> ChannelMoments:
        """Keep the second moments in the host's memory, rounded to float32; nothing can be added any more."""
        self.settled = self.gram.value().cpu()
        del self.gram
        return self


class NormRatio:
    """Mean over tokens of what a norm divides by with the kept channels, over what it divides by with all of them.

    RMSNorm divides by the root mean square; LayerNorm, which is `centred`, by the standard deviation, that is after the
    mean of the channels it sees has been taken off.
    """

    def __init__(self, kept: Tensor, device: torch.device | str | None = None, centred: bool = False) -> None:
        self.kept = kept.to(device)
        self.centred = centred
        self.total = torch.zeros(2, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Add tokens `[..., hidden]`."""
        x = x.float()
        ratio = (self._size(x.index_select(-1, self.kept)) / self._size(x)).sqrt().double()
        self.total += torch.stack([ratio.sum(), self.total.new_tensor(float(ratio.numel()))])

    def _size(self, x: Tensor) -> Tensor:
        return x.var(-1, unbiased=False) if self.centred else x.square().mean(-1)

    def tensors(self) -> list[Tensor]:
        """The accumulators."""
        return [self.total]

    def value(self) -> float:
        """1 where nothing was removed."""
        return float(self.total[0] / self.total[1])


def size_ratio(moments: Tensor, kept: Tensor, centred: bool) -> float:
    """`NormRatio`, but as the ratio of what the two are on average: from second moments `[channels, channels]`, up to a
    factor, or where the norm is not `centred` from their diagonal `[channels]` alone.
    """

    def size(x: Tensor) -> Tensor:
        squares = (x.diagonal() if x.dim() == 2 else x).mean()
        return squares - x.mean() if centred else squares

    moments = moments.double()
    kept = kept.to(moments.device)
    part = moments.index_select(0, kept)
    return float((size(part if moments.dim() == 1 else part.index_select(1, kept)) / size(moments)).sqrt())
