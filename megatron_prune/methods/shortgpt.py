"""ShortGPT (Men et al. 2024, arXiv:2403.03853): layers that hardly turn the residual stream are redundant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_prune.methods.base import register
from megatron_prune.methods.structured import StructuredMethod, allowed_sizes, layers_to_remove, lowest
from megatron_prune.methods.target import Shape, StructuredTarget
from megatron_prune.model.units import Units
from megatron_prune.statistics.channels import RESIDUAL, BlockInfluence

if TYPE_CHECKING:
    from megatron_prune.statistics.passes import Passes


@register("shortgpt")
@dataclass(frozen=True)
class ShortGPT(StructuredMethod):
    """Remove the layers of lowest block influence, in one shot; they need not be neighbours."""

    paper: ClassVar[str] = "Men et al. 2024, arXiv:2403.03853"
    targets: ClassVar[Mapping[type, str]] = {Shape: "fewer layers: num_layers=N"}

    def choose(self, config: Any, passes: Passes, target: StructuredTarget) -> Units:
        """The layers that stay."""
        wanted = allowed_sizes(target, ["num_layers"], self.name)
        influence = block_influence(passes)
        return Units.all(config).without_layers(lowest(influence, layers_to_remove(config, wanted)))


def block_influence(passes: Passes) -> list[float]:
    """Of every layer, from one pass over the calibration windows. Collective."""
    return [found[RESIDUAL].value() for found in passes.observe({RESIDUAL: BlockInfluence})]
