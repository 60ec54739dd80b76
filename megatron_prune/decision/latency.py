"""Budgets by measured time: a table of a layer's parts at several sizes, and what it says of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from megatron_prune.errors import UserError
from megatron_prune.files import write_result
from megatron_prune.foreign import read_json, strict
from megatron_prune.model.blocks import Block
from megatron_prune.model.config_json import LARGEST
from megatron_prune.model.families import ModelConfig
from megatron_prune.schema import Count, Word

SAME = ("family", "hidden_size", "kv_channels", "vocab_size")
"""What a table's model and a model that it is used for must have in common."""

_OPEN: ConfigDict = {**strict(), "extra": "ignore"}
_Microseconds = Annotated[float, Field(gt=0, le=1e15)]
_Size = Annotated[int, Field(ge=1, le=LARGEST["ffn_hidden_size"])]


@with_config(_OPEN)
class _Measured(TypedDict):
    """The model that a table is of: `SAME`."""

    family: Word
    hidden_size: _Size
    kv_channels: _Size
    vocab_size: Count


@with_config(_OPEN)
class _About(TypedDict):
    """What is read of the conditions; the rest is shown."""

    model: _Measured


@with_config(strict())
class _File(TypedDict):
    """What is in a table's file."""

    about: _About
    attention_us: Annotated[list[tuple[_Size, _Size, _Microseconds]], Field(min_length=1)]
    mlp_us: Annotated[list[tuple[_Size, _Microseconds]], Field(min_length=1)]
    rest_us: Annotated[float, Field(ge=0, le=1e15)]


@dataclass(frozen=True)
class LatencyTable:
    """Microseconds of the parts of a model, under conditions that `about` tells."""

    about: dict[str, Any]
    attention: dict[tuple[int, int], float]
    """(query heads, query groups) -> time, the norm before it included."""
    mlp: dict[int, float]
    """Neurons -> time, the norm before it included."""
    rest: float
    """Embedding, last norm and output layer."""

    def of(self, config: ModelConfig) -> int:
        """Microseconds of a model. UserError for one with other channels, or with attention that was not measured."""
        self.check(config)
        blocks = [config.block(layer) for layer in range(config.num_layers)]
        return round(self.rest + sum(self._attention(block) + self._mlp(block.ffn_hidden_size) for block in blocks))

    def check(self, config: ModelConfig) -> None:
        """UserError for a model that the table was not measured for."""
        wrong = [name for name in SAME if self.about["model"][name] != getattr(config, name)]
        if wrong:
            asked = ", ".join(
                f"{name} {getattr(config, name)} (the table: {self.about['model'][name]})" for name in wrong
            )
            raise UserError(f"the latency table is of another model: {asked}; measure this one with `latency`")

    def _attention(self, block: Block) -> float:
        heads, groups = block.num_attention_heads, block.num_query_groups
        if not heads:
            return 0.0
        known = {h: time for (h, g), time in self.attention.items() if g == groups}
        if not known:
            raise UserError(f"the latency table has no attention with {groups} query groups: measure more --levels")
        return _between(known, heads)

    def _mlp(self, neurons: int) -> float:
        return _between(self.mlp, neurons) if neurons else 0.0

    def save(self, path: Path) -> None:
        """Write as JSON."""
        attention = [[*size, time] for size, time in self.attention.items()]
        content = {"about": self.about, "attention_us": attention, "mlp_us": [*map(list, self.mlp.items())]}
        write_result(path, content | {"rest_us": self.rest})

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read what `save` wrote; UserError for anything else."""
        what = "a latency table (make one with `latency`)"
        content = read_json(path, what, _File)
        attention = {(heads, groups): time for heads, groups, time in content["attention_us"]}
        about = read_json(path, what)["about"]
        return cls(about, attention, dict(content["mlp_us"]), content["rest_us"])


def _between(known: dict[int, float], size: int) -> float:
    """Time at a size, on the line between its neighbours, the smallest size's neighbour being 0 at no time."""
    sizes = sorted(known)
    if size > sizes[-1]:
        raise UserError(f"the latency table ends at size {sizes[-1]} and {size} was asked for: measure this model")
    return float(np.interp(size, [0, *sizes], [0.0, *(known[measured] for measured in sizes)]))
