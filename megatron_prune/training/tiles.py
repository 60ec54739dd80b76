"""Tiles that learn, together with the masks of all others, whether they stay dense (`2:4@0.75`).

After PATCH (arXiv:2509.23410): every tile of every Hugging Face matrix has a logit, and the forward pass uses a mixture
of the weight and the masked weight, drawn anew with each mask (`kernels/tiles.py`). Scale and temperature are the
masks'.
What is ours:
- The share of a matrix is no penalty: a threshold is taken off its logits, so that as much as the target leaves dense
  is expected to be, at every step. The gradient goes through the threshold, too. Without that all logits would rise,
  as any tile that gets dense lowers the loss, and Adam would make the same step of it for all of them.
- At the end the tiles with the largest logits stay dense, as many as a method in one shot would leave.

Logits are few, whole on every rank, and so is their Adam; gradients are added up once a step. Their noise is a function
of seed, step, micro-batch, linear and tile. So every layout learns the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_prune.decision.target import NM
from megatron_prune.decision.tiles import Grid, largest
from megatron_prune.kernels import tiles as kernel
from megatron_prune.kernels.definition import GUMBEL_MEAN, GUMBEL_STD, INITIAL_STEP, Draw
from megatron_prune.model import convert
from megatron_prune.model.masked_linear import LinearTiles, MaskDraw
from megatron_prune.model.prunable import LocalLinear, PrunableModel
from megatron_prune.option_groups import Training
from megatron_prune.training.loop import MASK_LOGITS, StepResult, Trainer

EPS = 1.0
"""Adam's epsilon, in units of the gradients' root mean square: tiles that matter little move little."""


class TileLogits:
    """The logits of all tiles of a model, `[matrices, most tiles of one]`, and what updates them."""

    def __init__(self, model: PrunableModel, target: NM, training: Training) -> None:
        """Gives the linears of this rank their tiles."""
        self.model = model
        self.target = target
        self.grids = {
            map.megatron: [Grid.of((len(rows), map.shape[1]), target) for rows in self._blocks(map)]
            for map in model.maps
            if map.prunable
        }
        """Of the matrices that a linear is made of, by its name."""
        numbers = iter(range(sum(map(len, self.grids.values()))))
        self.numbers = {name: [next(numbers) for _ in grids] for name, grids in self.grids.items()}
        self.sizes = self._padded([grid.sizes() for grids in self.grids.values() for grid in grids])
        self.logits = torch.zeros_like(self.sizes, dtype=torch.float32)
        betas = training.adam_beta1, training.adam_beta2
        self.optimizer = torch.optim.Adam([self.logits], betas=betas, eps=EPS)
        self.start = torch.zeros_like(self.sizes, dtype=torch.bool)
        self.room = torch.zeros(len(self.sizes), dtype=torch.float64, device=self.sizes.device)
        """Groups that are in dense tiles, of each matrix."""
        self.threshold = torch.zeros_like(self.room)
        self.sharp = 1.0
        for linear in model.linears():
            logits = torch.empty(0)
            linear.module.tiles = LinearTiles(self._shard(linear), logits, self._decides(linear.name))

    def _blocks(self, map: Any) -> list[Tensor]:
        return list(convert.row_blocks(map, self.model.config).values())

    def _padded(self, each: list[Tensor]) -> Tensor:
        """Tiles `[down, across]` of every matrix -> float64 `[matrices, most]`, filled up with zeros."""
        most = max(tiles.numel() for tiles in each)
        found = torch.zeros(len(each), most, dtype=torch.float64, device=backend.device())
        for row, tiles in zip(found, each, strict=True):
            row[: tiles.numel()] = tiles.flatten()
        return found

    def _shard(self, linear: LocalLinear) -> kernel.Shard:
        """Where the tiles of a linear are on this rank."""
        map, module = linear.map, linear.module
        assert module.position is not None
        lines, count = torch.empty(map.shape[0], dtype=torch.int64), 0
        for rows, grid in zip(self._blocks(map), self.grids[linear.name], strict=True):
            lines[rows] = count + torch.arange(grid.rows) // grid.high
            count += grid.down
        here = lines.to(module.weight.device)[module.position.row_ids]
        m, inputs = self.target.m, module.weight.shape[1]
        return kernel.Shard.of(here, count, module.position.first_group * m, inputs, grid.wide * m, grid.across)

    def _decides(self, name: str) -> Callable[[], Tensor]:
        return lambda: self._lines(name, self.chosen(name))

    def _lines(self, name: str, tiles: list[Tensor]) -> Tensor:
        """Tiles of each matrix of a linear -> `[lines, across]`."""
        return torch.cat([x.view(grid.down, grid.across) for x, grid in zip(tiles, self.grids[name], strict=True)])

    def chosen(self, name: str) -> list[Tensor]:
        """The tiles of each matrix of a linear that would stay dense now, bool `[down, across]`."""
        pairs = zip(self.numbers[name], self.grids[name], strict=True)
        return [
            largest(self.logits[i, : grid.down * grid.across].view(grid.down, grid.across), grid, self.target)
            for i, grid in pairs
        ]

    def dense(self) -> Tensor:
        """As `chosen`, of all matrices: bool `[matrices, most]`."""
        return self._padded([tiles for name in self.grids for tiles in self.chosen(name)]) > 0

    # --- the start ---

    @torch.no_grad()
    def start_from(self, kept: Callable[[LocalLinear], Tensor], half_step: float) -> None:
        """Tiles that a mask keeps dense start at `half_step`, others at its opposite. Collective.

        `kept`: of a linear here. As many as may start dense: first those with most groups above the pattern, then those
        of which the mask removes most, by the squares of the weights.
        """
        n, m = self.target.n, self.target.m
        above, gone = {}, {}
        for linear in self.model.linears():
            mask, shard = kept(linear), self._tiles(linear).shard
            wide = (mask.unflatten(1, (-1, m)).sum(2) > n).repeat_interleave(m, 1)
            share = float(self.model.counts(linear.map))
            above[linear.name] = shard.sums(wide.float()) * (share / m)
            gone[linear.name] = shard.sums(linear.module.weight.float().square().masked_fill(mask, 0.0)) * share
        first, then = (self._gathered(sums) / self.sizes.clamp(min=1) for sums in (above, gone))
        self.logits.copy_(_ranks(first, then))
        self.logits.copy_(torch.where(self.dense(), half_step, -half_step))
        self._started()

    @torch.no_grad()
    def start_at_random(self, std: float, seed: int) -> None:
        """Noise of mean 0, the same in every layout."""
        numbers = torch.arange(self.logits.numel(), device=self.logits.device)
        key = Draw(seed, INITIAL_STEP, 0, kernel.TILES).key()
        noise = kernel.gumbel_noise(numbers, 1, key).view(self.logits.shape)
        self.logits.copy_(std * (noise - GUMBEL_MEAN) / GUMBEL_STD)
        self._started()

    def _started(self) -> None:
        self.start = self.dense()
        self.room = (self.sizes * self.start).sum(1)

    # --- a step ---

    def _tiles(self, linear: LocalLinear) -> LinearTiles:
        assert linear.module.tiles is not None
        return linear.module.tiles

    @torch.no_grad()
    def begin(self, draw: MaskDraw) -> None:
        """Set the thresholds, and give every linear the logits of this step."""
        self.sharp = kernel.sharpness(draw.scale, draw.temperature)
        self.threshold = kernel.thresholds(self.logits.double(), self.sizes, self.room, self.sharp)
        above = (self.logits.double() - self.threshold[:, None]).float()
        for linear in self.model.linears():
            grids = self.grids[linear.name]
            each = [
                above[i, : grid.down * grid.across] for i, grid in zip(self.numbers[linear.name], grids, strict=True)
            ]
            self._tiles(linear).logits = self._lines(linear.name, each).requires_grad_()

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """Move the logits after the backward passes of a step. Collective."""
        replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        found = {}
        for linear in self.model.linears():
            gradient = self._tiles(linear).logits.grad
            if gradient is not None:
                found[linear.name] = gradient.double() / (replicas * self._copies(linear))
        wide = self.logits.double()
        gradient = kernel.centred(self._gathered(found), wide, self.sizes, self.threshold, self.sharp)
        size = gradient.square().sum().div((self.sizes > 0).sum()).sqrt()
        self.logits.grad = (gradient / size if size > 0 else gradient).float()
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()

    def _copies(self, linear: LocalLinear) -> int:
        """Tensor-parallel ranks that find the same gradient."""
        layout = self.model.layout
        whole = linear.map.expert is None and linear.map.shard_dim is None
        return layout.tensor if whole and not layout.sequence_parallel else 1

    def _gathered(self, found: dict[str, Tensor]) -> Tensor:
        """`[lines, across]` of linears here -> `[matrices, most]`, added up over all ranks. Collective."""
        total = torch.zeros_like(self.sizes)
        for name, lines in found.items():
            parts = lines.split([grid.down for grid in self.grids[name]])
            for number, part in zip(self.numbers[name], parts, strict=True):
                total[number, : part.numel()] = part.flatten()
        dist.all_reduce(total)
        return total

    # --- what is told and kept of it ---

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Of the tiles that would stay dense, the share that did not at the start; how decided tiles are, 1/2 to 1."""
        now, tiles = self.dense(), self.sizes > 0
        degree = (self.sharp * (self.logits.double() - self.threshold[:, None])).sigmoid()
        decided = torch.maximum(degree, 1 - degree)[tiles].mean()
        moved = (now & ~self.start).sum() / now.sum().clamp(min=1)
        return {"tiles_moved_fraction": float(moved), "tile_probability": float(decided)}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, plain tensors that all ranks share."""
        adam = self.optimizer.state.get(self.logits, {})
        return {key: value.detach().cpu() for key, value in {"logits": self.logits, **adam}.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        saved = dict(state)
        self.load_logits(saved)
        del saved["logits"]
        for key, value in saved.items():
            self.optimizer.state[self.logits][key] = (
                value.clone() if key == "step" else value.to(self.logits.device, copy=True)
            )

    @torch.no_grad()
    def load_logits(self, state: dict[str, Any]) -> None:
        """Take over the logits alone, of an earlier run."""
        self.logits.copy_(state["logits"])


def _ranks(first: Tensor, then: Tensor) -> Tensor:
    """The place of each tile of a row in rising order of the first number, and of the second where that is equal."""
    order = then.argsort(dim=1, stable=True)
    order = order.gather(1, first.gather(1, order).argsort(dim=1, stable=True))
    return order.argsort(dim=1).float()


class TileTrainer(Trainer):
    """Trains the logits of masks, and those of tiles."""

    def __init__(self, tiles: TileLogits, draw: MaskDraw, factor: float, *args: Any, **more: Any) -> None:
        """`factor`: learning rate of tiles in units of the mask logits'; `args` and `more` are Trainer's."""
        super().__init__(*args, **more)
        self.tiles = tiles
        self.draw = draw
        self.factor = factor
        rest = self.before_update

        def before_update() -> None:
            rest()
            tiles.update(factor * self.learning_rates()[MASK_LOGITS])

        self.before_update = before_update

    def step(self, step: int) -> StepResult:
        """As the base class, with the thresholds of this step."""
        self.tiles.begin(self.draw)
        return super().step(step)

    def state(self, is_loading: bool) -> dict[str, Any]:
        """As the base class, with the logits of tiles and their optimizer."""
        return {**super().state(is_loading), "tiles": self.tiles.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """As the base class."""
        super().load_state(state)
        self.tiles.load(state["tiles"])
