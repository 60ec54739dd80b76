"""Mask mode: a model in which the units that go are zero instead of gone, and which computes what the cut one would.

For searches and for methods that train masks: shapes, layouts and optimizer states stay as they are. Zeros alone do not
do it: a norm would still divide by the number of all channels, so norms count the kept channels only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.decision.units import Units
from megatron_prune.model.build import LayerNorm, RMSNorm, own_norm
from megatron_prune.model.families import ModelConfig
from megatron_prune.model.prunable import FC2, PROJECTION, PrunableModel
from megatron_prune.statistics.passes import NORMS as LAYER_NORMS

POST_NORM = "post_layernorm"
NORMS = (*LAYER_NORMS, "final_layernorm", POST_NORM)


def _absent(units: Units, layer: int) -> list[str]:
    """Linears that write to the residual stream in halves of a layer that are gone."""
    if layer not in units.layers:
        return [PROJECTION, FC2]
    block = units.blocks[units.layers.index(layer)]
    return [path for path, kept in ((PROJECTION, block.heads), (FC2, block.ffn)) if not kept]


@torch.no_grad()
def mask_units(model: PrunableModel, units: Units) -> None:
    """Zero all units but `units`, in place. Norms that count every channel are replaced by ours. Collective."""
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
        ours = (("", module) for module in chunk.modules() if isinstance(module, (RMSNorm, LayerNorm)))
        for _, norm in ours if every else own_norms(chunk, config):
            norm.kept = kept


def own_norms(chunk: Any, config: ModelConfig) -> Iterator[tuple[str, RMSNorm | LayerNorm]]:
    """The norms of the residual stream with the last part of their names, those of Transformer Engine replaced by ours
    with the same parameters.
    """
    for name, module in list(chunk.named_modules()):
        path, _, last = name.rpartition(".")
        if last not in NORMS or not any(True for _ in module.parameters()):
            continue
        if not isinstance(module, (RMSNorm, LayerNorm)):
            own = own_norm(config)(chunk.config, config.hidden_size, config.layernorm_epsilon)
            for key, parameter in module.named_parameters():
                setattr(own, key, parameter)
            setattr(chunk.get_submodule(path), last, own)
            module = own
        yield last, module
