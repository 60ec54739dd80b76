"""The time of a layer's attention and MLP at several sizes, measured for budgets (`decision/latency.py`).

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
from dataclasses import replace

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.nn.functional as F

from megatron_prune.config import LatencyConfig
from megatron_prune.decision.latency import SAME, LatencyTable
from megatron_prune.decision.source import open_model
from megatron_prune.errors import UserError
from megatron_prune.log import environment, progress
from megatron_prune.model.blocks import Block, widest
from megatron_prune.model.build import DTYPES, rotary, whole_layer, whole_norm
from megatron_prune.model.families import ModelConfig
from megatron_prune.search.levels import attention_levels, mlp_levels


def measured(config: LatencyConfig) -> tuple[LatencyTable, int]:
    """A table of `config.input`, and the time of the whole model by it, in microseconds. By one process."""
    if backend.world_size() > 1:
        raise UserError(f"{backend.world_size()} processes were started; latency takes one process and one device")
    model = open_model(config.input).config
    model.check_length(config.prompt_length)
    if model.num_moe_experts:
        raise UserError(f"latency: {config.input} has experts, whose time depends on the text; allowed: models without")
    with backend.running(backend.Layout()):
        table = measure(model, config)
    return table, table.of(replace(model, dtype=config.dtype or model.dtype))


def measure(model: ModelConfig, config: LatencyConfig) -> LatencyTable:
    """Time every part, in turn, `repeats` times, after one that does not count; the medians count."""
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
    largest = widest([model.block(n) for n in range(model.num_layers)])  # of a model neither half may lack
    both = model.with_blocks([block, largest])
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
