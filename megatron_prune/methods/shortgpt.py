"""ShortGPT (Men et al. 2024, arXiv:2403.03853): layers that hardly turn the residual stream are redundant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_prune.decision.target import Shape, StructuredTarget
from megatron_prune.decision.units import Units
from megatron_prune.methods.base import register
from megatron_prune.methods.depth import layers_to_remove
from megatron_prune.methods.structured import Refitted, allowed_sizes, removed_layers

if TYPE_CHECKING:
    from megatron_prune.statistics.passes import Passes


@register("shortgpt")
@dataclass(frozen=True)
class ShortGPT(Refitted):
    """Remove the layers of lowest block influence, in one shot; they need not be neighbours."""

    paper: ClassVar[str] = "Men et al. 2024, arXiv:2403.03853"
    sizes_with_experts: ClassVar[tuple[str, ...]] = ("num_layers",)
    targets: ClassVar[Mapping[type, str]] = {Shape: "fewer layers: num_layers=N"}

    def choose(self, config: Any, passes: Passes, target: StructuredTarget) -> Units:
        """The layers that stay."""
        count = removed_layers(config, allowed_sizes(target, ["num_layers"], self.name))
        return Units.all(config).without_layers(layers_to_remove(passes, count, "block_influence"))
