"""LLM-Pruner (Ma et al. 2023, arXiv:2305.11627): remove coupled structures of least first- or second-order importance.

A structure is a query group (its query, key and value rows and the inputs of the output projection), an MLP neuron, a
residual channel (of the embedding, the output layer, every norm and every linear of the stream) or a layer; the sizes
of the target say which are removed. Its importance is a Taylor expansion (`methods/taylor.py`), summed over all tensors
that it runs through. Groups and neurons go from the layers between the protected ones at both ends, equally many from
each, or with `global_ranking` where they count least.

Gradients are of the first calibration windows only, and of their first tokens: as many as the published code has, and
what they need does not grow with the calibration text. The fit of what stays looks at all of it. Ours: a layer counts
as all its groups and neurons do, where the paper removes the last ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

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
from megatron_prune.methods.taylor import FORMS, Importance

if TYPE_CHECKING:
    from megatron_prune.statistics.passes import Passes

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups")


@register("llm_pruner")
@dataclass(frozen=True)
class LLMPruner(Refitted):
    """Taylor importance of coupled structures, from the gradients of a few calibration windows."""

    paper: ClassVar[str] = "Ma et al. 2023, arXiv:2305.11627"
    targets: ClassVar[Mapping[type, str]] = {Shape: f"sizes of the layers that are pruned: {', '.join(SIZES)}"}
    takes: ClassVar[tuple[str, ...]] = ()

    taylor: str = hyperparameter("element1", f"the expansion: {', '.join(FORMS)}")
    gradient_windows: int = hyperparameter(10, "calibration windows whose gradients are taken; 0 = all")
    gradient_length: int = hyperparameter(64, "tokens of each of these windows, the first ones; 0 = all")
    protected_first: int = hyperparameter(4, "layers at the start that are left as they are", 10000)
    protected_last: int = hyperparameter(2, "layers at the end that are left as they are", 10000)
    global_ranking: bool = hyperparameter(False, "compare groups and neurons over all layers; they come out unequal")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taylor not in FORMS:
            raise UserError(f"llm_pruner: taylor {self.taylor!r} was given; allowed: {', '.join(FORMS)}")
        if min(self.protected_first, self.protected_last) < 0:
            raise UserError("llm_pruner: protected_first and protected_last are numbers of layers, 0 or more")
        if self.gradient_windows < 0 or self.gradient_length < 0 or self.gradient_length == 1:
            raise UserError("llm_pruner: gradient_windows is 0 or more, gradient_length 0 or at least 2 tokens")

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
        found = self._importance(config, passes, outer=bool(wanted.hidden_size))
        units = Units.all(config)
        if wanted.num_query_groups:
            units = keep_groups(config, units, found.groups, wanted.num_query_groups, touched, self.global_ranking)
        if wanted.ffn_hidden_size:
            units = keep_neurons(units, found.ffn, wanted.ffn_hidden_size, touched, self.global_ranking)
        if wanted.hidden_size:
            units = replace(units, hidden=keep_best(found.hidden, wanted.hidden_size))
        protected = set(range(config.num_layers)) - set(touched)
        return units.without_layers(lowest(found.layers, removed_layers(config, wanted), protected))

    def _importance(self, config: Any, passes: Passes, outer: bool) -> Importance:
        """Of all structures; residual channels need the gradients `outer` the layers, too."""
        found = Importance(config)
        windows, length = self.gradient_windows or None, self.gradient_length or None
        for layer, gradients in passes.gradients(outer, windows, length):
            prefix = "" if layer is None else f"decoder.layers.{layer}."
            for name, gradient in gradients.items():
                found.add(passes.model.by_name[prefix + name], gradient, self.taylor)
        return found
