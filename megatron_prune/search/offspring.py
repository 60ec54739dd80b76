"""Candidates judged, as they are or after a moment of training with what was pruned staying zero.

Training is that of every other verb: megatron-core's schedule, DDP and optimizer in the run's layout, float32 masters.
The model takes a candidate's weights in its own shape, zeros in place of what is gone, so any layout can train it, and
gets its dense weights back afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import megatron_prune.backend as backend  # isort: skip  # noqa: F401  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.log import say
from megatron_prune.model.forward import sequence_parts
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Training
from megatron_prune.search.candidates import draw_windows, put, silence
from megatron_prune.search.evolution import Stage
from megatron_prune.search.fitness import Genome, divergence_sums, divergences
from megatron_prune.search.levels import Levels
from megatron_prune.statistics.walk import Head, LayerWalk, WholeWeights, sum_over_ranks
from megatron_prune.training.loop import Diverged, Trainer
from megatron_prune.training.zeros import Zeros


class Judge:
    """Scores candidates on windows of the calibration text `[windows, length]`, and trains on others of them."""

    def __init__(self, model: PrunableModel, levels: Levels, tokens: Tensor | None, lr: float, batch: int) -> None:
        assert tokens is not None
        self.model = model
        self.levels = levels
        self.tokens = tokens
        self.lr = lr
        self.batch = batch
        self.school: School | None = None

    def score(self, candidates: Sequence[Genome], stage: Stage, rng: random.Random) -> list[float]:
        """KL divergences from the whole model, nats per token, of all candidates on the same windows. Collective."""
        chosen = draw_windows(self.tokens, stage.fitness_tokens, rng)
        if not stage.training_tokens:
            return divergences(self.model, self.levels, candidates, self.tokens[chosen])
        if self.school is None:
            self.school = School(self.model, self.tokens, self.lr, self.batch)
        others = [n for n in range(len(self.tokens)) if n not in chosen]
        rng.shuffle(others)
        reference = Reference(self.model, self.tokens[chosen])
        return [self._trained_score(self.school, genome, others, stage, reference) for genome in candidates]

    def _trained_score(
        self, school: School, genome: Genome, windows: list[int], stage: Stage, reference: Reference
    ) -> float:
        """Of one candidate after its training; infinite when that fails."""
        put(self.model, self.levels, genome)
        try:
            school.train(windows, stage.training_tokens)
        except Diverged as error:
            say(f"a candidate is given up: {error}")
            return float("inf")
        else:
            silence(self.model, self.levels, genome)
            return reference.divergence(self.model)
        finally:
            school.restore()


class Reference:
    """What the whole model says of windows `[n, length]`."""

    def __init__(self, model: PrunableModel, windows: Tensor) -> None:
        self.windows = windows
        self.final, self.head = self._final(model)

    def _final(self, model: PrunableModel) -> tuple[list[Tensor], Head]:
        walk = LayerWalk(WholeWeights(model), self.windows)
        walk.finish()
        return walk.hidden, Head(walk.weights)

    @torch.no_grad()
    def divergence(self, model: PrunableModel) -> float:
        """Mean KL(whole || model) per token. Collective."""
        states, head = self._final(model)
        total = divergence_sums(head, states, self.head, self.final)
        sum_over_ranks([total])
        return float(total[0] / total[1])


class School:
    """A short training of the model on windows `[n, length]`, always from a fresh optimizer."""

    def __init__(self, model: PrunableModel, tokens: Tensor, lr: float, batch: int) -> None:
        self.length = training_length(tokens.shape[1], sequence_parts(model.layout))
        self.model = model
        self.tokens = tokens
        self.windows: list[int] = []
        self.dense = {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.parameters.items()}
        self.batch = batch
        training = Training(
            seq_length=self.length,
            micro_batch_size=1,
            global_batch_size=self.batch,
            train_iters=1,
            lr=lr,
            min_lr=lr,
            lr_decay_style="constant",
        )
        self.zeros: Zeros | None = None
        self.trainer = Trainer(model, training, self, before_update=self._clear)

    def sample(self, index: int) -> Tensor:
        """Training window number `index`, `[length + 1]`."""
        return self.tokens[self.windows[index % len(self.windows)]][: self.length + 1]

    def _clear(self) -> None:
        assert self.zeros is not None
        self.zeros.clear_gradients()

    def train(self, windows: list[int], tokens: int) -> None:
        """Train the model as it is now on `tokens` tokens or a few more of these windows; zeros stay. Collective."""
        self.windows = windows
        self.zeros = Zeros(self.model)
        _start_afresh(self.trainer.optimizer)
        for step in range(max(1, -(-tokens // (self.batch * self.length)))):
            self.trainer.step(step)
        self.zeros.check("after training a candidate")
        self.model.eval()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model its dense weights back."""
        for name, parameter in self.model.parameters.items():
            parameter.copy_(self.dense[name])


def training_length(length: int, parts: int) -> int:
    """Tokens of a calibration window of `length` that are trained on: the same in every layout that can have them.

    UserError when this layout cuts sequences into `parts` that do not divide it.
    """
    unit = 64 if length > 1024 else 8
    found = (length - 1) // unit * unit
    if not found or found % parts:
        raise UserError(
            f"--calibration-seq-length {length}: candidates would train on {found} tokens of a window, and this layout "
            f"needs a multiple of {parts}, above 0: give longer windows, or --training-tokens 0"
        )
    return found


def _start_afresh(optimizer: Any) -> None:
    """Forget the moments, and take the model's weights as masters."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.optimizer.state.clear()
        for group in part.optimizer.param_groups:
            group.pop("step", None)  # where Apex and Transformer Engine count
    optimizer.reload_model_params()
