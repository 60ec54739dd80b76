"""What a method that learns masks asks for: logits on every linear, a start, optimizer steps, a decision.

`LearningRunner` is such a method's training session, from the logits' start to the final masks.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.decision.masks import Kept, MaskWriter, prunable_shapes
from megatron_prune.decision.prior import MaskSource
from megatron_prune.decision.run_folder import target_of
from megatron_prune.decision.target import NM, title
from megatron_prune.errors import UserError
from megatron_prune.foreign import fenced
from megatron_prune.kernels import definition, gumbel
from megatron_prune.kernels.philox import gumbel_noise
from megatron_prune.kernels.selection import select_nm
from megatron_prune.log import say
from megatron_prune.model import convert
from megatron_prune.model.checkpoint import load_sharded
from megatron_prune.model.cost import forward_flops
from megatron_prune.model.masked_linear import MaskDraw
from megatron_prune.model.prunable import LocalLinear, PrunableModel, linear_names
from megatron_prune.training.checkpoints import find_newest
from megatron_prune.training.joint import MaskedDecay, WeightTraining
from megatron_prune.training.loop import MASK_LOGITS, WEIGHTS, Steps, Trainer
from megatron_prune.training.recovery import RecoveryLoss
from megatron_prune.training.session import TrainingSession
from megatron_prune.training.state import load_parameters, trained_parameters
from megatron_prune.training.tiles import TileLogits, TileTrainer
from megatron_prune.training.weighting import Weighting

NOISE_AT_ONCE = 2**22
"""Logits whose start is drawn together, with some 50 bytes of temporaries each."""


def _gap(logits: Tensor) -> float:
    """The least distance of the best and the next pattern of a group, over groups `[rows, groups, patterns]`."""
    least = math.inf
    if not logits.numel():
        return least
    for some in logits.split(max(1, NOISE_AT_ONCE // max(1, logits[0].numel()))):
        best = some.float().topk(2, dim=-1).values
        least = min(least, float((best[..., 0] - best[..., 1]).min()))
    return least


class LearningRunner(TrainingSession):
    """Learns mask logits in `folder`; `prior` and `initial_logits` say where learning starts."""

    model: PrunableModel
    trained = MASK_LOGITS

    def __init__(
        self,
        *args: Any,
        writer: Callable[[], MaskWriter | None],
        prior: MaskSource | None = None,
        initial_logits: Path | None = None,
        weighting: Weighting | None = None,
        teacher: PrunableModel | None = None,
        **kwargs: Any,
    ) -> None:
        """`args` and `kwargs` are TrainingSession's.

        `weighting`: of the losses in their sum; None: the next-token loss alone. `teacher`: a frozen model in the same
        layout, or the model itself, which then teaches without its masks.
        """
        super().__init__(*args, **kwargs)
        self.writer = writer
        self.prior = prior
        self.initial_logits = initial_logits
        self.weighting = weighting
        self.teacher = teacher
        self.draw: MaskDraw | None = None
        self.target: NM | None = None
        self.tiles: TileLogits | None = None
        """Of tiles that may stay dense."""
        self.tile_rate = 0.0
        """Their learning rate, in units of the mask logits'."""
        self.microbatches = 1
        self.weights: WeightTraining | None = None
        """How the weights train; None: they are frozen."""
        self.decay = 0.0
        """What removed weights lose of themselves in this step."""
        self.start: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.moved: float | None = None
        """Share of the groups that had left their start when the masks were last looked at."""

    def learn_masks(self, target: NM, weights: WeightTraining | None = None, **draw: Any) -> MaskDraw:
        """Give every prunable linear mask logits, but those that the target leaves dense, and freeze everything else,
        but the weights where it is said how they train.

        `draw`: more fields of MaskDraw. UserError for logits in bfloat16 in a model that is not.
        """
        dtype = self.model.config.dtype
        if draw.get("logits_dtype") == torch.bfloat16 and dtype != "bfloat16":
            raise UserError(
                f"logits_dtype bfloat16 was given and the model is {dtype}: the optimizer keeps float32 masters in a "
                "bfloat16 model only; leave it float32, or import the model with --dtype bfloat16"
            )
        for chunk in self.model.chunks:
            chunk.requires_grad_(False)
        self.weights = weights
        t = self.training
        self.target = target
        self.draw = MaskDraw(target.n, target.m, seed=t.seed, recompute=t.recompute, **draw)
        self.model.learn_masks(self.draw, target.leaves)
        if weights is not None:
            for linear in self.model.linears():
                linear.module.weight.requires_grad_()
            for norm in self._norms() if weights.norms else ():
                norm.requires_grad_()
        return self.draw

    def learn_tiles(self, target: NM, rate: float) -> None:
        """Give every prunable linear, which has mask logits already, tiles that learn whether they stay dense.

        `rate`: their learning rate, in units of the mask logits'.
        """
        self.tiles, self.tile_rate = TileLogits(self.model, target, self.training), rate

    def _norms(self) -> Iterator[torch.nn.Parameter]:
        """The parameters of this rank's norms: those of the residual stream, and of queries and keys."""
        for chunk in self.model.chunks:
            yield from (parameter for name, parameter in chunk.named_parameters() if "layernorm" in name)

    @torch.no_grad()
    def start_logits(self, from_mask: Callable[[Tensor], Tensor], std: float, half_step: float = 0.0) -> None:
        """Fill the logits: from an earlier run, from the prior mask through `from_mask`, or with noise of `std`.

        `half_step`: how far from 0 the logits of tiles start, where the prior says which of them are dense.
        """
        assert self.draw is not None
        if self.initial_logits is not None:
            self._load_logits(self.initial_logits)
        elif self.tiles is not None and self.prior is not None:
            self.tiles.start_from(self._prior_mask, half_step)
        elif self.tiles is not None:
            self.tiles.start_at_random(std, self.training.seed)
        for linear in self.model.masked_linears():
            logits = linear.module.mask_logits
            if self.initial_logits is None and self.prior is not None:
                logits.copy_(from_mask(self._pattern(linear)))
            elif self.initial_logits is None:
                logits.copy_(std * self._noise(linear))
            self.start[linear.name] = gumbel.winners(linear.module.learned_logits)
            self.last[linear.name] = self.start[linear.name]

    def _prior_mask(self, linear: LocalLinear) -> Tensor:
        """This rank's part of the prior, bool `[out, in]`."""
        assert self.prior is not None
        masks = [self.prior(name) for name in linear.map.hf]
        whole = convert.merge(linear.map, masks, self.model.config)
        return self.model.shard(linear.map, whole).to(linear.module.mask_logits.device)

    def _pattern(self, linear: LocalLinear) -> Tensor:
        """What masks start from: the prior; where it keeps too much of a group, the largest weights of those."""
        mask, draw = self._prior_mask(linear), self.draw
        assert draw is not None
        above = (mask.unflatten(1, (-1, draw.m)).sum(2) > draw.n).repeat_interleave(draw.m, 1)
        return mask & (select_nm(linear.module.weight.float().abs() * mask, draw.n, draw.m) | ~above)

    def _noise(self, linear: LocalLinear) -> Tensor:
        """Noise of mean 0 and variance 1 for a start without a prior, the same in every layout."""
        module, position = linear.module, linear.module.position
        assert position is not None
        rows, groups, count = module.mask_logits.shape
        device = module.mask_logits.device
        columns = position.first_group + torch.arange(groups, device=device)
        row_ids = position.row_ids.to(device)[:, None]
        key = gumbel.Draw(self.training.seed, definition.INITIAL_STEP, 0, linear.tensor_id).key()
        noise = torch.empty(rows, groups, count, device=device)
        step = max(1, NOISE_AT_ONCE // (groups * count))
        for some in (slice(first, first + step) for first in range(0, rows, step)):
            noise[some] = gumbel_noise(row_ids[some] * position.groups_per_row + columns, count, key)
        return noise.sub_(definition.GUMBEL_MEAN).div_(definition.GUMBEL_STD)

    def optimize(self, multipliers: dict[str, float], on_step: Callable[[int, int], dict[str, float]]) -> None:
        """Run the optimizer steps that are left, logging, saving and evaluating at their intervals."""
        draw = self.draw
        assert draw is not None

        def on_microbatch(step: int, number: int) -> None:
            draw.step, draw.microbatch = step, number

        decay: MaskedDecay
        make: Callable[..., Trainer] = Trainer
        if self.tiles is not None:
            make = functools.partial(TileTrainer, self.tiles, draw, self.tile_rate)
        trainer = make(
            self.model,
            self.training,
            self.data,
            multipliers,
            on_microbatch,
            self._objective(),
            before_update=lambda: decay.apply(self.decay),
            weights=self.weights,
        )
        decay = MaskedDecay(self.model, trainer.optimizer)
        self.microbatches = trainer.microbatches
        if not self.resume:
            self._warn_of_short_steps(multipliers["*mask_logits"])

        def with_decay(step: int, steps: int) -> dict[str, float]:
            return {**on_step(step, steps), **self._set_decay(trainer, step, steps)}

        self.take_steps(trainer, with_decay)
        moved = self.moved if self.moved is not None else self._mask_statistics()["differs_from_start_fraction"]
        say(
            f"{moved:.2%} of the groups have left their start"
            if moved
            else "no group has left its start: the masks are those that learning began with; give more steps, a larger "
            "--lr or --lr-multiplier, or a smaller --prior-strength"
        )
        if self.tiles is not None:
            say(f"{self.tiles.report()['tiles_moved_fraction']:.2%} of the dense tiles were not dense at the start")

    def _set_decay(self, trainer: Trainer, step: int, steps: int) -> dict[str, float]:
        """Move the decay of removed weights to its value at a step; what to log of the weights that train."""
        if self.weights is None:
            return {}
        rate = trainer.learning_rates()[WEIGHTS]
        self.decay = self.weights.decay_at(step, steps, rate)
        decay = {"masked_decay": self.decay} if self.weights.decay else {}
        return {"learning_rate/weights": rate, **decay}

    def _objective(self) -> RecoveryLoss | None:
        """What is lowered, where it is not the next-token loss alone."""
        if self.weighting is None:
            return None
        if self.teacher is not None:
            self.flops += forward_flops(self.teacher.config, self.training.seq_length)
        count = self.training.num_microbatches(self.model.layout.data)
        return RecoveryLoss(self.model, self.weighting, self.teacher, count, self.draw)

    @torch.no_grad()
    def _warn_of_short_steps(self, multiplier: float) -> None:
        """Say so when no group will change: Adam hardly moves a logit by more than the learning rate in a step, and the
        best and the next pattern of a group may come so much closer from both sides. Collective.
        """
        reach = 2 * multiplier * self.training.lr * self.training.train_iters
        gap = torch.full((), math.inf, dtype=torch.float64, device=backend.device())
        for linear in self.model.masked_linears():
            gap.clamp_(max=_gap(linear.module.learned_logits))
        dist.all_reduce(gap, dist.ReduceOp.MIN)
        least = float(gap)
        if reach < least:
            say(
                f"warning: the best pattern of every group starts {least:.3g} above the next, and "
                f"{self.training.train_iters} steps of --lr {self.training.lr:g} x --lr-multiplier {multiplier:g} can "
                f"close about {reach:.3g}: no mask will change; give more steps, a larger --lr or --lr-multiplier, "
                "or a smaller --prior-strength"
            )

    def measure(self) -> dict[str, float]:
        """What has become of the masks, and of the weights that they remove."""
        tiles = self.tiles.report() if self.tiles is not None else {}
        return self._mask_statistics() | tiles | (self._removed_share() if self.weights is not None else {})

    @torch.no_grad()
    def _removed_share(self) -> dict[str, float]:
        """Share of the sum of squares of all masked weights that the removed ones have. Collective."""
        sums = torch.zeros(2, dtype=torch.float64, device=backend.device())
        for linear in self.model.masked_linears():
            squares = linear.module.weight.float().square()
            if linear.module.dense_rows is not None:
                squares = squares.masked_fill(linear.module.dense_rows[:, None], 0.0)
            removed = squares.masked_fill(linear.module.decided_mask(), 0.0)
            counted = self.model.seen_together(linear.map)  # so many replicas of the rest share an expert
            sums += torch.stack([part.sum(dtype=torch.float64) for part in (removed, squares)]) * counted
        dist.all_reduce(sums)
        removed_sum, whole = sums.tolist()
        return {"removed_squares_fraction": removed_sum / whole if whole else 0.0}

    @torch.no_grad()
    def _mask_statistics(self) -> dict[str, float]:
        """Over all groups, and over those of each kind of linear: mean best probability, mean entropy (nats), share
        whose best pattern has changed since the last look and, over all, since the start. Collective.
        """
        draw = self.draw
        assert draw is not None
        kinds = linear_names(self.model.config)
        sums = torch.zeros(len(kinds), 5, dtype=torch.float64, device=backend.device())
        for linear in self.model.masked_linears():
            now, spread = gumbel.statistics(
                linear.module.learned_logits, scale=draw.scale, temperature=draw.temperature
            )
            changed, moved = (int((now != before[linear.name]).count_nonzero()) for before in (self.last, self.start))
            values = (*spread.tolist(), changed, moved, now.numel())
            counted = self.model.seen_together(linear.map)  # an expert is shared by replicas of the rest
            sums[kinds.index(linear.name.split(".")[-2])] += (
                torch.tensor(values, dtype=sums.dtype, device=sums.device) * counted
            )
            self.last[linear.name] = now
        dist.all_reduce(sums)
        best, entropy, changed, moved, count = sums.sum(0).tolist()
        self.moved = moved / count
        record = {
            "max_probability": best / count,
            "mask_entropy": entropy / count,
            "changed_fraction": changed / count,
            "differs_from_start_fraction": self.moved,
        }
        for kind, (best, entropy, changed, _moved, count) in zip(kinds, sums.tolist(), strict=True):
            if not count:
                continue  # all of them stay dense
            record |= {f"max_probability/{kind}": best / count, f"changed_fraction/{kind}": changed / count}
            record[f"mask_entropy/{kind}"] = entropy / count
        return record

    def held_out_loss(self, trainer: Steps, windows: Tensor) -> float:
        """With every group's best pattern."""
        assert self.draw is not None
        self.draw.decoded = True
        loss = super().held_out_loss(trainer, windows)
        self.draw.decoded = False
        return loss

    def load(self, trainer: Steps, path: Path) -> int:
        """As the base class; changes of masks count from there."""
        done = super().load(trainer, path)
        for linear in self.model.masked_linears():
            self.last[linear.name] = gumbel.winners(linear.module.learned_logits)
        return done

    def _load_logits(self, run: Path) -> None:
        """Take the mask logits of another run's newest good checkpoint (transfer)."""
        path, _damaged = find_newest(run / "checkpoints")
        if path is None:
            raise UserError(
                f"{run} was given as the start and has no checkpoints; give a run of a method that learns, or its mask "
                "with --prior"
            )
        assert self.target is not None
        found, mine = target_of(run), self.target
        if not isinstance(found, NM) or self._in_full(found) != self._in_full(mine):
            alike = isinstance(found, NM) and found.title == mine.title
            which = " that leaves the same weights dense" if alike else ""
            raise UserError(
                f"--initial-logits {run} has learned {title(str(found))} and the target is {mine.title}: give a run of "
                f"{mine.title}{which}"
            )
        chunks = self.model.chunks
        wanted = {
            chunk: {key: value for key, value in parameters.items() if key.endswith("mask_logits")}
            for chunk, parameters in trained_parameters(chunks).items()
        }
        tiles = {} if self.tiles is None else {"tiles": self.tiles.state()}
        state = load_sharded(path, {"model": wanted, **tiles})
        load_parameters(chunks, state["model"])
        if self.tiles is not None:
            with fenced(f"checkpoint {path} does not fit this run", "use another one"):
                self.tiles.load_logits(state["tiles"])

    def _in_full(self, target: NM) -> NM:
        """The same with all weights by their names that stay dense, however they were named."""
        if target.dense_share:
            return target
        return replace(target, dense=tuple(name for name in prunable_shapes(self.model.config) if target.leaves(name)))

    @torch.no_grad()
    def keep(self) -> Kept:
        """Decode every linear's logits and write the masks. Collective."""
        here = {linear.name: linear for linear in self.model.linears()}
        with self.writer() or contextlib.nullcontext() as writer:
            kept = size = 0
            for layer in range(self.model.config.num_layers):
                masks: dict[str, Tensor] = {}
                for map in self.model.maps:
                    if map.layer != layer or not map.prunable:
                        continue
                    local = here[map.megatron].module.decided_mask() if map.megatron in here else None
                    mask = self.model.gather(map, None if local is None else local.to(torch.uint8)).bool()
                    kept, size = kept + int(mask.sum()), size + mask.numel()
                    masks.update(zip(map.hf, convert.split(map, mask, self.model.config), strict=True))
                if writer is not None and masks:
                    writer.add_layer(layer, masks)
        return Kept(kept, size)
