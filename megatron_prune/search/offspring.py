"""Candidates judged, as they are or after a moment of training with what was pruned staying zero.

Training is that of every other verb: megatron-core's schedule, DDP and optimizer in the run's layout, float32 masters.
The model takes a candidate's weights in its own shape, zeros in place of what is gone, so any layout can train it, and
gets its dense weights back afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import megatron_prune.backend as backend  # isort: skip
import torch
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.log import say
from megatron_prune.model.forward import sequence_parts
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Training
from megatron_prune.search.candidates import put, silence
from megatron_prune.search.fitness import Genome, divergences, window_divergences
from megatron_prune.search.levels import Levels
from megatron_prune.search.memory import Memory
from megatron_prune.statistics.walk import Head, LayerWalk, WholeWeights, sum_over_ranks
from megatron_prune.training.loop import Diverged, Trainer
from megatron_prune.training.zeros import Zeros

AT_A_TIME = 64
"""So many candidates share a pass; each holds hidden states."""


class Judge:
    """Divergences of candidates on a list of held-out windows `[windows, length]`; `school` trains them on others."""

    def __init__(
        self, model: PrunableModel, levels: Levels, held_out: Tensor, memory: Memory, school: Callable[[], School]
    ) -> None:
        self.windows, self.length = held_out.shape
        self.model, self.levels, self.held_out, self.memory = model, levels, held_out, memory
        self._make_school = school
        self._whole: dict[int, Tensor] = {}
        self._trained: tuple[School, Reference] | None = None

    def __call__(self, genomes: Sequence[Genome], trained: int, windows: int) -> list[list[float]]:
        """KL divergences from the whole model, nats per token, on the first `windows` of the list. Collective.

        `trained`: tokens that candidates are trained on before, each from the database and the same windows.
        """
        found = {genome: self.memory.known(genome, trained) for genome in genomes}
        for known in sorted({len(scores) for scores in found.values() if len(scores) < windows}):
            pool = [genome for genome, scores in found.items() if len(scores) == known]
            for first in range(0, len(pool), AT_A_TIME):
                some = pool[first : first + AT_A_TIME]
                for genome, scores in zip(some, self._measured(some, trained, slice(known, windows)), strict=True):
                    found[genome] = found[genome] + scores
        self.memory.keep(trained, found)
        return [found[genome][:windows] for genome in genomes]

    def _measured(self, genomes: Sequence[Genome], trained: int, windows: slice) -> list[list[float]]:
        if not trained:
            return divergences(self.model, self.levels, genomes, self.held_out, windows, self._whole)
        if self._trained is None:  # before a candidate is put into the model: what the whole one says
            self._trained = self._make_school(), Reference(self.model, self.held_out)
        school, reference = self._trained
        return [self._of_trained(school, reference, genome, trained, windows) for genome in genomes]

    def _of_trained(
        self, school: School, reference: Reference, genome: Genome, trained: int, windows: slice
    ) -> list[float]:
        """Of one candidate after its training; infinite when that fails."""
        put(self.model, self.levels, genome)
        try:
            school.train(trained)
        except Diverged as error:
            say(f"a candidate is given up: {error}")
            return [math.inf] * (windows.stop - windows.start)
        else:
            silence(self.model, self.levels, genome)
            return reference.divergences(self.model, windows)
        finally:
            school.restore()


class Reference:
    """What the whole model says of windows `[n, length]`."""

    def __init__(self, model: PrunableModel, tokens: Tensor) -> None:
        self.tokens = tokens
        self.final = self._final(model, tokens)
        self.head = Head(WholeWeights(model))

    def _final(self, model: PrunableModel, tokens: Tensor) -> dict[int, Tensor]:
        """Hidden states after the last layer, of this rank's windows by number."""
        walk = LayerWalk(WholeWeights(model), tokens, unit_windows=1)
        walk.finish()
        return dict(zip((unit.start for unit in walk.units), walk.hidden, strict=True))

    @torch.no_grad()
    def divergences(self, model: PrunableModel, windows: slice) -> list[float]:
        """KL(whole || model), nats per token, of some of the windows. Collective."""
        found = torch.zeros(len(self.tokens), dtype=torch.float64, device=backend.device())
        head = Head(WholeWeights(model))
        for number, hidden in self._final(model, self.tokens[: windows.stop]).items():
            if number >= windows.start:
                found[number] = window_divergences(head, [hidden], self.head, self.final[number])[0]
        sum_over_ranks([found])
        return found[windows].tolist()


class School:
    """A short training of the model on windows `[n, length]`, always from a fresh optimizer."""

    def __init__(self, model: PrunableModel, tokens: Tensor, lr: float, batch: int) -> None:
        """Its order is that of the windows: a candidate learns the same whenever it is asked for."""
        self.length = training_length(tokens.shape[1], sequence_parts(model.layout))
        self.model = model
        self.tokens = tokens
        self.dense = model.copied(model.parameters)
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
        return self.tokens[index % len(self.tokens)][: self.length + 1]

    def _clear(self) -> None:
        assert self.zeros is not None
        self.zeros.clear_gradients()

    def train(self, tokens: int) -> None:
        """Train the model as it is now on `tokens` tokens or a few more; zeros stay. Collective."""
        self.zeros = Zeros(self.model)
        _start_afresh(self.trainer.optimizer)
        for step in range(max(1, -(-tokens // (self.batch * self.length)))):
            self.trainer.step(step)
        self.zeros.check("after training a candidate")
        self.model.eval()

    def restore(self) -> None:
        """Give the model its dense weights back."""
        self.model.put_back(self.dense)


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
