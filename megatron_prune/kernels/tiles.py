"""Tiles of a weight that are dense to a learned degree (PATCH, arXiv:2509.23410, has the idea), and what keeps their
share where it should be. Plain PyTorch, any device.

    out = masked + D * (weight - masked)         D in [0, 1], one for each tile
    D = sigmoid((scale * (logit - threshold) + g) / temperature)         g logistic: a Gumbel softmax of two choices

Each matrix has a `threshold`, at which as much of it is expected to be dense as may be. A logit alone says nothing
then: what counts is how it stands to those of the other tiles, in its gradient, too (`centred`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prune.kernels.definition import Draw, hash_key
from megatron_prune.kernels.philox import gumbel_noise

CHUNK = 2**22
"""Weights that are taken at a time, with about 20 bytes of temporaries each."""
TILES = 1
"""Last part of the key of their noise, which the noise of masks does not have."""
HALVINGS = 64
"""Steps in which a threshold is closed in on; more than a float64 can tell apart."""


@dataclass(frozen=True)
class Shard:
    """How the tiles `[lines, across]` of an unsharded weight lie on a shard of it `[rows, inputs]`."""

    line: Tensor
    """int64 [rows]: which line of tiles each row here is in."""
    members: Tensor
    """int64 [lines, rows of a tile]: the rows here of each line, filled up with the number of rows here."""
    first: int
    """Input of the unsharded weight that is the first here."""
    inputs: int
    """Here."""
    wide: int
    """Inputs of a tile."""
    across: int
    """Tiles of a line."""

    @classmethod
    def of(cls, line: Tensor, lines: int, first: int, inputs: int, wide: int, across: int) -> Shard:
        """With the rows of each line looked up."""
        place, device = line.cpu(), line.device
        counts, order = place.bincount(minlength=lines), place.argsort(stable=True)
        members = place.new_full((lines, int(counts.max())), len(place))
        members[place[order], torch.arange(len(place)) - (counts.cumsum(0) - counts)[place[order]]] = order
        return cls(line, members.to(device), first, inputs, wide, across)

    def chunks(self) -> Iterator[slice]:
        """Ranges of its rows."""
        step = max(1, CHUNK // max(1, self.inputs))
        return (slice(start, min(start + step, len(self.line))) for start in range(0, len(self.line), step))

    def spread(self, tiles: Tensor, rows: slice = slice(None)) -> Tensor:
        """`[lines, across]` -> the value of each weight's tile, `[rows, inputs]`."""
        low, high = self.first // self.wide, -(-(self.first + self.inputs) // self.wide)
        wide = tiles[:, low:high].repeat_interleave(self.wide, 1)
        start = self.first - low * self.wide
        return wide[:, start : start + self.inputs][self.line[rows]]

    def across_sums(self, x: Tensor) -> Tensor:
        """Some rows `[rows, inputs]` -> the sum of each over the columns of each tile, float64 `[rows, across]`."""
        low, high = self.first // self.wide, -(-(self.first + self.inputs) // self.wide)
        start = self.first - low * self.wide
        padded = torch.nn.functional.pad(x, (start, (high - low) * self.wide - start - self.inputs))
        sums = padded.new_zeros(len(x), self.across, dtype=torch.float64)
        sums[:, low:high] = padded.unflatten(1, (-1, self.wide)).sum(2, dtype=torch.float64)
        return sums

    def down_sums(self, sums: Tensor) -> Tensor:
        """`[rows, across]` of all rows -> `[lines, across]`; always added up in the same order."""
        return torch.cat([sums, sums.new_zeros(1, self.across)])[self.members].sum(1)

    def sums(self, x: Tensor) -> Tensor:
        """`[rows, inputs]` -> its sum over what is here of each tile, float64 `[lines, across]`."""
        return self.down_sums(torch.cat([self.across_sums(x[rows]) for rows in self.chunks()]))


