"""Passes over calibration data for methods that decide weight by weight, the same in every parallel layout.

`layerwise` visits the decoder layers in order, on whole layers as `statistics/walk.py` runs them. Statistics are sums
over fixed units of windows kept in float64, so the decision drawn from them is the same on one process and on many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import megatron_prune.backend as backend  # isort: skip  # noqa: F401  (before megatron.core)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.decision.masks import Kept, MaskWriter
from megatron_prune.log import say
from megatron_prune.model import convert
from megatron_prune.model.families import WeightMap
from megatron_prune.model.prunable import EXPERTS, PrunableModel, linear_groups, linear_paths
from megatron_prune.statistics.hessian import Hessian
from megatron_prune.statistics.walk import LayerWalk, WholeWeights, inner, shares, sum_over_ranks

HELD_BYTES = 8 * 2**30
"""Statistics of a layer that a process holds at a time, or those of one linear."""


def row_span(rows: int, part: int, parts: int) -> tuple[int, int]:
    """First row and one past the last of contiguous share `part` of `parts`."""
    return rows * part // parts, rows * (part + 1) // parts


class WholeLinear:
    """One linear of the layer that is being pruned: this rank's share of its complete rows."""

    def __init__(self, runner: Runner, map: WeightMap, weight: Tensor, statistic: Any) -> None:
        self.runner = runner
        self.map = map
        self.name = map.megatron
        assert map.layer is not None, "prunable weights are in layers"
        self.layer = map.layer
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
        target: Any = None,
    ) -> None:
        """`target`: says by its `leaves(name)` which weights stay dense, whatever is decided; None: none do."""
        self.model = model
        self.tokens = tokens
        self.writer = writer
        self.progress = progress or (lambda layers: None)
        self.leaves: Callable[[str], bool] = target.leaves if target is not None else lambda name: False
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
        weights = WholeWeights(self.model)
        walk = LayerWalk(weights, self.tokens) if statistic else None
        for number in range(layers):
            if walk:
                walk.ready(number)
            whole = weights.layer(number)
            masks: dict[str, Tensor] = {}
            groups = (
                linear_groups(self.model.config, number) if sequential else [linear_paths(self.model.config, number)]
            )
            for group in groups:
                there = [path for path in group if f"{path}.weight" in whole]
                masks.update(self._left(number, there))
                there = [path for path in there if not all(map(self.leaves, self._map(number, path).hf))]
                parts = list(shares(there, _needed(whole, statistic), HELD_BYTES))
                # Statistics of a later share come from the layer as it was before the first: it decides nothing.
                unpruned = dict(whole) if len(parts) > 1 else whole
                for paths in parts:
                    maps = [self._map(number, path) for path in paths]
                    none = [None] * len(maps)
                    found = _collect(walk, number, unpruned, statistic, paths) if walk and statistic else none
                    linears = [
                        WholeLinear(self, map, whole[inner(map.megatron)], each)
                        for map, each in zip(maps, found, strict=True)
                    ]
                    yield from linears
                    masks.update(self._settle(linears, whole))
            if self.writer is not None and masks:
                self.writer.add_layer(number, masks)
            if walk:
                walk.load(number, whole)
                walk.advance()
            self.progress(1)

    @torch.no_grad()
    def dense(self, statistic: Callable[..., Any]) -> Iterator[WholeLinear]:
        """Every prunable linear with its statistic as in `layerwise`, while all of them stay whole: nothing is decided,
        so the windows go through each layer once. Statistics of all linears of a layer are held together.
        """
        weights = WholeWeights(self.model)
        walk = LayerWalk(weights, self.tokens)
        for number in range(self.model.config.num_layers):
            walk.ready(number)
            whole = weights.layer(number)
            paths = [path for path in linear_paths(self.model.config, number) if f"{path}.weight" in whole]
            found = _collect(walk, number, whole, statistic, paths, onward=True)
            for path, each in zip(paths, found, strict=True):
                yield WholeLinear(self, self._map(number, path), whole[f"{path}.weight"], each)
            self.progress(1)

    def _map(self, layer: int, path: str) -> WeightMap:
        return self.model.by_name[f"decoder.layers.{layer}.{path}.weight"]

    def _left(self, layer: int, paths: Sequence[str]) -> dict[str, Tensor]:
        """Masks of the linears of which all stays, by Hugging Face name: nobody is asked about them."""
        found: dict[str, Tensor] = {}
        for each in (self._map(layer, path) for path in paths):
            if all(map(self.leaves, each.hf)):
                shapes = zip(each.hf, each.shapes, strict=True)
                found |= {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes}
        size = sum(mask.numel() for mask in found.values())
        self.kept, self.size = self.kept + size, self.size + size
        return found

    def masks(self) -> Kept:
        """How much the method kept; the masks themselves are in the writer's folder."""
        return Kept(self.kept, self.size)

    def _settle(self, linears: list[WholeLinear], whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Join the rows decided by all ranks, prune every rank's whole layer; the masks by Hugging Face name.

        Linears are let go one by one: a layer is not held pruned and unpruned.
        """
        hf_masks: dict[str, Tensor] = {}
        while linears:
            linear = linears.pop(0)
            if linear.mask is None:
                raise RuntimeError(f"the method left {linear.name} undecided: call keep() on every linear")
            mask = linear.gather(linear.mask)
            weight = linear.whole_weight
            left = [rows for name, rows in linear.blocks.items() if self.leaves(name)]
            for rows in left:
                mask[rows.to(mask.device)] = True
            if linear.new_weight is not None:
                # What is removed stays as it was: learning that starts from these weights may take it back.
                new = torch.where(mask, linear.gather(linear.new_weight).to(weight.dtype), weight)
                for rows in left:
                    new[rows.to(new.device)] = weight[rows.to(weight.device)]
                weight = new
                self.weights_changed = True
                self.model.assign(linear.map, weight)
            whole[inner(linear.name)] = weight * mask
            self.kept += int(mask.sum())
            self.size += mask.numel()
            hf_masks.update(zip(linear.map.hf, convert.split(linear.map, mask, self.model.config), strict=True))
        return hf_masks


def _needed(whole: Mapping[str, Tensor], statistic: Any) -> Callable[[str], int]:
    """Bytes of a linear's statistic."""

    def needed(path: str) -> int:
        width = whole[f"{path}.weight"].shape[1]
        return 8 * width * (width if _is_quadratic(statistic) else 1)

    return needed


def _is_quadratic(statistic: Any) -> bool:
    """Whether a statistic takes the square of its linear's inputs."""
    return isinstance(statistic, type) and issubclass(statistic, Hessian)


def _collect(
    walk: LayerWalk,
    number: int,
    whole: dict[str, Tensor],
    statistic: Callable[..., Any],
    paths: Sequence[str],
    onward: bool = False,
) -> list[Any]:
    """Statistics of these linears of a layer over the windows of all ranks, inputs from the layer as given.

    `onward`: the windows are behind the layer then.
    """
    walk.load(number, whole)
    found = {path: statistic(whole[f"{path}.weight"].shape[1], walk.device) for path in paths}
    for i, hidden in enumerate(walk.hidden):
        seen, output = walk.watch(paths, hidden, whole=onward)
        if onward:
            walk.hidden[i] = output
        for path in paths:
            found[path].update(seen[path].reshape(-1, seen[path].shape[-1]))
    for path in paths:
        sum_over_ranks(found[path].tensors())
    walk.ready(number)
    _tell_of_few_tokens(number, found)
    return list(found.values())


def _tell_of_few_tokens(number: int, found: Mapping[str, Any]) -> None:
    """Name the experts of a layer that too few calibration tokens were sent to, and what is done about them."""
    counts = {path: int(each.tokens) for path, each in found.items() if path.startswith(EXPERTS)}
    singular = {path: n for path, n in counts.items() if n < found[path].needed_tokens}
    told = [f"{path.removeprefix(EXPERTS + '.')} {n}" for path, n in singular.items() if n]
    none = [path.removeprefix(EXPERTS + ".") for path, n in counts.items() if not n]
    if none:
        say(f"layer {number}: no calibration token for experts {', '.join(none)}: pruned by magnitude")
    if told:
        say(
            f"layer {number}: fewer calibration tokens than inputs for experts {', '.join(told)}: pruned all the same, "
            "their Hessians are singular but for the damping; more --calibration-samples would mend it"
        )
