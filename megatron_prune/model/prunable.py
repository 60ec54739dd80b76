"""What pruning sees of a model: layers and linears by their unsharded names, whole tensors under any layout.

`PrunableModel` is this rank's part of a GPTModel together with the table that names every weight on both sides.
Weights travel, activations do not: `whole()` brings one unsharded tensor to every rank, `assign()` puts one back into
the shards that own it. Both are collective over all ranks and cost one layer's memory at a time.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from megatron_prune.model.family import masked
from megatron_prune.model.masked_linear import MaskDraw, MaskedLinear
from megatron_prune.model.summary import Zeros

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
"""The prunable linears of a decoder layer, in the order in which data passes through them."""
QKV, PROJECTION, FC1, FC2 = LINEARS
"""Each of them, as `Passes.observe` names its sites."""
LATENT = tuple(f"self_attention.linear_{name}" for name in ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj"))
"""Of latent attention, in place of `QKV`."""
DIRECT_QUERY = "self_attention.linear_q_proj"
"""The same in place of the first two, where queries are made from the hidden state."""
EXPERTS = "mlp.experts.local_experts"
SHARED = "mlp.shared_experts"
LAYERS_DIFFER = "layers_differ"
"""Attribute of a chunk of a model in which not all layers have the same parameters."""


@dataclass(frozen=True)
class LocalLinear:
    """One prunable linear of this rank."""

    map: WeightMap
    module: MaskedLinear
    layer: int
    """Global layer number, from 0."""
    tensor_id: int
    """Number of this linear in the unsharded model: layer * most linears of a layer + its place in `linear_paths`."""

    @property
    def name(self) -> str:
        """Unsharded Megatron name of the weight."""
        return self.map.megatron


def attention_linears(config: ModelConfig) -> tuple[str, ...]:
    """The prunable linears of a layer's attention by their path in it, in the order of data."""
    if config.kv_lora_rank is None:
        return QKV, PROJECTION
    queries, others = LATENT[:2], LATENT[2:]
    return *(queries if config.q_lora_rank else (DIRECT_QUERY,)), *others, PROJECTION


def linear_names(config: ModelConfig) -> tuple[str, ...]:
    """The last names of the prunable linears of its layers."""
    return tuple(path.split(".")[-1] for path in (*attention_linears(config), FC1, FC2))


def linear_paths(config: ModelConfig, layer: int | None = None) -> tuple[str, ...]:
    """The prunable linears of a decoder layer by their path in it, experts by their number in the whole model.

    In the order in which data passes through them; also those of absent halves. Without a layer's number: of the layer
    that has most.
    """
    if not config.has_experts(layer):
        return *attention_linears(config), FC1, FC2
    assert config.num_moe_experts
    mlps = [SHARED] if config.shared_width else []
    mlps += [f"{EXPERTS}.{expert}" for expert in range(config.num_moe_experts)]
    inner = (f"{mlp}.{linear}" for mlp in mlps for linear in ("linear_fc1", "linear_fc2"))
    return *attention_linears(config), *inner


def second_linears(config: ModelConfig, layer: int) -> list[str]:
    """The paths of the linears of a layer's MLP, or of each of its experts, that write to the residual stream."""
    return [path for path in linear_paths(config, layer) if path.endswith("linear_fc2")]


def input_symbol(path: str) -> str:
    """Symbolic size (`model/sizes.py`) of what enters a linear that writes to the residual stream."""
    if path == PROJECTION:
        return "query"
    return "shared_ffn" if path.startswith(SHARED) else "ffn"


def expert_of(path: str) -> int | None:
    """The number of the expert that something in a layer is of."""
    start = EXPERTS + "."
    return int(path.removeprefix(start).split(".", 1)[0]) if path.startswith(start) else None


def linear_groups(config: ModelConfig, layer: int) -> list[list[str]]:
    """The same by what data passes through one after the other: experts of a layer work side by side."""
    found: dict[str, list[str]] = {}
    for path in linear_paths(config, layer):
        found.setdefault(path.split(".")[-1], []).append(path)
    return list(found.values())