def blended(
    weight: Tensor,
    masked: Tensor,
    logits: Tensor,
    shard: Shard,
    *,
    scale: float,
    temperature: float,
    draw: Draw | None,
    hard: bool = False,
) -> Tensor:
    """The weight `[rows, inputs]`, masked but in tiles that are dense; differentiable in all three tensors.

    `logits` `[lines, across]` of the unsharded weight, their threshold taken off. The gradient that they get is that of
    this shard: add up those of all. None for `draw`: no noise. `hard`: each tile is one or the other, and its logit
    sees the soft degree. Besides the inputs nothing of the size of the weight is kept for the backward pass: only the
    result, which what it is multiplied by keeps anyway (with `hard` the masked weight).
    """
    noisy = logits * scale
    if draw is not None:
        noisy = noisy + logistic_noise(logits, draw)
    result: Tensor = _Blend.apply(weight, masked, noisy / temperature, shard, hard)  # type: ignore[no-untyped-call]
    return result


def logistic_noise(like: Tensor, draw: Draw) -> Tensor:
    """Standard logistic noise of tiles `[lines, across]`: the difference of two Gumbel variates by a tile's number."""
    key = hash_key(draw.seed, draw.step, draw.microbatch, draw.tensor_id, TILES)
    first, second = gumbel_noise(torch.arange(like.numel(), device=like.device), 2, key).unbind(-1)
    return (first - second).view(like.shape)


class _Blend(torch.autograd.Function):
    """The differentiable core of `blended`; `z` `[lines, across]` are the logits of D."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, masked: Tensor, z: Tensor, shard: Shard, hard: bool) -> Tensor:
        degree = (z > 0).to(z.dtype) if hard else z.sigmoid()
        result = torch.empty_like(weight)
        for rows in shard.chunks():
            dense = shard.spread(degree, rows)
            result[rows] = torch.lerp(masked[rows].to(dense.dtype), weight[rows].to(dense.dtype), dense)
        ctx.save_for_backward(weight, masked if hard else result, z, degree)
        ctx.shard, ctx.hard = shard, hard
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        weight, other, z, degree = ctx.saved_tensors
        needs_weight, needs_masked, needs_z = ctx.needs_input_grad[:3]
        shard: Shard = ctx.shard
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_masked = torch.empty_like(weight) if needs_masked else None
        sums = []
        for rows in shard.chunks():
            dense, slope = shard.spread(degree, rows), grad[rows].to(degree.dtype)
            if grad_weight is not None:
                grad_weight[rows] = dense * slope
            if grad_masked is not None:
                grad_masked[rows] = (1 - dense) * slope
            if needs_z:
                sums.append(shard.across_sums(slope * (weight[rows].to(slope.dtype) - other[rows].to(slope.dtype))))
        if not needs_z:
            return grad_weight, grad_masked, None, None, None
        soft = z.sigmoid()
        # weight - result is (1 - D) (weight - masked): with D that is the slope of the sigmoid already.
        slopes = soft * (1 - soft) if ctx.hard else soft
        return grad_weight, grad_masked, (shard.down_sums(torch.cat(sums)) * slopes).to(z.dtype), None, None


def sharpness(scale: float, temperature: float) -> float:
    """Factor of a logit in its tile's expected degree, over the noise.

    That degree is the chance that two logistic variables together, the noise and one of `temperature`, lie below
    scale * logit; their sum is taken for one logistic variable of the same variance.
    """
    return scale / (1.0 + temperature**2) ** 0.5


def thresholds(logits: Tensor, sizes: Tensor, room: Tensor, sharp: float) -> Tensor:
    """Of each matrix the number t at which the sum of sizes * sigmoid(sharp * (logits - t)) is what may be dense.

    logits and sizes `[matrices, tiles]`, those of no tile of size 0; room `[matrices]`; float64. Where nothing may be
    dense it is infinite.
    """
    reach = 40.0 / sharp
    low, high = logits.amin(1) - reach, logits.amax(1) + reach
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = (sizes * (sharp * (logits - middle[:, None])).sigmoid()).sum(1) > room
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(room > 0, (low + high) / 2, torch.inf)


def centred(gradient: Tensor, logits: Tensor, sizes: Tensor, threshold: Tensor, sharp: float) -> Tensor:
    """The gradient by the logits, of which the thresholds follow, from that by logits - threshold; all as above.

    A threshold moves with the logits so that the room stays filled: dt / dlogit is sizes * s' / sum(sizes * s'), with
    the slopes s' of the sigmoid.
    """
    degree = (sharp * (logits - threshold[:, None])).sigmoid()
    weight = sizes * degree * (1 - degree)
    whole = weight.sum(1, keepdim=True)
    return gradient - torch.where(whole > 0, weight / whole, 0.0) * gradient.sum(1, keepdim=True)
