"""LLM-Pruner (Ma et al. 2023, arXiv:2305.11627): remove coupled structures of least first- or second-order importance.

A structure is a query group (its query, key and value rows and the inputs of the output projection), an MLP neuron, a
residual channel or a layer; the sizes of the target say which are removed. How much the loss changes without it is a
Taylor expansion over its weights w, with the gradient g summed over samples and F the mean over samples of g^2 (the
diagonal of the Fisher information):

    vector    |sum w g|, over the weights of a row or column
    element1  sum |w g|
    element2  sum |w^2 F|
    mix       sum |w g - w^2 F / 2|

summed over the matrices that are coupled. Groups and neurons go from the layers between the protected ones at both
ends, equally many from each, or with `global_ranking` where they count least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron_prune.decision.target import Shape, StructuredTarget
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.methods.base import hyperparameter, register
from megatron_prune.methods.structured import (
    Refitted,
    allowed_sizes,
    keep_best,
    keep_groups,
    keep_neurons,
    lowest,
    removed_layers,
)
from megatron_prune.model.prunable import FC1, FC2, PROJECTION, QKV

if TYPE_CHECKING:
    from megatron_prune.statistics.passes import Gradient, Passes

TAYLOR = ("vector", "element1", "element2", "mix")
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups")


@register("llm_pruner")
@dataclass(frozen=True)
class LLMPruner(Refitted):
    """Taylor importance of coupled structures, from the gradients of a few calibration windows."""

    paper: ClassVar[str] = "Ma et al. 2023, arXiv:2305.11627"
    targets: ClassVar[Mapping[type, str]] = {Shape: f"sizes of the layers that are pruned: {', '.join(SIZES)}"}
    takes: ClassVar[tuple[str, ...]] = ()

    taylor: str = hyperparameter("element1", f"the expansion: {', '.join(TAYLOR)}")
    protected_first: int = hyperparameter(4, "layers at the start that are left as they are", 10000)
    protected_last: int = hyperparameter(2, "layers at the end that are left as they are", 10000)
    global_ranking: bool = hyperparameter(False, "compare groups and neurons over all layers; they come out unequal")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taylor not in TAYLOR:
            raise UserError(f"llm_pruner: taylor {self.taylor!r} was given; allowed: {', '.join(TAYLOR)}")
        if min(self.protected_first, self.protected_last) < 0:
            raise UserError("llm_pruner: protected_first and protected_last are numbers of layers, 0 or more")

    def choose(self, config: Any, passes: Passes, target: StructuredTarget) -> Units:
        """The units that stay."""
        wanted = allowed_sizes(target, SIZES, self.name)
        touched = range(self.protected_first, config.num_layers - self.protected_last)
        if removed_layers(config, wanted) > len(touched) or not touched:
            raise UserError(
                f"target {target}: {config.num_layers} layers with the first {self.protected_first} and last "
                f"{self.protected_last} protected leave {len(touched)} to prune; lower --protected-first or "
                "--protected-last"
            )
        scores = [Scores.zeros(config, layer) for layer in range(config.num_layers)]
        for layer, gradients in passes.gradients():
            scores[layer] = Scores.of(config, layer, gradients, self.taylor)
        units = Units.all(config)
        if wanted.num_query_groups:
            units = keep_groups(config, units, [s.groups for s in scores], wanted, touched, self.global_ranking)
        if wanted.ffn_hidden_size:
            units = keep_neurons(units, [s.ffn for s in scores], wanted, touched, self.global_ranking)
        if wanted.hidden_size:
            hidden = torch.stack([s.hidden for s in scores]).sum(0)
            units = replace(units, hidden=keep_best(hidden, wanted.hidden_size))
        protected = set(range(config.num_layers)) - set(touched)
        return units.without_layers(lowest([s.layer for s in scores], removed_layers(config, wanted), protected))


@dataclass(frozen=True)
class Scores:
    """Importance of a layer's structures."""

    groups: Tensor
    ffn: Tensor
    hidden: Tensor
    layer: float

    @classmethod
    def zeros(cls, config: Any, layer: int) -> Scores:
        """Of a layer that has not been seen."""
        block = config.block(layer)
        groups, ffn = torch.zeros(block.num_query_groups).double(), torch.zeros(block.ffn_hidden_size).double()
        return cls(groups, ffn, torch.zeros(config.hidden_size).double(), layer=0.0)

    @classmethod
    def of(cls, config: Any, layer: int, gradients: Mapping[str, Gradient], taylor: str) -> Scores:
        """From the gradients of a layer's weights."""
        empty, block = cls.zeros(config, layer), config.block(layer)
        groups, ffn, hidden = empty.groups, empty.ffn, empty.hidden
        rows, columns = _saliences(gradients, taylor)
        if QKV in rows:  # one group after the other, its query rows, then key, then value
            groups = rows[QKV].unflatten(0, (block.num_query_groups, -1)).sum(1)
            groups = groups + columns[PROJECTION].unflatten(0, (block.num_query_groups, -1)).sum(1)
            hidden = hidden + columns[QKV] + rows[PROJECTION]
        if FC1 in rows:
            ffn = rows[FC1].unflatten(0, (-1, block.ffn_hidden_size)).sum(0) + columns[FC2]
            hidden = hidden + columns[FC1] + rows[FC2]
        return cls(groups, ffn, hidden, layer=float(groups.sum() + ffn.sum()))


def _saliences(gradients: Mapping[str, Gradient], taylor: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By linear: importance of each row and of each column."""
    linears = [path for path in (QKV, PROJECTION, FC1, FC2) if f"{path}.weight" in gradients]
    sides: Sequence[int] = (0, 1)
    rows, columns = ({p: salience(gradients[f"{p}.weight"], taylor, dim).cpu() for p in linears} for dim in sides)
    return rows, columns


def salience(gradient: Gradient, taylor: str, dim: int) -> Tensor:
    """Importance of each row (dim 0) or column (dim 1) of a weight `[out, in]`, float64."""
    weight = gradient.weight.double()
    first = weight * gradient.total
    second = weight.square() * gradient.squares / gradient.samples
    if taylor == "vector":
        return first.sum(1 - dim).abs()
    element = {"element1": first, "element2": second, "mix": first - 0.5 * second}[taylor]
    return element.abs().sum(1 - dim)
