"""The losses of recovery training in their sum, and what a teacher must be like: what engines share, without PyTorch.

The losses are computed in `losses.py` with PyTorch and in `maxtext/distill.py` with JAX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from megatron_prune.errors import UserError
from megatron_prune.model.sizes import ModelConfig
from megatron_prune.option_groups import Losses

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
