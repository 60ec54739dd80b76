"""Which tiles of a weight stay dense where a target prunes a share of each, such as ``2:4@0.75``.

A mask says it by itself: a tile whose groups keep more than N of their M is one of those, so no record of tiles is
kept beside the zeros; one in which only some do is broken. Tiles lie on a grid from the first row and column of the
Hugging Face matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prune.decision.target import NM
from megatron_prune.kernels.selection import as_written

SCATTERED = 2 / 3
"""How often groups of a dense tile keep more than N, at least, in comparison to zeros that are scattered over it."""


@dataclass(frozen=True)
class Grid:
    """The tiles of one weight; its groups of M inputs are what is counted."""

    rows: int
    groups: int
    """Of a row."""
    high: int
    """Rows of a tile, at most `rows`."""
    wide: int
    """Groups of a tile's row."""

    @classmethod
    def of(cls, shape: Sequence[int], target: NM) -> Grid:
        """Of a weight `[out, in]`, whose inputs divide into groups."""
        rows, groups, tile = shape[0], shape[1] // target.m, target.tiles
        return cls(rows, groups, min(tile.rows or rows, rows), min(tile.columns // target.m or groups, groups))

    @property
    def down(self) -> int:
        """Tiles above one another."""
        return -(-self.rows // self.high)

    @property
    def across(self) -> int:
        """Tiles beside one another."""
        return -(-self.groups // self.wide)

    def sums(self, x: Tensor) -> Tensor:
        """`[rows, groups]` -> its sum over each tile, float64 `[down, across]`."""
        padded = x.new_zeros(self.down * self.high, self.across * self.wide, dtype=torch.float64)
        padded[: self.rows, : self.groups] = x
        return padded.view(self.down, self.high, self.across, self.wide).sum((1, 3))

    def sizes(self) -> Tensor:
        """Groups of each tile, `[down, across]`."""
        return self.sums(torch.ones(self.rows, self.groups))

    def spread(self, tiles: Tensor) -> Tensor:
        """`[down, across]` -> `[rows, groups]`."""
        tall = tiles.repeat_interleave(self.high, 0)[: self.rows]
        return tall.repeat_interleave(self.wide, 1)[:, : self.groups]

    def room(self, target: NM) -> int:
        """Groups that may be in dense tiles; the share is read as the decimal that was written."""
        return math.floor((1 - as_written(target.share)) * self.rows * self.groups)


def removed(cost: Tensor, target: NM) -> Tensor:
    """What N:M would remove of each group: the sum of its lowest costs. `[rows, in]` -> `[rows, groups]`."""
    return cost.unflatten(1, (-1, target.m)).sort(2).values[:, :, : target.m - target.n].double().sum(2)


def dense_tiles(removed: Tensor, target: NM) -> Tensor:
    """The groups of the tiles that stay dense: those whose pruning would cost most per weight, as many as fit.

    `removed` `[rows, groups]` of a whole Hugging Face matrix, from the function of that name -> bool of that shape. Of
    equal tiles the first is pruned.
    """
    grid = Grid.of((removed.shape[0], removed.shape[1] * target.m), target)
    return grid.spread(largest(grid.sums(removed) / grid.sizes().to(removed.device), grid, target))


def largest(worth: Tensor, grid: Grid, target: NM) -> Tensor:
    """The tiles that are worth most, as many as may stay dense; of equal ones the last. `[down, across]` -> bool."""
    device, worth, size = worth.device, worth.flatten().cpu(), grid.sizes().flatten()
    left, dense = float(grid.room(target)), torch.zeros_like(worth, dtype=torch.bool)
    order = len(worth) - 1 - worth.flip(0).argsort(descending=True, stable=True)
    while len(order := order[size[order] <= left]):
        fits = size[order].cumsum(0) <= left
        dense[order[fits]] = True
        left -= float(size[order[fits]].sum())
        order = order[~fits]  # smaller ones, at the edges, may fit yet
    return dense.view(grid.down, grid.across).to(device)


def has_room(shape: tuple[int, ...], target: NM) -> bool:
    """Whether a weight `[out, in]` of that shape can have a dense tile."""
    if target.share == 1:
        return True
    grid = Grid.of(shape, target)
    return float(grid.sizes().min()) <= grid.room(target)


def dense_groups(kept: Tensor, target: NM) -> Tensor:
    """The groups of the tiles that a mask, or what of a pruned weight is not zero, shows to be dense.

    bool `kept` `[rows, in]` -> bool `[rows, groups]`.
    """
    return _whole_tiles(_above(kept, target), target)


def broken_groups(kept: Tensor, target: NM) -> Tensor:
    """Groups that keep more than N of M where they may not. bool `kept` `[rows, in]` -> bool `[rows, groups]`.

    With a share, dense tiles may, as many as the share leaves: where there are more, none is excused. A group that
    keeps too much in any other tile never is.
    """
    above = _above(kept, target)
    if target.share == 1 or not above.any():
        return above
    grid = Grid.of(kept.shape, target)
    dense = _are_dense(kept, above, grid, target)
    few = float(grid.sizes().to(dense.device)[dense].sum()) <= grid.room(target)
    return above & ~grid.spread(dense) if few else above


def _are_dense(kept: Tensor, above: Tensor, grid: Grid, target: NM) -> Tensor:
    """The tiles, bool `[down, across]`, in which zeros lie as in a dense one, and not as in one with a stray group.

    A dense tile may have zeros of its own, whole rows of them or, where the model had been pruned before, many. So its
    groups keep more than N at least `SCATTERED` as often as they would if its zeros were anywhere; groups of zeros
    alone say nothing. Of a tile without other zeros that is half of its groups.
    """
    groups = kept.unflatten(1, (-1, target.m))
    filled = grid.sums(groups.any(2)).clamp(min=1)
    density = grid.sums(groups.sum(2)) / (filled * target.m)
    expected = sum(
        math.comb(target.m, k) * density**k * (1 - density) ** (target.m - k) for k in range(target.n + 1, target.m + 1)
    )
    share = grid.sums(above) / filled
    return (share > 0) & (share >= SCATTERED * expected)


def _above(kept: Tensor, target: NM) -> Tensor:
    return kept.unflatten(1, (-1, target.m)).sum(2) > target.n


def _whole_tiles(groups: Tensor, target: NM) -> Tensor:
    """All groups of the tiles that have one of these."""
    grid = Grid.of((groups.shape[0], groups.shape[1] * target.m), target)
    return grid.spread(grid.sums(groups) > 0)
