"""The `latency` verb, and budgets by what it has measured: the time of a layer's attention and MLP at several sizes.

A model's time is that of its layers' halves, each by its own size, and of what is around them. Every half is timed on
this device by itself, unsharded, on a batch of prompts; between two measured sizes time is interpolated. What ties
layers together (memory traffic between them, communication) is not seen, so a table says which of two models is faster
and by about how much, under its own conditions.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from megatron_prune.config import LatencyConfig
from megatron_prune.errors import UserError
from megatron_prune.files import refuse_existing, write_result
from megatron_prune.foreign import read_json, strict
from megatron_prune.log import environment, progress, say
from megatron_prune.model.blocks import Block
from megatron_prune.model.build import DTYPES, rotary, whole_layer, whole_norm
from megatron_prune.model.families import ModelConfig
from megatron_prune.model.family import LARGEST
from megatron_prune.model.source import open_model
from megatron_prune.schema import Count, Word

SAME = ("family", "hidden_size", "kv_channels", "vocab_size")
"""What a table's model and a model that it is used for must have in common."""


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


def _between(known: dict[int, float], size: int) -> float:
    """Time at a size, on the line between its neighbours, the smallest size's neighbour being 0 at no time."""
    sizes = sorted(known)
    if size > sizes[-1]:
        raise UserError(f"the latency table ends at size {sizes[-1]} and {size} was asked for: measure this model")
    return float(np.interp(size, [0, *sizes], [0.0, *(known[measured] for measured in sizes)]))


def run(config: LatencyConfig) -> None:
    """Measure and write the table."""
    refuse_existing(config.output)
    if backend.world_size() > 1:
        raise UserError(f"{backend.world_size()} processes were started; latency takes one process and one device")
    model = open_model(config.input).config
    model.check_length(config.prompt_length)
    with backend.running(backend.Layout()):
        table = measure(model, config)
    table.save(config.output)
    whole = table.of(replace(model, dtype=config.dtype or model.dtype))
    say(f"{config.output}: the whole model takes {whole} us for {config.batch_size} x {config.prompt_length} tokens")


def measure(model: ModelConfig, config: LatencyConfig) -> LatencyTable:
    """Time every part, in turn, `repeats` times, after one that does not count; the medians count."""
    from megatron_prune.search.levels import attention_levels, mlp_levels

    heads = {
        (level.groups * level.heads, level.groups)
        for layer, free in itertools.product(range(model.num_layers), (False, True))
        for level in attention_levels(model, layer, config.levels, free)
        if level.groups
    }
    widths = {
        level.ffn for layer in range(model.num_layers) for level in mlp_levels(model, layer, config.levels) if level.ffn
    }
    dtype = config.dtype or model.dtype
    blocks = [*(Block(*size, 0) for size in sorted(heads)), *(Block(0, 0, width) for width in sorted(widths))]
    parts = [*(_half(model, block, dtype, config) for block in blocks), _rest(model, dtype, config)]
    *times, rest = _medians(parts, config.repeats)
    attention = dict(zip(sorted(heads), times, strict=False))
    mlp = dict(zip(sorted(widths), times[len(heads) :], strict=True))
    about = {
        "model": {name: getattr(model, name) for name in SAME},
        "dtype": dtype,
        "batch_size": config.batch_size,
        "prompt_length": config.prompt_length,
        "repeats": config.repeats,
        "environment": environment(),
    }
    return LatencyTable(about, attention, mlp, rest)


def _half(model: ModelConfig, block: Block, dtype: str, config: LatencyConfig) -> Callable[[], object]:
    """A layer of which only this half is there."""
    both = replace(model, blocks=None).with_blocks([block, model.block(0)])
    layer = whole_layer(both, DTYPES[dtype], 0)
    hidden = _hidden(model, dtype, config)
    angles = rotary(model, config.prompt_length, backend.alone().cp)
    return lambda: layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles)


def _rest(model: ModelConfig, dtype: str, config: LatencyConfig) -> Callable[[], object]:
    """What is around the layers."""
    norm = whole_norm(model, DTYPES[dtype])
    words = torch.randn(model.vocab_size, model.hidden_size, dtype=DTYPES[dtype], device=backend.device())
    shape = (config.prompt_length, config.batch_size)
    tokens = torch.randint(model.vocab_size, shape, device=backend.device())
    return lambda: F.linear(norm(F.embedding(tokens, words)), words)


def _hidden(model: ModelConfig, dtype: str, config: LatencyConfig) -> torch.Tensor:
    shape = (config.prompt_length, config.batch_size, model.hidden_size)
    return torch.randn(shape, dtype=DTYPES[dtype], device=backend.device())


@torch.no_grad()
def _medians(parts: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Microseconds of each part; the parts take turns, so that a busy moment is not all one part's."""
    times: list[list[float]] = [[] for _ in parts]
    with progress("latency", repeats + 1, "rounds") as advance:
        for _ in range(repeats + 1):
            for part, found in zip(parts, times, strict=True):
                began = _now()
                part()
                found.append((_now() - began) * 1e6)
            advance(1)
    return [statistics.median(found[1:]) for found in times]


def _now() -> float:
    """Seconds, once the device has done what it was given."""
    if backend.has_cuda():
        torch.cuda.synchronize()
    return time.perf_counter()
