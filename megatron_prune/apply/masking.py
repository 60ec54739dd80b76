"""Mask mode: a model in which the units that go are zero instead of gone, and which computes what the cut one would.

For searches and for methods that train masks: shapes, layouts and optimizer states stay as they are. Zeros alone do not
do it: a norm would still divide by the number of all channels, so norms count the kept channels only.
"""

from __future__ import annotations

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.methods.structured import FC2, PROJECTION
from megatron_prune.model.build import LayerNorm, RMSNorm
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.model.units import Units

NORMS = ("input_layernorm", "pre_mlp_layernorm", "final_layernorm")


def _absent(units: Units, layer: int) -> list[str]:
    """Linears that write to the residual stream in halves of a layer that are gone."""
    if layer not in units.layers:
        return [PROJECTION, FC2]
    block = units.blocks[units.layers.index(layer)]
    return [path for path, kept in ((PROJECTION, block.heads), (FC2, block.ffn)) if not kept]


@torch.no_grad()
def mask_units(model: PrunableModel, units: Units) -> None:
    """Zero all units but `units`, in place. Collective.

    NotImplementedError where channels go and the norms are Transformer Engine's, which count every channel.
    """
    config = model.config
    for map in model.maps:
        whole = model.whole(map)
        if map.layer is None or map.layer in units.layers:
            whole = whole.masked_fill(~units.mask(config, map).to(whole.device), 0.0)
        if map.layer is not None and map.megatron.split(".", 3)[3].rsplit(".", 1)[0] in _absent(units, map.layer):
            whole = torch.zeros_like(whole)
        model.assign(map, whole)
    every = len(units.hidden) == config.hidden_size
    kept = None if every else torch.tensor(units.hidden, device=backend.device())
    for chunk in model.chunks:
        for name, module in chunk.named_modules():
            if name.rsplit(".", 1)[-1] in NORMS and any(True for _ in module.parameters()):
                if every and not hasattr(module, "kept"):
                    continue
                if not isinstance(module, (RMSNorm, LayerNorm)):
                    raise NotImplementedError(f"{name} is a {type(module).__name__}, which cannot skip masked channels")
                module.kept = kept
