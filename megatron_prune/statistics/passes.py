"""Passes over calibration windows for methods that remove whole units: what they may measure before they choose.

Everything runs on whole layers (`statistics/walk.py`), so every number is the same in every parallel layout. All
functions are collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.decision.units import Units
from megatron_prune.model.families import ModelConfig, dimensions
from megatron_prune.model.prunable import FC1, FC2, PROJECTION, QKV, PrunableModel, input_symbol, second_linears
from megatron_prune.statistics.channels import RESIDUAL
from megatron_prune.statistics.experts import ExpertActivity
from megatron_prune.statistics.gradients import Float32, Gradients, gradients
from megatron_prune.statistics.store import Statistic, StatisticsStore
from megatron_prune.statistics.walk import Change, CutWeights, LayerWalk, WholeWeights, sum_over_ranks, unchanged

NORMS = ("input_layernorm", "pre_mlp_layernorm")
POST_NORMS = tuple(f"{path}.post_layernorm" for path in (PROJECTION, FC2))
"""Of what attention and MLP give, in families that have them."""


HELD_BYTES = 8 * 2**30
"""Hidden states of candidates that a process holds at a time."""


class Passes:
    """Measures a model on calibration windows `[windows, length]` int64, the same on every rank."""

    def __init__(
        self,
        model: PrunableModel,
        tokens: Tensor | None,
        progress: Callable[[int], None] = lambda layers: None,
        store: StatisticsStore | None = None,
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.progress = progress
        self.store = store

    def part(self, windows: slice, name: str | None = None) -> Passes:
        """Over some of the windows; what is kept of them lies in a folder `name` of the store's. Collective."""
        assert self.tokens is not None
        tokens = self.tokens[windows]
        store = None if self.store is None or name is None else self.store.part(name, self.model, tokens)
        return Passes(self.model, tokens, self.progress, store)

    def observe(self, sites: Mapping[str, Statistic]) -> list[dict[str, Any]]:
        """`observe_each` of all layers."""
        return list(self.observe_each(sites))

    @torch.no_grad()
    def observe_each(self, sites: Mapping[str, Statistic]) -> Iterator[dict[str, Any]]:
        """One forward pass: a statistic `sites[path](channels, device)` of each layer, by site.

        A path names a submodule of the layer and sees its input `[s, b, channels]`; `RESIDUAL` sees the layer's input
        and output. In a layer with experts `FC1` is what enters all of them, and `FC2` stands for the second linear of
        each, by their own paths; an expert sees the tokens sent to it. With a store that has them all nothing is run.
        """
        if self.store is not None and self.store.has(sites):
            yield from (self._stored(self.store, number, sites) for number in range(self.model.config.num_layers))
            return
        weights = WholeWeights(self.model)
        walk = LayerWalk(weights, self.tokens)
        for number in range(self.model.config.num_layers):
            walk.take(number)
            here = self._fresh(number, sites)
            places = {path: _place(self.model.config, number, path) for path in here if path != RESIDUAL}
            for i, hidden in enumerate(walk.hidden):
                seen, walk.hidden[i] = walk.watch_windows(list(places.values()), hidden)
                for path, place in places.items():
                    for x in seen[place]:
                        here[path].update(x)
                if RESIDUAL in sites:
                    here[RESIDUAL].update(hidden, walk.hidden[i])
            for statistic in here.values():
                sum_over_ranks(statistic.tensors())
            if self.store is not None:
                self.store.write(number, here)
            yield here
            self.progress(1)
        if self.store is not None:
            self.store.complete(sites)

    @torch.no_grad()
    def expert_activity(self) -> list[ExpertActivity | None]:
        """One forward pass: what the experts of each layer do; None for layers without any. Collective."""
        weights = WholeWeights(self.model)
        walk = LayerWalk(weights, self.tokens)
        found: list[ExpertActivity | None] = []
        for number in range(self.model.config.num_layers):
            walk.take(number)
            experts = self.model.config.block(number).num_moe_experts
            activity = ExpertActivity(experts, walk.device) if experts else None
            if activity is None:
                walk.advance()
            else:
                for i, hidden in enumerate(walk.hidden):
                    seen, walk.hidden[i] = walk.watch_experts(hidden)
                    activity.update(*seen)
                sum_over_ranks(activity.tensors())
            found.append(activity)
            self.progress(1)
        return found

    def _stored(self, store: StatisticsStore, number: int, sites: Mapping[str, Statistic]) -> dict[str, Any]:
        found = self._fresh(number, sites)
        store.read(number, found)
        self.progress(1)
        return found

    def _fresh(self, number: int, sites: Mapping[str, Statistic]) -> dict[str, Any]:
        """Empty statistics of a layer, by the names under which they are found."""
        sizes = channels_of(self.model.config, number)
        return {
            path: kind(sizes[path], backend.device())
            for site, kind in sites.items()
            for path in self._paths(number, site)
        }

    def _paths(self, number: int, site: str) -> list[str]:
        """What a site stands for in a layer; nothing where the half that it is of is absent."""
        config = self.model.config
        if site == FC2 and config.has_experts(number):
            return second_linears(config, number)
        there = site == RESIDUAL or self._has(number, site) or (site == FC1 and config.has_experts(number))
        return [site] if there else []

    def weight(self, layer: int, path: str) -> Tensor:
        """A linear's whole weight `[out, in]`."""
        return self.model.whole(self.model.by_name[f"decoder.layers.{layer}.{path}.weight"])

    def _has(self, number: int, path: str) -> bool:
        return f"decoder.layers.{number}.{path}.weight" in self.model.by_name

    def losses_without(self, sets: Sequence[frozenset[int]]) -> list[float]:
        """Mean next-token loss (nats) without each set of layers."""
        return [fmean(losses) for losses in self.window_losses_without(sets)]

    @torch.no_grad()
    def window_losses_without(self, sets: Sequence[frozenset[int]]) -> list[list[float]]:
        """Mean next-token loss (nats) of each window without each set of layers, `[sets][windows]`.

        Candidates ride along one pass over the weights, as many as `HELD_BYTES` of hidden states allow; those that
        agree on the layers so far share theirs, so the states before the first removed layer are computed once.
        """
        found: list[list[float]] = []
        assert self.tokens is not None
        share = -(-self.tokens.numel() // dist.get_world_size())
        held = share * self.model.config.hidden_size * WholeWeights(self.model).dtype.itemsize
        width = max(8, HELD_BYTES // held)
        for first in range(0, len(sets), width):
            found += self._losses_without(sets[first : first + width])
        return found

    def _losses_without(self, sets: Sequence[frozenset[int]]) -> list[list[float]]:
        weights = WholeWeights(self.model)
        walk = LayerWalk(weights, self.tokens)
        states: dict[frozenset[int], list[Tensor]] = {frozenset(): walk.hidden}
        for number in range(self.model.config.num_layers):
            walk.take(number)
            wanted = {frozenset(n for n in removed if n <= number) for removed in sets}
            states = {
                gone: before if number in gone else [walk.run(x) for x in before]
                for gone in sorted(wanted, key=sorted)
                for before in (states[gone - {number}],)
            }
            self.progress(1)
        totals = torch.stack([walk.losses(states[removed]) for removed in sets])
        sum_over_ranks([totals])
        return totals.tolist()

    def loss(self, units: Units, change: Change = unchanged) -> float:
        """Mean next-token loss (nats) of the smaller model that these units are. See `window_losses`."""
        return fmean(self.window_losses(units, change))

    @torch.no_grad()
    def window_losses(self, units: Units, change: Change = unchanged, windows: slice = slice(None)) -> list[float]:
        """Mean next-token loss (nats) of some windows in the smaller model that these units are.

        `change(layer, tensors)` may correct a layer's weights before they are cut, and with None for the layer those
        outside all layers.
        """
        weights = CutWeights(self.model, units, change)
        walk = LayerWalk(weights, None if self.tokens is None else self.tokens[windows])
        walk.finish()
        total = walk.losses(walk.hidden)
        sum_over_ranks([total])
        return total.tolist()

    def gradients(
        self, outer: bool = False, windows: int | None = None, length: int | None = None
    ) -> Iterator[tuple[int | None, Gradients]]:
        """Gradients of every layer, the last first; with `outer` of the rest too. See `statistics/gradients.py`.

        Of the first `windows` windows, and their first `length` tokens.
        """
        tokens = None if self.tokens is None else self.tokens[:windows, :length]
        return gradients(Float32(self.model), tokens, self.progress, outer)


def channels_of(config: ModelConfig, layer: int) -> dict[str, int]:
    """Channels that enter each site of a layer."""
    size = dimensions(config, layer)
    hidden = [RESIDUAL, *NORMS, QKV, FC1]
    inner = {path: size[input_symbol(path)] for path in [PROJECTION, *second_linears(config, layer)]}
    return dict.fromkeys(hidden, size["hidden"]) | inner


def _place(config: ModelConfig, layer: int, path: str) -> str:
    """The submodule whose input a site sees."""
    return "mlp.router" if path == FC1 and config.has_experts(layer) else path
