"""Soft mask mode: the activations of units are multiplied by masks z in [0, 1] while a model trains.

Where a mask acts (Xia et al. 2023, arXiv:2310.06694, section 2.1), in this rank's part of the model:

    hidden        outputs of the embedding, of the norms, of linear_proj and of linear_fc2
    layer         outputs of linear_proj and of linear_fc2
    group, head   inputs of linear_proj, all channels of a query head
    ffn           inputs of linear_fc2

A channel whose z is 0 is then 0 everywhere in the residual stream, and norms count the others only: a model with closed
masks computes what the cut one would. `fold` multiplies masks into the weights instead.

Gradients of the masks: tensor-parallel ranks have slices of heads and neurons, so theirs add up; outputs of the
residual stream are the same on all of them, or with sequence parallelism parts of it. Data- and context-parallel ranks
are averaged, as weights are, and pipeline stages add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import megatron_prune.backend as backend  # isort: skip  # noqa: F401  (before megatron.core)
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_prune.model.build import LayerNorm, RMSNorm
from megatron_prune.model.families import ModelConfig, WeightMap
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.training.masking import NORMS, POST_NORM, own_norms

SHARDED = ("group", "head", "ffn")
"""Kinds of masks of which a tensor-parallel rank uses a slice."""


class Gates:
    """Multiplies the activations of a model by the masks that it was last given."""

    def __init__(self, model: PrunableModel) -> None:
        """Without masks nothing changes. Norms that count every channel are replaced by the package's own."""
        self.model = model
        self.z: Mapping[str, Tensor] = {}
        self.norms: list[RMSNorm | LayerNorm] = []
        self.handles: list[Any] = []
        for number, chunk in enumerate(model.chunks):
            self._attach(chunk, model.first_layer(number))

    def _attach(self, chunk: Any, first_layer: int) -> None:
        if chunk.pre_process:
            self._after(chunk.embedding, lambda x: self._hidden(x))
        for name, norm in own_norms(chunk, self.model.config):
            self.norms.append(norm)
            if name != POST_NORM:  # masked with the linear that it is in
                self._after(norm, lambda x: self._hidden(x))
        for layer, module in enumerate(chunk.decoder.layers, start=first_layer):
            block = self.model.config.block(layer)
            if block.num_attention_heads:
                self._around(module.self_attention.linear_proj, layer, self._heads)
            if block.ffn_hidden_size:
                self._around(module.mlp.linear_fc2, layer, self._neurons)

    def _after(self, module: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        self.handles.append(module.register_forward_hook(lambda _module, _inputs, output: change(output)))

    def _around(self, module: torch.nn.Module, layer: int, change: Callable[[Tensor, int], Tensor]) -> None:
        """`change` the inputs of a linear that writes to the residual stream, and mask its output and bias."""

        def before(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return change(inputs[0], layer), *inputs[1:]

        def after(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
            x, bias = output
            return self._written(x, layer), None if bias is None else self._written(bias, layer)

        self.handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def set(self, z: Mapping[str, Tensor]) -> None:
        """Use these masks from now on, by kind, unsharded; a kind that is left out is all ones."""
        self.z = z
        hidden = z.get("hidden")
        kept = None if hidden is None else hidden.detach().nonzero().flatten()
        for norm in self.norms:
            norm.kept = kept

    def remove(self) -> None:
        """Leave the model as it was."""
        self.set({})
        for handle in self.handles:
            handle.remove()

    def _hidden(self, x: Tensor) -> Tensor:
        return _times(x, self.z.get("hidden"))

    def _written(self, x: Tensor, layer: int) -> Tensor:
        return _times(x, _writer(self.z, layer))

    def _heads(self, x: Tensor, layer: int) -> Tensor:
        z = _heads(self.model.config, self.z, layer)
        return x if z is None else _times(x, self._slice(z).repeat_interleave(self.model.config.kv_channels))

    def _neurons(self, x: Tensor, layer: int) -> Tensor:
        z = self.z.get("ffn")
        return x if z is None else _times(x, self._slice(z[layer]))

    def _slice(self, z: Tensor) -> Tensor:
        """This rank's heads or neurons, which are contiguous."""
        return z.chunk(self.model.layout.tensor)[self.model.tp_rank]

    def gradients(self) -> dict[str, Tensor]:
        """Of the mean loss of all replicas by every mask, float64; call between backward pass and update. Collective.

        A mask that no rank has used has zero.
        """
        layout = self.model.layout
        replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        repeated = 1 if layout.sequence_parallel else layout.tensor
        parts = [
            (torch.zeros_like(z) if z.grad is None else z.grad).double().flatten()
            / (replicas * (1 if kind in SHARDED else repeated))
            for kind, z in self.z.items()
        ]
        total = torch.cat(parts)
        dist.all_reduce(total)
        pieces = total.split([len(part) for part in parts])
        return {kind: piece.view_as(z) for (kind, z), piece in zip(self.z.items(), pieces, strict=True)}


def _times(x: Tensor, z: Tensor | None) -> Tensor:
    return x if z is None else x * z.to(x.dtype)


def _writer(z: Mapping[str, Tensor], layer: int) -> Tensor | None:
    """Masks `[hidden]` or `[]` of what a layer adds to the residual stream; None: all ones."""
    hidden, whole = z.get("hidden"), z.get("layer")
    if hidden is None or whole is None:
        return hidden if whole is None else whole[layer]
    return hidden * whole[layer]


def _heads(config: ModelConfig, z: Mapping[str, Tensor], layer: int) -> Tensor | None:
    """Masks `[heads]` of a layer's query heads; None: all ones."""
    group, head = z.get("group"), z.get("head")
    if group is None:
        return None if head is None else head[layer].flatten()
    wide = group[layer].repeat_interleave(config.block(layer).group_heads)
    return wide if head is None else wide * head[layer].flatten()


@torch.no_grad()
def fold(model: PrunableModel, z: Mapping[str, Tensor]) -> None:
    """Multiply masks into the weights: the model then computes without them what it does with them, once cut to the
    units whose masks are not zero. Collective.

    An output layer that shares the embedding's weight has its masks from there, others from the final norm.
    """
    for map in model.maps:
        whole = model.whole(map)
        model.assign(map, _folded(model.config, map, whole.float(), z).to(whole.dtype))


def _folded(config: ModelConfig, map: WeightMap, tensor: Tensor, z: Mapping[str, Tensor]) -> Tensor:
    hidden = z.get("hidden")
    module, _, name = map.megatron.rpartition(".")
    if module.startswith("embedding"):
        return _times(tensor, hidden)
    last = module.rpartition(".")[2]
    if last == POST_NORM:
        assert map.layer is not None
        return _times(tensor + config.gain_offset, _writer(z, map.layer)) - config.gain_offset
    if last in NORMS:
        if last == "final_layernorm" and config.tie_word_embeddings:
            return tensor
        offset = config.gain_offset if name == "weight" else 0.0
        return _times(tensor + offset, hidden) - offset
    if map.layer is None or last not in ("linear_proj", "linear_fc2"):
        return tensor
    rows = _writer(z, map.layer)
    if name == "bias":
        return _times(tensor, rows)
    if rows is not None and not config.post_layernorm:
        tensor = tensor * rows.expand(len(tensor))[:, None]
    if last == "linear_fc2":
        return _times(tensor, z["ffn"][map.layer] if "ffn" in z else None)
    heads = _heads(config, z, map.layer)
    return tensor if heads is None else tensor * heads.repeat_interleave(config.kv_channels)
