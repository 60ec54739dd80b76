"""Passes over calibration data, the same in every parallel layout.

`layerwise` visits the decoder layers in order. Every rank rebuilds the *whole* layer and runs it, unsharded, on its own
share of the calibration windows: weights travel between ranks, activations never do. A window is therefore computed by
the same arithmetic in every layout, statistics are sums over fixed units of windows kept in float64, and the decision
drawn from them is the same on one process and on many. It also uses all ranks, those of other pipeline stages too, and
needs no tensor-parallel communication inside a layer; it costs one layer's weights and one rank's share of the
activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.apply.decision import MaskWriter
from megatron_prune.methods.base import Kept
from megatron_prune.model import convert
from megatron_prune.model.build import rotary, whole_layer
from megatron_prune.model.families import WeightMap
from megatron_prune.model.prunable import LINEARS, PrunableModel

UNIT_TOKENS = 2048
"""Calibration windows are run and accumulated in units of about so many tokens, the same units in every layout."""


def units(windows: int, length: int) -> list[slice]:
    """Fixed groups of consecutive windows: what is computed together never depends on who computes it."""
    width = max(1, UNIT_TOKENS // length)
    return [slice(start, start + width) for start in range(0, windows, width)]


def row_span(rows: int, part: int, parts: int) -> tuple[int, int]:
    """First row and one past the last of contiguous share `part` of `parts`."""
    return rows * part // parts, rows * (part + 1) // parts


class WholeLinear:
    """One linear of the layer that is being pruned: this rank's share of its complete rows."""

    def __init__(self, runner: Runner, map: WeightMap, weight: Tensor, statistic: Any) -> None:
        self.runner = runner
        self.map = map
        self.name = map.megatron
        self.statistic = statistic
        self.blocks = convert.row_blocks(map, runner.model.config)
        self.whole_weight = weight
        self.start, self.stop = row_span(weight.shape[0], dist.get_rank(), dist.get_world_size())
        self.mask: Tensor | None = None
        self.new_weight: Tensor | None = None

    def weight(self) -> Tensor:
        """This rank's rows `[rows_here, in]` in float32."""
        return self.whole_weight[self.start : self.stop].float()

    def local(self, x: Tensor) -> Tensor:
        """This rank's rows of `x [out, k]`."""
        return x[self.start : self.stop]

    def gather(self, x: Tensor) -> Tensor:
        """`[rows_here, k]` of every rank, joined to `[out, k]` in row order. Collective."""
        world, rows = dist.get_world_size(), self.whole_weight.shape[0]
        if world == 1:
            return x
        spans = [row_span(rows, r, world) for r in range(world)]
        longest = max(stop - start for start, stop in spans)
        padded = F.pad(x.to(torch.uint8) if x.dtype == torch.bool else x, (0, 0, 0, longest - x.shape[0]))
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded.contiguous())
        joined = torch.cat([p[: stop - start] for p, (start, stop) in zip(parts, spans, strict=True)])
        return joined.to(x.dtype)

    def keep(self, mask: Tensor, weight: Tensor | None = None) -> None:
        """Decide: `mask [rows_here, in]` True = kept, and the compensated weight where the method changes it."""
        self.mask = mask
        self.new_weight = weight


