"""Mask mode: a model in which the units that go are zero instead of gone, and which computes what the cut one would.

For searches and for methods that train masks: shapes, layouts and optimizer states stay as they are. Zeros alone do not
do it: a norm would still divide by the number of all channels, so norms count the kept channels only.
"""

from __future__ import annotations

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.model.build import LayerNorm, RMSNorm
from megatron_prune.model.prunable import LINEARS, PrunableModel
from megatron_prune.model.units import Units

WRITERS = tuple(path for path in LINEARS if path.endswith(("linear_proj", "linear_fc2")))
"""Linears of a layer that write to the residual stream: without them the layer is an identity."""
NORMS = ("input_layernorm", "pre_mlp_layernorm", "final_layernorm")


@torch.no_grad()
def mask_units(model: PrunableModel, units: Units) -> None:
    """Zero all units but `units`, in place. Collective.

    NotImplementedError where channels go and the norms are Transformer Engine's, which count every channel.
    """
    config = model.config
    for map in model.maps:
        whole = model.whole(map)
        if map.layer is None or map.layer in units.layers:
            model.assign(map, whole * units.mask(config, map).to(whole.device))
        elif map.megatron.split(".", 3)[3].rsplit(".", 1)[0] in WRITERS:
            model.assign(map, torch.zeros_like(whole))
    if len(units.hidden) == config.hidden_size:
        return
    kept = torch.tensor(units.hidden, device=backend.device())
    for chunk in model.chunks:
        for name, module in chunk.named_modules():
            if name.rsplit(".", 1)[-1] in NORMS and any(True for _ in module.parameters()):
                if not isinstance(module, (RMSNorm, LayerNorm)):
                    raise NotImplementedError(f"{name} is a {type(module).__name__}, which cannot skip masked channels")
                module.kept = kept
