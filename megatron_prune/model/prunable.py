"""What pruning sees of a model: layers and linears by their unsharded names, whole tensors under any layout.

`PrunableModel` is this rank's part of a GPTModel together with the table that names every weight on both sides.
Weights travel, activations do not: `whole()` brings one unsharded tensor to every rank, `assign()` puts one back into
the shards that own it. Both are collective over all ranks and cost one layer's memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_prune.kernels.gumbel import Position
from megatron_prune.model import convert
from megatron_prune.model.families import ModelConfig, WeightMap, get_family
from megatron_prune.model.masked_linear import MaskDraw, MaskedLinear

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
"""The prunable linears of a decoder layer, in the order in which data passes through them."""
QKV, PROJECTION, FC1, FC2 = LINEARS
"""Each of them, as `Passes.observe` names its sites."""


@dataclass(frozen=True)
class LocalLinear:
    """One prunable linear of this rank."""

    map: WeightMap
    module: MaskedLinear
    layer: int
    """Global layer number, from 0."""
    tensor_id: int
    """Number of this linear in the unsharded model: layer * 4 + its place in LINEARS."""

    @property
    def name(self) -> str:
        """Unsharded Megatron name of the weight."""
        return self.map.megatron


class PrunableModel:
    """A GPTModel in some layout, seen without its layout.

    `chunks` are this rank's pieces of it: one, or one for each virtual pipeline stage.
    """

    def __init__(self, config: ModelConfig, layout: backend.Layout, chunks: list[GPTModel]) -> None:
        self.config = config
        self.layout = layout
        self.chunks = chunks
        self.maps = get_family(config.family).weights(config)
        self.by_name = {m.megatron: m for m in self.maps}
        self.parameters = dict(self._local_parameters())

    def _local_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Unsharded Megatron name and this rank's shard of every weight of the table."""
        for number, chunk in enumerate(self.chunks):
            for name, parameter in chunk.named_parameters():
                match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
                if match:
                    name = f"decoder.layers.{int(match[1]) + self.first_layer(number)}.{match[2]}"
                if not name.endswith("mask_logits"):
                    yield name, parameter

    @property
    def tp_rank(self) -> int:
        """This rank's place among the tensor-parallel ranks."""
        return parallel_state.get_tensor_model_parallel_rank()

    @property
    def layers_per_chunk(self) -> int:
        """Consecutive decoder layers that a process holds."""
        return self.config.num_layers // (self.layout.pipeline * self.layout.chunks)

    def first_layer(self, chunk: int) -> int:
        """Global number of the first layer of one of this rank's chunks."""
        return (
            chunk * self.layout.pipeline + parallel_state.get_pipeline_model_parallel_rank()
        ) * self.layers_per_chunk

    def stage_of(self, map: WeightMap) -> int:
        """Pipeline stage that holds a weight."""
        if map.layer is not None:
            return map.layer // self.layers_per_chunk % self.layout.pipeline
        return 0 if map.megatron.startswith("embedding") else self.layout.pipeline - 1

    def linears(self) -> list[LocalLinear]:
        """This rank's prunable linears in model order."""
        found = []
        for chunk, model in enumerate(self.chunks):
            for number, layer in enumerate(model.decoder.layers, start=self.first_layer(chunk)):
                for kind, path in enumerate(LINEARS):
                    map = self.by_name.get(f"decoder.layers.{number}.{path}.weight")
                    if map is None:  # this half of the layer is absent
                        continue
                    found.append(LocalLinear(map, layer.get_submodule(path), number, number * len(LINEARS) + kind))
        return found

    def eval(self) -> None:
        """Set all chunks to inference."""
        for chunk in self.chunks:
            chunk.eval()

    def position(self, linear: LocalLinear, m: int) -> Position:
        """Where this rank's shard of a linear lies in the unsharded weight, in groups of `m`."""
        rows = convert.row_ids(linear.map, self.config, self.tp_rank, self.layout.tensor)
        local_groups = linear.module.weight.shape[1] // m
        split = linear.module.shard_axis == 1
        return Position(
            row_ids=rows.to(linear.module.weight.device),
            first_group=local_groups * self.tp_rank if split else 0,
            groups_per_row=local_groups * (self.layout.tensor if split else 1),
        )

    def learn_masks(self, draw: MaskDraw) -> None:
        """Give every prunable linear of this rank mask logits (zeros)."""
        for linear in self.linears():
            linear.module.learn_mask(draw, self.position(linear, draw.m), linear.tensor_id)

    def whole(self, map: WeightMap) -> Tensor:
        """The unsharded Megatron tensor of `map` on every rank, on this rank's device. Collective."""
        return self.gather(map, self.parameters.get(map.megatron))

    def gather(self, map: WeightMap, local: Tensor | None) -> Tensor:
        """As `whole`, for a tensor that is sharded like the weight of `map`; None outside its stage."""
        stage = self.stage_of(map)
        here = parallel_state.get_pipeline_model_parallel_rank() == stage
        tensor = self._join_shards(map, local) if here else None
        return self._from_stage(tensor, stage)

    def _join_shards(self, map: WeightMap, local: Tensor | None) -> Tensor:
        assert local is not None, f"{map.megatron} is not on this rank"
        local = local.detach().contiguous()
        if self.layout.tensor == 1:
            return convert.unshard(map, [local], self.config)
        shards = [torch.empty_like(local) for _ in range(self.layout.tensor)]
        dist.all_gather(shards, local, group=parallel_state.get_tensor_model_parallel_group())
        return convert.unshard(map, shards, self.config)

    def _from_stage(self, tensor: Tensor | None, stage: int) -> Tensor:
        """Bring a tensor from one pipeline stage to all ranks."""
        if self.layout.pipeline == 1:
            assert tensor is not None
            return tensor
        source = stage * (dist.get_world_size() // self.layout.pipeline)
        about = [None if tensor is None else (tuple(tensor.shape), tensor.dtype)]
        dist.broadcast_object_list(about, src=source)
        assert about[0] is not None
        shape, dtype = about[0]
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype, device=backend.device())
        tensor = tensor.contiguous()
        as_bytes = tensor.view(torch.uint8) if dtype == torch.bool else tensor
        dist.broadcast(as_bytes, src=source)
        return tensor

    @torch.no_grad()
    def assign(self, map: WeightMap, tensor: Tensor) -> None:
        """Put an unsharded Megatron tensor into this rank's shard, if it has one. Local."""
        parameter = self.parameters.get(map.megatron)
        if parameter is not None:
            parameter.copy_(self.shard(map, tensor))
        if map.megatron == "embedding.word_embeddings.weight" and self.config.tie_word_embeddings:
            copy = self.parameters.get("output_layer.weight")
            if copy is not None:
                copy.copy_(self.shard(map, tensor))

    def shard(self, map: WeightMap, tensor: Tensor) -> Tensor:
        """This rank's part of an unsharded Megatron tensor."""
        return convert.shard(map, tensor, self.tp_rank, self.layout.tensor)

    def load(self, tensors: Iterable[tuple[WeightMap, Tensor]]) -> None:
        """Fill this rank's parameters from unsharded tensors."""
        for map, tensor in tensors:
            self.assign(map, tensor)

    def needed(self, map: WeightMap) -> bool:
        """Whether this rank holds a part of the weight."""
        tied = map.megatron == "embedding.word_embeddings.weight" and self.config.tie_word_embeddings
        return map.megatron in self.parameters or (tied and "output_layer.weight" in self.parameters)

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face name and tensor of every weight, one Megatron tensor at a time, on every rank. Collective."""
        for map in self.maps:
            tensor = self.whole(map)
            yield from zip(map.hf, convert.split(map, tensor, self.config), strict=True)
