"""The pictures of a report: curves as SVG whose lines the page can hide, and kept units as small images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_prune.decision.units import BlockUnits
from megatron_prune.errors import UserError
from megatron_prune.log import LEFT_START
from megatron_prune.reporting.collect import Removed, Run

CURVES = {
    "loss": "training loss (nats per token)",
    "eval_loss": "held-out loss (nats per token)",
    "mask_entropy": "mask entropy (nats per group)",
    "max_probability": "mean probability of the best pattern",
    LEFT_START: "share of the groups that left their start",
    "fitness": "fitness of the best candidate (KL divergence, nats)",
    "learning_rate": "learning rate",
}
"""Metrics that are drawn, where a run has logged them."""
COLOURS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf".split()
"""Of the runs' lines, in turn."""
KEPT, REMOVED, ABSENT = (31, 119, 180), (225, 225, 225), (250, 235, 215)
"""Colours of a unit that stays, of one that went, and of units of a layer that went as a whole."""


def curves(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(title, SVG) of every metric of `CURVES` that some run has at two steps or more; a run's line has its number."""
    figures = []
    for key, title in CURVES.items():
        lines = {number: points for number, run in enumerate(runs) if len(points := series(run.metrics, key)) > 1}
        if lines:
            figures.append((title, _plot(lines, runs, title)))
    return figures


def series(metrics: Iterable[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of one metric."""
    values = [(line["step"], line[key]) for line in metrics if key in line and "step" in line]
    return [(step, math.nan if value is None else value) for step, value in values if not isinstance(value, list)]


def _plot(lines: dict[int, list[tuple[int, float]]], runs: Sequence[Run], title: str) -> str:
    try:
        import matplotlib
    except ImportError:
        raise UserError("report draws with matplotlib, which is not installed: pip install matplotlib") from None
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "megatron-prune", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for number, points in lines.items():
            steps, values = zip(*points, strict=True)
            marker = "." if len(points) < 30 else None
            (line,) = axes.plot(
                steps, values, label=runs[number].name, color=COLOURS[number % len(COLOURS)], marker=marker
            )
            line.set_gid(f"run-{number}-line")
        axes.set_xlabel("step")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


class Picture(NamedTuple):
    """Units of one kind; in the image a row is a layer and a column a unit."""

    title: str
    image: str
    """PNG as a data URI."""
    kept: int
    all: int
    width: int
    """On the page, in pixels."""
    height: int


def units(removed: Removed) -> list[Picture]:
    """Heads, groups, neurons, experts and channels."""
    before, stays = removed.before, removed.units
    layers = dict(zip(stays.layers, stays.blocks, strict=True))
    pictures = []
    sparse = {layer for layer, block in layers.items() if block.experts}
    kinds = {"heads": "num_attention_heads", "groups": "num_query_groups", "ffn": "ffn_hidden_size"}
    kinds |= {"experts": "num_moe_experts"} if sparse else {}
    inner = {layer: block for layer, block in layers.items() if block.expert_ffn}
    for kind, size in kinds.items():
        there = {"ffn": layers.keys() - sparse, "experts": sparse}.get(kind, layers.keys())
        rows = [getattr(layers[layer], kind) if layer in there else None for layer in range(before["num_layers"])]
        title = {"heads": "query heads", "groups": "query groups", "ffn": "MLP neurons", "experts": "experts"}[kind]
        if there:
            pictures.append(_picture(title, rows, before[size]))
    if inner:
        each = before["moe_ffn_hidden_size"]
        rows = [_of_experts(layers[n], each) if n in inner else None for n in range(before["num_layers"])]
        pictures.append(_picture("neurons of experts, side by side", rows, before["num_moe_experts"] * each))
    pictures.append(_picture("channels of the residual stream", [stays.hidden], before["hidden_size"]))
    return pictures


def _of_experts(block: BlockUnits, width: int) -> list[int]:
    """Neurons that stay in a layer's experts, those of each behind those of the one before."""
    pairs = zip(block.experts, block.expert_ffn, strict=True)
    return [expert * width + neuron for expert, neurons in pairs for neuron in neurons]


def load(layers: Sequence[Sequence[int]]) -> Picture:
    """Tokens of experts: a row for each layer, a column for each expert; the darker the more, blue twice an even share.

    `kept` are the experts that get any.
    """
    width = max(map(len, layers))
    image = np.full((len(layers), width, 3), ABSENT, np.uint8)
    full, empty = np.array(KEPT, np.float64), np.array((255, 255, 255), np.float64)
    for number, layer in enumerate(layers):
        share = np.minimum(1.0, np.array(layer, np.float64) * len(layer) / max(1, sum(layer)) / 2)[:, None]
        image[number, : len(layer)] = np.rint(share * full + (1 - share) * empty)
    used = sum(count > 0 for layer in layers for count in layer)
    size = (min(900, 16 * width), max(14, 10 * len(layers)))
    return Picture("tokens of experts", _png(image), used, sum(map(len, layers)), *size)


def _picture(title: str, rows: Sequence[Sequence[int] | None], width: int) -> Picture:
    image = np.full((len(rows), width, 3), REMOVED, np.uint8)
    kept = 0
    for number, row in enumerate(rows):
        if row is None:
            image[number] = ABSENT
        else:
            image[number, list(row)] = KEPT
            kept += len(row)
    return Picture(title, _png(image), kept, len(rows) * width, min(900, 16 * width), max(14, 6 * len(rows)))


def _png(image: np.ndarray) -> str:
    """uint8 [rows, columns, 3] -> data URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