def _router_biases(chunk: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """What of a chunk's weights is trained by no gradient."""
    yield from ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith(".router.expert_bias"))


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
        self._before: dict[str, Tensor | None] | None = None

    def _local_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Unsharded Megatron name and this rank's shard of every weight of the table."""
        for number, chunk in enumerate(self.chunks):
            for name, parameter in (*chunk.named_parameters(), *_router_biases(chunk)):
                match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
                if match:
                    path = self._renumbered(match[2], self.first_expert)
                    name = f"decoder.layers.{int(match[1]) + self.first_layer(number)}.{path}"
                if not name.endswith("mask_logits"):
                    yield name, parameter

    @property
    def tp_rank(self) -> int:
        """This rank's place among the tensor-parallel ranks."""
        return parallel_state.get_tensor_model_parallel_rank()

    @staticmethod
    def _renumbered(path: str, difference: int) -> str:
        """The path of something in a layer, with another number of its expert, if it is of one."""
        start = EXPERTS + "."
        if not difference or not path.startswith(start):
            return path
        number, rest = path.removeprefix(start).split(".", 1)
        return f"{start}{int(number) + difference}.{rest}"

    @property
    def local_experts(self) -> int:
        """Experts of a layer that this rank has; 0 in a model without any."""
        return (self.config.num_moe_experts or 0) // self.layout.expert

    @property
    def first_expert(self) -> int:
        """The first of them, by its number in the whole model."""
        return self.local_experts * parallel_state.get_expert_model_parallel_rank() if self.local_experts else 0

    def seen_together(self, map: WeightMap) -> float:
        """Micro-batches whose tokens pass through a weight at a time: an expert gets those of several replicas, and a
        linear that sequence parallelism does not split a part of one.
        """
        if map.expert is not None:
            return self.layout.replicas_together
        return 1 / self.layout.tensor if map.shard_dim is None and self.layout.sequence_parallel else 1.0

    def counts(self, map: WeightMap) -> bool:
        """Whether this rank's part of a weight is the first of its copies: the one to count where ranks are summed."""
        if map.expert is not None:
            return parallel_state.get_expert_data_parallel_rank() == 0
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        whole = map.shard_dim is None  # on every tensor-parallel rank
        return replica == 0 and not (whole and self.tp_rank)

    def part(self, map: WeightMap) -> tuple[int, int]:
        """This rank's place among those that share a weight's layer or expert, and how many they are."""
        if map.expert is None:
            return parallel_state.get_tensor_model_parallel_rank(), self.layout.tensor
        return parallel_state.get_expert_tensor_parallel_rank(), self.layout.expert_tensor_size

    @property
    def layers_per_chunk(self) -> int:
        """Consecutive decoder layers that a process holds."""
        return self.config.num_layers // (self.layout.pipeline * self.layout.chunks)

    def first_layer(self, chunk: int) -> int:
        """Global number of the first layer of one of this rank's chunks."""
        return (
            chunk * self.layout.pipeline + parallel_state.get_pipeline_model_parallel_rank()
        ) * self.layers_per_chunk

    def holder(self, map: WeightMap) -> int | None:
        """The first process of those that hold a weight; None where all of them do, in part or in copies.

        megatron-core counts processes by expert-tensor part, then by share of the experts, then by replica, and the
        stages of the pipeline last.
        """
        if self.layout.pipeline == 1 and (map.expert is None or self.layout.expert == 1):
            return None
        first = self.stage_of(map) * (dist.get_world_size() // self.layout.pipeline)
        share = 0 if map.expert is None else map.expert // self.local_experts
        return first + share * self.layout.expert_tensor_size

    def stage_of(self, map: WeightMap) -> int:
        """Pipeline stage that holds a weight."""
        if map.layer is not None:
            return map.layer // self.layers_per_chunk % self.layout.pipeline
        return 0 if map.megatron.startswith("embedding") else self.layout.pipeline - 1

    def linears(self) -> list[LocalLinear]:
        """This rank's prunable linears in model order."""
        found, most = [], len(linear_paths(self.config))
        here = range(self.first_expert, self.first_expert + self.local_experts)
        for chunk, model in enumerate(self.chunks):
            for number, layer in enumerate(model.decoder.layers, start=self.first_layer(chunk)):
                for kind, path in enumerate(linear_paths(self.config, number)):
                    map = self.by_name.get(f"decoder.layers.{number}.{path}.weight")
                    if map is None or (map.expert is not None and map.expert not in here):
                        continue  # this half of the layer is absent, or the expert is another rank's
                    module = layer.get_submodule(self._renumbered(path, -self.first_expert))
                    found.append(LocalLinear(map, module, number, number * most + kind))
        return found

    def eval(self) -> None:
        """Set all chunks to inference."""
        for chunk in self.chunks:
            chunk.eval()

    def position(self, linear: LocalLinear, m: int) -> Position:
        """Where this rank's shard of a linear lies in the unsharded weight, in groups of `m`."""
        part, parts = self.part(linear.map)
        rows = convert.row_ids(linear.map, self.config, part, parts)
        local_groups = linear.module.weight.shape[1] // m
        split = linear.module.shard_axis == 1
        return Position(
            row_ids=rows.to(linear.module.weight.device),
            first_group=local_groups * part if split else 0,
            groups_per_row=local_groups * (parts if split else 1),
        )

    def learn_masks(self, draw: MaskDraw, leaves: Callable[[str], bool] = lambda name: False) -> None:
        """Give every prunable linear of this rank mask logits (zeros), but those that stay dense by `leaves`.

        Experts of a layer have the same parameters: all have logits of what is masked in one of them.
        """
        learned = masked(self.maps, leaves)
        for chunk in self.chunks:
            setattr(chunk, LAYERS_DIFFER, any(map.prunable and map.alike not in learned for map in self.maps))
        for linear in self.linears():
            if linear.map.alike not in learned:
                continue
            position = self.position(linear, draw.m)
            dense = torch.zeros(linear.map.shape[0], dtype=torch.bool)
            for name, rows in convert.row_blocks(linear.map, self.config).items():
                dense[rows] = leaves(name)
            here = dense[position.row_ids.cpu()] if dense.any() else None
            linear.module.learn_mask(draw, position, linear.tensor_id, here)
            linear.module.seen_together = self.seen_together(linear.map)

    def masked_linears(self) -> list[LocalLinear]:
        """Those of `linears` that have mask logits."""
        return [linear for linear in self.linears() if linear.module.mask_draw is not None]

    def whole(self, map: WeightMap) -> Tensor:
        """The unsharded Megatron tensor of `map` on every rank, on this rank's device. Collective."""
        return self.gather(map, self.parameters.get(map.megatron))

    def gather(self, map: WeightMap, local: Tensor | None) -> Tensor:
        """As `whole`, for a tensor that is sharded like the weight of `map`; None where no part of it is."""
        here = parallel_state.get_pipeline_model_parallel_rank() == self.stage_of(map)
        if map.expert is not None and self.layout.expert > 1:
            here = here and self.first_expert <= map.expert < self.first_expert + self.local_experts
        tensor = self._join_shards(map, local) if here else None
        return self._from_holder(tensor, self.holder(map))

    def _join_shards(self, map: WeightMap, local: Tensor | None) -> Tensor:
        assert local is not None, f"{map.megatron} is not on this rank"
        local, (_, parts) = local.detach().contiguous(), self.part(map)
        if parts == 1:
            return convert.unshard(map, [local], self.config)
        shards = [torch.empty_like(local) for _ in range(parts)]
        group = parallel_state.get_tensor_model_parallel_group
        dist.all_gather(
            shards, local, group=group() if map.expert is None else parallel_state.get_expert_tensor_parallel_group()
        )
        return convert.unshard(map, shards, self.config)

    def _from_holder(self, tensor: Tensor | None, source: int | None) -> Tensor:
        """Bring a tensor from the process that holds it to all; None: all have it."""
        if source is None:
            assert tensor is not None
            return tensor
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
        if self._before is not None and map.megatron not in self._before:
            self._before[map.megatron] = self.copied([map.megatron]).get(map.megatron)
        if parameter is not None:
            parameter.copy_(self.shard(map, tensor))
        if map.megatron == "embedding.word_embeddings.weight" and self.config.tie_word_embeddings:
            copy = self.parameters.get("output_layer.weight")
            if copy is not None:
                copy.copy_(self.shard(map, tensor))

    def copied(self, names: Iterable[str]) -> dict[str, Tensor]:
        """This rank's shards of the parameters of these names, those that it has, as they are now, in host memory."""
        return {name: self.parameters[name].detach().to("cpu", copy=True) for name in names if name in self.parameters}

    @contextlib.contextmanager
    def remembering(self) -> Iterator[dict[str, Tensor | None]]:
        """By their names the tensors that `assign` changes meanwhile, as they were: this rank's shards, in host memory;
        None of one that other ranks have.
        """
        self._before = {}
        try:
            yield self._before
        finally:
            self._before = None

    @torch.no_grad()
    def put_back(self, copies: Mapping[str, Tensor | None]) -> None:
        """Give parameters the values that `copied` or `remembering` has kept."""
        for name, shard in copies.items():
            if shard is not None:
                self.parameters[name].copy_(shard)

    def shard(self, map: WeightMap, tensor: Tensor) -> Tensor:
        """This rank's part of an unsharded Megatron tensor."""
        return convert.shard(map, tensor, *self.part(map))

    def load(self, tensors: Iterable[tuple[WeightMap, Tensor]]) -> None:
        """Fill this rank's parameters from unsharded tensors."""
        for map, tensor in tensors:
            self.assign(map, tensor)

    def needed(self, map: WeightMap) -> bool:
        """Whether this rank holds a part of the weight."""
        tied = map.megatron == "embedding.word_embeddings.weight" and self.config.tie_word_embeddings
        return map.megatron in self.parameters or (tied and "output_layer.weight" in self.parameters)

    def zeros(self) -> Zeros:
        """Of all prunable weights of the whole model. Collective."""
        zeros = torch.zeros((), dtype=torch.int64, device=backend.device())
        for linear in self.linears():
            weight = linear.module.weight
            if self.counts(linear.map):
                zeros += weight.numel() - weight.count_nonzero()
        dist.all_reduce(zeros)
        return Zeros(int(zeros), sum(math.prod(map.shape) for map in self.maps if map.prunable))

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face name and tensor of every weight, one Megatron tensor at a time, on every rank. Collective."""
        for map in self.maps:
            tensor = self.whole(map)
            yield from zip(map.hf, convert.split(map, tensor, self.config), strict=True)
