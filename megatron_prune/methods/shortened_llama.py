"""Shortened LLaMA (Kim et al. 2024, arXiv:2402.02834): remove the layers that the loss misses least, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_prune.decision.target import Shape, StructuredTarget
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.methods.base import hyperparameter, register
from megatron_prune.methods.depth import layers_to_remove
from megatron_prune.methods.structured import Refitted, allowed_sizes, removed_layers

if TYPE_CHECKING:
    from megatron_prune.statistics.passes import Passes


@register("shortened_llama")
@dataclass(frozen=True)
class ShortenedLlama(Refitted):
    """Rank layers by the calibration loss without each; the first and last ones are never removed ("PPL+")."""

    paper: ClassVar[str] = "Kim et al. 2024, arXiv:2402.02834"
    targets: ClassVar[Mapping[type, str]] = {Shape: "fewer layers: num_layers=N"}
    takes: ClassVar[tuple[str, ...]] = ()

    protected_first: int = hyperparameter(4, "layers at the start that always stay", 10000)
    protected_last: int = hyperparameter(2, "layers at the end that always stay", 10000)

    def choose(self, config: Any, passes: Passes, target: StructuredTarget) -> Units:
        """The layers that stay."""
        total = config.num_layers
        count = removed_layers(config, allowed_sizes(target, ["num_layers"], self.name))
        protected = frozenset([*range(self.protected_first), *range(total - self.protected_last, total)])
        if count > total - len(protected):
            raise UserError(
                f"target {target} removes {count} of {total} layers and {len(protected)} are protected: give more "
                "layers, or lower --protected-first and --protected-last"
            )
        return Units.all(config).without_layers(layers_to_remove(passes, count, "single", protected))
