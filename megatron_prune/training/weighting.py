"""The losses of recovery training in their sum, and what a teacher must be like: what engines share, without PyTorch.

The losses are computed in `losses.py` with PyTorch and in `maxtext/distill.py` with JAX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_prune.claims import real
from megatron_prune.errors import UserError
from megatron_prune.model.sizes import ModelConfig
from megatron_prune.option_groups import Losses, Parallelism, Training
from megatron_prune.options import flatten

HiddenLoss = Literal["cosine", "mse"]


@dataclass(frozen=True)
class Weighting:
    """Weights of the losses in their sum, and their settings."""

    lm: float = 1.0
    distillation: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0
    hidden_kind: HiddenLoss = "cosine"

    @classmethod
    def of(cls, losses: Losses) -> Weighting:
        """Those of the options."""
        x = losses
        return cls(x.lm, x.distillation, x.hidden_weight, x.distillation_temperature, x.hidden_loss)

    @property
    def parts(self) -> dict[str, float]:
        """Weights by the names that losses are logged with; those of 0 are left out."""
        weights = {"lm_loss": self.lm, "distillation_loss": self.distillation, "hidden_loss": self.hidden}
        return {name: weight for name, weight in weights.items() if weight}

    def total(self, losses: dict[str, float]) -> float:
        """The weighted sum."""
        return sum(weight * losses[name] for name, weight in self.parts.items())


def settled(losses: Losses) -> dict[str, Any]:
    """The options by key, as a run records what it lowers; wherever it is resumed from, the teacher is the same."""
    found = flatten(losses)
    if losses.teacher:
        found["teacher"] = str(losses.teacher.resolve())
    return found


def teaches_itself(losses: Losses, model: Path, dtype: str, weights_stay: bool) -> bool:
    """Whether the teacher is the model at `model` itself, of type `dtype`: then a second one is not needed."""
    same = losses.teacher is not None and real(losses.teacher) == real(model)
    return same and weights_stay and losses.teacher_dtype in (None, dtype)


def teacher_layer(layer: int, layers: int, of: int) -> int:
    """The layer of a teacher of `of` layers at the same relative depth as `layer` of a student of `layers`, from 0.

    Rounded up, so that last belongs to last, and a pipeline that splits both evenly has both on the same stage.
    """
    return math.ceil((layer + 1) * of / layers) - 1


class Described(Protocol):
    """A model that has been looked at, on disk."""

    @property
    def config(self) -> ModelConfig:
        """Its sizes."""

    @property
    def tokenizer(self) -> Path:
        """Folder of its tokenizer."""


def check_way(losses: Losses, training: Training, layout: Parallelism) -> None:
    """UserError for a layout, or a way to save memory, in which a teacher cannot be listened to."""
    if losses.teacher is not None and layout.virtual_pipeline_model_parallel_size:
        raise UserError(
            f"--teacher {losses.teacher}: not with --virtual-pipeline-model-parallel-size; leave one of them out"
        )
    if losses.hidden_weight and training.recompute:
        raise UserError("--hidden-weight: not with --recompute, whose layers leave no outputs; leave one of them out")


def check_teacher(losses: Losses, given: Path, student: Described, teacher: Described) -> None:
    """UserError for a teacher that the student, which is at `given`, cannot learn from by these losses."""
    own, other = student.config, teacher.config
    if own.vocab_size != other.vocab_size or _vocabulary(student) != _vocabulary(teacher):
        raise UserError(
            f"--teacher {losses.teacher}: its vocabulary is not that of --input {given}; give a teacher that shares it"
        )
    deep_enough = own.num_layers <= other.num_layers
    if losses.hidden_weight and not (own.hidden_size == other.hidden_size and deep_enough):
        raise UserError(
            f"--hidden-weight: the student has {own.num_layers} layers of width {own.hidden_size}, the teacher "
            f"{other.num_layers} of {other.hidden_size}; allowed: equal widths, a teacher at least as deep"
        )


def _vocabulary(model: Described) -> dict[str, int]:
    from megatron_prune.data.tokenizer import load_tokenizer  # it loads transformers

    return load_tokenizer(model.tokenizer, model.config.vocab_size).get_vocab()
