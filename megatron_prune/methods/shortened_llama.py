"""Shortened LLaMA (Kim et al. 2024, arXiv:2402.02834): rank layers by one score of each, and remove the lowest.

    ppl       the calibration loss without the layer; any layer may go
    taylor    sum |w G| over the weights of its linears, G the gradient of the calibration loss (`methods/taylor.py`)
    taylor+   the same, and the first 4 and last 2 layers stay: without that the first go, and the model breaks

The paper's third criterion, the size of the weights, is far behind these two in its own tables, and not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_prune.decision.target import Shape, StructuredTarget
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.methods.base import hyperparameter, register
from megatron_prune.methods.depth import layers_to_remove
from megatron_prune.methods.structured import Refitted, allowed_sizes, lowest, removed_layers
from megatron_prune.methods.taylor import salience

if TYPE_CHECKING:
    from megatron_prune.statistics.passes import Passes

CRITERIA = ("ppl", "taylor", "taylor+")
PROTECTED = {"taylor+": (4, 2)}
"""Layers at the start and at the end that a criterion leaves alone."""


@register("shortened_llama")
@dataclass(frozen=True)
class ShortenedLlama(Refitted):
    """Rank layers by the calibration loss without each, or by a Taylor expansion of it, and remove the lowest."""

    paper: ClassVar[str] = "Kim et al. 2024, arXiv:2402.02834"
    sizes_with_experts: ClassVar[tuple[str, ...]] = ("num_layers",)
    targets: ClassVar[Mapping[type, str]] = {Shape: "fewer layers: num_layers=N"}
    takes: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {"calibration_samples": 10, "calibration_seq_length": 128}

    criterion: str = hyperparameter("ppl", f"score of a layer: {', '.join(CRITERIA)}")
    protected_first: int = hyperparameter(0, "layers at the start that always stay; taylor+: at least 4", 10000)
    protected_last: int = hyperparameter(0, "layers at the end that always stay; taylor+: at least 2", 10000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise UserError(f"shortened_llama: criterion {self.criterion!r} was given; allowed: {', '.join(CRITERIA)}")
        if min(self.protected_first, self.protected_last) < 0:
            raise UserError("shortened_llama: protected_first and protected_last are numbers of layers, 0 or more")

    def choose(self, config: Any, passes: Passes, target: StructuredTarget) -> Units:
        """The layers that stay."""
        count = removed_layers(config, allowed_sizes(target, ["num_layers"], self.name))
        protected = self._protected(config.num_layers)
        if count > config.num_layers - len(protected):
            raise UserError(
                f"target {target} removes {count} of {config.num_layers} layers and {len(protected)} are protected: "
                "give more layers, or lower --protected-first and --protected-last, or take another --criterion"
            )
        if self.criterion == "ppl":
            removed = layers_to_remove(passes, count, "single", protected)
        else:
            removed = frozenset(lowest(layer_saliences(passes), count, protected))
        return Units.all(config).without_layers(removed)

    def _protected(self, layers: int) -> frozenset[int]:
        """Numbers of the layers that always stay."""
        first, last = PROTECTED.get(self.criterion, (0, 0))
        first, last = max(first, self.protected_first), max(last, self.protected_last)
        return frozenset([*range(min(first, layers)), *range(max(layers - last, 0), layers)])


def layer_saliences(passes: Passes) -> list[float]:
    """Of each layer sum |w G| over its linears (paper, section 3.1). Collective."""
    found = [0.0] * passes.model.config.num_layers
    for layer, gradients in passes.gradients():
        assert layer is not None
        for name, g in gradients.items():
            if passes.model.by_name[f"decoder.layers.{layer}.{name}"].prunable:
                found[layer] += float(salience(g.weight, g.total, g.squares, "element1", 0).sum())
    return found
