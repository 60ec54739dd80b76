"""What stays of a model makes up for what went: closed forms, no training. Options of every structured method.

refit      each linear whose inputs were thinned is fitted anew, by least squares over the calibration tokens, to the
           outputs it had in the whole model, W' = (W C + d W_kept) (G + d)^-1: C = sum a b^T, G = sum b b^T, a its
           inputs in the whole model, b those it now gets, d a damping. `propagated` takes b from the model as pruned
           and refitted so far, so that errors of earlier layers are fitted too; `local` the channels of a that stay
mean       only the bias, where the linear has one, takes over the mean of what is missing (FLAP, An et al. 2023,
           arXiv:2312.11983); a refit does that as well
norm gain  a norm over fewer channels divides by another size: its gain is multiplied by the mean over tokens of
           size(channels that stay) / size(all channels), the size what the norm divides by: the root mean square of
           RMSNorm, the standard deviation of LayerNorm
"""

from __future__ import annotations

from collections.abc import Callable

import megatron_prune.backend as backend  # isort: skip  # noqa: F401  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.decision.units import Units
from megatron_prune.model.prunable import PrunableModel, expert_of, linear_groups
from megatron_prune.statistics.channels import NormRatio, Regression
from megatron_prune.statistics.passes import NORMS, POST_NORMS
from megatron_prune.statistics.reconstruction import damped_factor
from megatron_prune.statistics.runner import HELD_BYTES
from megatron_prune.statistics.walk import (
    FINAL_NORM,
    CutWeights,
    LayerWalk,
    WholeWeights,
    shares,
    sum_over_ranks,
)


def least_squares(weight: Tensor, kept: Tensor, cross: Tensor, gram: Tensor, damping: float) -> Tensor:
    """W' `[out, narrow]` with W' b nearest to W a: argmin |W a - W' b|^2 + damping * mean(diag(G)) |W' - W[:, kept]|^2.

    `weight` W is `[out, wide]`, `kept` the columns that W' replaces, `cross` the sum of a b^T and `gram` G that of
    b b^T, both up to the same factor. What the data leave open stays as it was: a penalty towards zero would shrink
    every channel that is small beside the largest.
    """
    factor, penalty = damped_factor(gram, damping)
    wide = weight.double()
    asked = wide @ cross + penalty * wide.index_select(1, kept)
    return torch.cholesky_solve(asked.t(), factor).t().to(weight.dtype)


def missing_mean(weight: Tensor, narrow: Tensor, sums: Regression) -> Tensor:
    """Mean over tokens of W a - W' b, `[out]`: what a bias can make up for."""
    wide_mean, narrow_mean = sums.wide_sum / sums.count, sums.narrow_sum / sums.count
    return (weight.double() @ wide_mean - narrow.double() @ narrow_mean).to(weight.dtype)


