"""How long the windows of a text are: what is usual or asked for, and no more than the model reads."""

from __future__ import annotations

from dataclasses import fields, replace

from megatron_prune.log import say
from megatron_prune.model.families import ModelConfig
from megatron_prune.option_groups import Training
from megatron_prune.options import flag

USUAL = next(field.default for field in fields(Training) if field.name == "seq_length")
"""Tokens of a training window where none are given."""


def readable(key: str, length: int, model: ModelConfig) -> int:
    """`length`, which an option has, or what the model reads where that is less; then a line says so."""
    longest = model.max_position_embeddings
    if length > longest:
        say(f"windows of {longest} tokens, which is what the model reads, in place of {flag(key)} {length}")
    return min(length, longest)


def fitting(training: Training, model: ModelConfig) -> Training:
    """The same; windows of the usual length are no longer than what the model reads.

    Longer ones that were asked for stay: rotary positions go on beyond what a model was made for.
    """
    if training.seq_length != USUAL:
        return training
    return replace(training, seq_length=readable("seq_length", USUAL, model))