class Runner:
    """Runs passes over the calibration windows for pruning methods and records what they decide.

    tokens: `[windows, length]` int64, the same on every rank. `writer` receives the masks (rank 0).
    """

    def __init__(
        self,
        model: PrunableModel,
        tokens: Tensor | None,
        writer: MaskWriter | None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.writer = writer
        self.progress = progress or (lambda layers: None)
        self.weights_changed = False
        self.kept = 0
        self.size = 0

    @torch.no_grad()
    def layerwise(self, statistic: Callable[..., Any] | None, sequential: bool = False) -> Iterator[WholeLinear]:
        """Every prunable linear in model order, with its statistic over all calibration windows.

        `statistic(in_features, device)` is updated with the inputs `[tokens, in]` of one unit of windows at a time;
        None asks for no data at all. Each linear must be given a decision with `keep` before the next one is taken;
        the inputs of later layers come from the pruned earlier ones. With `sequential` this also holds inside a
        layer, at the price of one more pass over part of the layer for each of its linears.
        """
        layers = self.model.config.num_layers
        walk = _LayerWalk(self.model, self.tokens) if statistic else None
        for number in range(layers):
            whole = {map.megatron: self.model.whole(map) for map in self._layer_maps(number)}
            masks: dict[str, Tensor] = {}
            for paths in [[path] for path in LINEARS] if sequential else [list(LINEARS)]:
                maps = [self.model.by_name[f"decoder.layers.{number}.{path}.weight"] for path in paths]
                found = walk.collect(whole, number, statistic, paths) if walk and statistic else [None] * len(maps)
                linears = [WholeLinear(self, m, whole[m.megatron], s) for m, s in zip(maps, found, strict=True)]
                yield from linears
                masks.update(self._settle(linears, whole))
            if self.writer is not None:
                self.writer.add_layer(number, masks)
            if walk:
                walk.advance(whole, number)
            self.progress(1)

    def masks(self) -> Kept:
        """How much the method kept; the masks themselves are in the writer's folder."""
        return Kept(self.kept, self.size)

    def _layer_maps(self, number: int) -> list[WeightMap]:
        return [map for map in self.model.maps if map.layer == number]

    def _settle(self, linears: list[WholeLinear], whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Join the rows decided by all ranks, prune every rank's whole layer; the masks by Hugging Face name."""
        hf_masks: dict[str, Tensor] = {}
        for linear in linears:
            if linear.mask is None:
                raise RuntimeError(f"the method left {linear.name} undecided: call keep() on every linear")
            mask = linear.gather(linear.mask)
            if linear.new_weight is not None:
                dense = linear.gather(linear.new_weight).to(linear.whole_weight.dtype)
                self.weights_changed = True
                self.model.assign(linear.map, dense * mask)
            else:
                dense = linear.whole_weight
            whole[linear.name] = dense * mask
            self.kept += int(mask.sum())
            self.size += mask.numel()
            hf_masks.update(zip(linear.map.hf, convert.split(linear.map, mask, self.model.config), strict=True))
        return hf_masks


class _InputsKnown(Exception):
    """Every linear that was asked for has seen its input; what follows would be thrown away."""


class _LayerWalk:
    """Hidden states of this rank's calibration windows, moved through the model one whole layer at a time."""

    def __init__(self, model: PrunableModel, tokens: Tensor | None) -> None:
        if tokens is None:
            raise RuntimeError("this method needs calibration windows")
        self.device = backend.device()
        self.layer = whole_layer(model.config, next(model.chunks[0].parameters()).dtype)
        mine = units(*tokens.shape)[dist.get_rank() :: dist.get_world_size()]
        self.hidden = _embedded(model, [tokens[unit].t().to(self.device) for unit in mine])
        self.rotary = rotary(model.config, tokens.shape[1], backend.alone().cp)
        self.inputs: dict[str, Tensor] = {}
        self.last_wanted: str | None = None
        for path in LINEARS:
            self.layer.get_submodule(path).register_forward_pre_hook(self._remember(path))

    def _remember(self, path: str) -> Callable[..., None]:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            self.inputs[path] = inputs[0].flatten(0, 1)
            if path == self.last_wanted:
                raise _InputsKnown

        return hook

    def _load(self, whole: dict[str, Tensor], number: int) -> None:
        prefix = f"decoder.layers.{number}."
        for name, parameter in self.layer.named_parameters():
            parameter.copy_(whole[prefix + name])

    def _forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=self.rotary)[0]

    def collect(
        self, whole: dict[str, Tensor], number: int, statistic: Callable[..., Any], paths: Sequence[str]
    ) -> list[Any]:
        """Statistics of these linears of the layer over the windows of all ranks, inputs from the layer as given."""
        self._load(whole, number)
        found = {path: statistic(self.layer.get_submodule(path).weight.shape[1], self.device) for path in paths}
        self.last_wanted = paths[-1]
        for hidden in self.hidden:
            with contextlib.suppress(_InputsKnown):
                self._forward(hidden)
            for path in paths:
                found[path].update(self.inputs[path])
        self.last_wanted = None
        for path in paths:
            for tensor in found[path].tensors():
                dist.all_reduce(tensor)
        return list(found.values())

    def advance(self, whole: dict[str, Tensor], number: int) -> None:
        """Replace the hidden states by the layer's outputs, with the layer's present (pruned) weights."""
        self._load(whole, number)
        self.hidden = [self._forward(hidden) for hidden in self.hidden]


def _embedded(model: PrunableModel, tokens: list[Tensor]) -> list[Tensor]:
    """Hidden states `[s, b, hidden]` before the first layer of tokens `[s, b]`. Collective."""
    words = model.whole(model.by_name["embedding.word_embeddings.weight"])
    hidden = [F.embedding(unit, words) for unit in tokens]
    positions = model.by_name.get("embedding.position_embeddings.weight")
    if positions is None:
        return hidden
    learned = model.whole(positions)
    return [x + learned[: x.shape[0], None] for x in hidden]