class Compensation:
    """One pass that corrects a model's weights for the loss of all units but `units`, in place."""

    def __init__(
        self, model: PrunableModel, units: Units, tokens: Tensor | None, refit: str, damping: float, norm_gain: bool
    ) -> None:
        self.model = model
        self.units = units
        self.refit = refit
        self.damping = damping
        self.norm_gain = norm_gain and len(units.hidden) < model.config.hidden_size
        self.whole = WholeWeights(model)
        self.changed: dict[str, Tensor] = {}
        """This layer's corrected tensors, by their names in it."""
        self.cut = CutWeights(model, units, self._corrected)
        self.dense = LayerWalk(self.whole, tokens)
        self.pruned = LayerWalk(self.cut, tokens) if refit == "propagated" else None

    def _corrected(self, layer: int | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if layer is None else {**tensors, **self.changed}

    @torch.no_grad()
    def run(self, progress: Callable[[int], None]) -> bool:
        """Correct every layer; whether anything changed. Collective."""
        any_change = False
        for number in range(self.model.config.num_layers):
            tensors = self.whole.layer(number)
            self.dense.load(number, tensors)
            if number in self.units.layers:
                any_change |= self._correct(number, tensors)
            self.dense.advance()
            progress(1)
        return self._final_gain() or any_change

    def _correct(self, number: int, tensors: dict[str, Tensor]) -> bool:
        place = self.units.layers.index(number)
        self.changed = {}
        if self.norm_gain:
            self._gains(tensors)
        for group in linear_groups(self.model.config, number) if self.refit != "none" else ():
            thinned = [path for path in group if self._thinned(number, path)]
            for paths in shares(thinned, lambda path: self._needed(number, path), HELD_BYTES):
                self._fit(number, place, paths, tensors)
        if self.pruned is not None:
            self.pruned.load(place, self.cut.layer(place))
            self.pruned.advance()
        for name, tensor in self.changed.items():
            self.model.assign(self.model.by_name[f"decoder.layers.{number}.{name}"], tensor)
        return bool(self.changed)

    def _kept_inputs(self, number: int, path: str) -> Tensor | None:
        """Which inputs of a linear stay; None where it has none to lose."""
        map = self.model.by_name[f"decoder.layers.{number}.{path}.weight"]
        return self.units.indices(self.model.config, number, map.symbols[0][1], map.expert)

    def _needed(self, number: int, path: str) -> int:
        """Bytes of a linear's sums."""
        kept = self._kept_inputs(number, path)
        assert kept is not None
        wide = self.model.by_name[f"decoder.layers.{number}.{path}.weight"].shape[1]
        return 8 * len(kept) * (len(kept) + wide)

    def _thinned(self, number: int, path: str) -> bool:
        map = self.model.by_name.get(f"decoder.layers.{number}.{path}.weight")
        if map is None or not self.units.keeps(number, map.expert):
            return False
        if self.refit == "mean" and f"decoder.layers.{number}.{path}.bias" not in self.model.by_name:
            return False
        kept = self._kept_inputs(number, path)
        return kept is not None and len(kept) < map.shape[1]

    def _ratio(self) -> NormRatio:
        return NormRatio(torch.tensor(self.units.hidden), self.dense.device, self.model.config.centred_norm)

    def _gains(self, tensors: dict[str, Tensor]) -> None:
        ratios = {path: self._ratio() for path in (*NORMS, *POST_NORMS) if f"{path}.weight" in tensors}
        for hidden in self.dense.hidden:
            seen, _ = self.dense.watch(list(ratios), hidden)
            for path, ratio in ratios.items():
                ratio.update(seen[path])
        for path, ratio in ratios.items():
            sum_over_ranks(ratio.tensors())
            self.changed[f"{path}.weight"] = self._scaled(tensors[f"{path}.weight"], ratio.value())

    def _scaled(self, gain: Tensor, ratio: float) -> Tensor:
        offset = self.model.config.gain_offset
        return ((gain.double() + offset) * ratio - offset).to(gain.dtype)

    def _fit(self, number: int, place: int, paths: list[str], tensors: dict[str, Tensor]) -> None:
        """Fit linears to their outputs in the whole model; the ones before them in the layer are fitted already.

        An expert gets other tokens in the pruned model: its linears are fitted on the channels of `a` that stay.
        """
        inputs = {path: kept for path in paths if (kept := self._kept_inputs(number, path)) is not None}
        found = {
            path: Regression(tensors[f"{path}.weight"].shape[1], len(kept), self.dense.device)
            for path, kept in inputs.items()
        }
        followed = [path for path in paths if self.pruned is not None and expert_of(path) is None]
        if self.pruned is not None and followed:
            self.pruned.load(place, self.cut.layer(place))
        for i, hidden in enumerate(self.dense.hidden):
            wide = self.dense.watch(paths, hidden)[0]
            narrow = self.pruned.watch(followed, self.pruned.hidden[i])[0] if self.pruned and followed else {}
            for path, kept in inputs.items():
                own = narrow[path] if path in narrow else wide[path].index_select(-1, kept.to(wide[path].device))
                found[path].update(wide[path], own)
        for path, sums in found.items():
            sum_over_ranks(sums.tensors())
            if sums.count > 0:  # of an expert without any token the columns that stay do
                self._replace(path, inputs[path], sums, tensors)

    def _replace(self, path: str, kept: Tensor, sums: Regression, tensors: dict[str, Tensor]) -> None:
        weight = tensors[f"{path}.weight"]
        kept = kept.to(weight.device)
        fitted = weight.index_select(1, kept)
        if self.refit != "mean":
            fitted = least_squares(weight, kept, sums.cross, sums.gram, self.damping)
        new = torch.zeros_like(weight).index_copy_(1, kept, fitted)
        self.changed[f"{path}.weight"] = new
        bias = tensors.get(f"{path}.bias")
        if bias is not None:
            self.changed[f"{path}.bias"] = bias + missing_mean(weight, fitted, sums)

    def _final_gain(self) -> bool:
        if not self.norm_gain:
            return False
        ratio = self._ratio()
        for hidden in self.dense.hidden:
            ratio.update(hidden)
        sum_over_ranks(ratio.tensors())
        map = self.model.by_name[f"{FINAL_NORM}.weight"]
        self.model.assign(map, self._scaled(self.model.whole(map), ratio.value()))
        return True
