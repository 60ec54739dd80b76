"""How large a model is, in words: what verbs say of what they made, and the first line of `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatron_prune.model.cost import active_parameters, parameters
from megatron_prune.model.families import ModelConfig

WEIGHTS = (".safetensors", ".bin", ".distcp")
"""Ends of files that hold weights."""


class Zeros(NamedTuple):
    """Of a model's prunable weights."""

    zeros: int
    size: int

    def told(self) -> str:
        """In words."""
        return f"{self.zeros:,} of {self.size:,} prunable weights are zero ({self.zeros / max(1, self.size):.4f})"


def summary(config: ModelConfig, folder: Path | None = None) -> str:
    """Family, parameters, type and, of a folder, bytes of its weights, of all models with the same words."""
    size = f", {told_bytes(weight_bytes(folder))}" if folder is not None else ""
    active = f" ({active_parameters(config):,} for each token)" if config.num_moe_experts else ""
    return f"{config.family}, {parameters(config):,} parameters{active}, {config.dtype}{size}"


def weight_bytes(folder: Path) -> int:
    """Of the files that hold weights, in a folder and below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in WEIGHTS)


def told_bytes(count: int) -> str:
    """With two or more figures."""
    for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= 10 * size or (name == "KiB" and count >= size):
            return f"{count / size:,.1f} {name}"
    return f"{count} bytes"
