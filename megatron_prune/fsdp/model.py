"""A Hugging Face model as transformers has it, its parameters sharded over all processes by PyTorch's FSDP2.

Rows are shared out in order, and whole layers exist only while they compute:

    parameter [rows, ...] on n processes      process r holds rows r * k to (r + 1) * k, k = rows / n rounded up
    parameter, gradient, moments of Adam      float32, sharded alike; a decoder layer at a time is gathered, in the
                                              model's own type, for its forward and for its backward pass
    experts of a layer [experts, ...]         one parameter, as transformers has them: a process holds whole experts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import megatron_prune.backend as backend  # isort: skip
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils.checkpoint import checkpoint

from megatron_prune.decision.masks import prunable_shapes
from megatron_prune.errors import UserError
from megatron_prune.model.checkpoint import compute_dtype
from megatron_prune.model.convert import HFReader
from megatron_prune.model.families import ModelConfig, WeightMap, get_family
from megatron_prune.model.stored import Part
from megatron_prune.model.transformers_model import empty_model
from megatron_prune.training.zeros import check_zeros


class ShardedModel:
    """This process's part of a model."""

    def __init__(
        self,
        reader: HFReader,
        dtype: str | None = None,
        *,
        masks: Callable[[str], Tensor] | None = None,
        trained: bool = True,
        recompute: bool = False,
    ) -> None:
        """Weights computed with in `dtype` (None: as the directory has them), float32 masters when they are `trained`.

        `masks`: of the prunable weights by name, False where one becomes zero. `recompute`: layers run again in the
        backward pass. Collective.
        """
        self.config: ModelConfig = replace(reader.model_config, dtype=dtype) if dtype else reader.model_config
        compute = compute_dtype(self.config.dtype)
        self.module = _empty_module(reader, torch.float32 if trained else compute)
        self.module.requires_grad_(trained)
        self.layers = _layers(self.module, self.config)
        if recompute:
            for layer in self.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        self._shard(compute if trained else None)
        self.parameters: dict[str, Parameter] = dict(self.module.named_parameters())
        """By transformers' name, each once; tensors are torch's DTensors."""
        self.buffers = dict(self.module.named_buffers())
        self.places = {name: (place, part) for map in _weights(self.config) for name, place, part in map.places()}
        """Of every weight by its name in a file: where it is, and which part of that, where it is one of experts."""
        self._load(reader, masks)

    def _shard(self, compute: torch.dtype | None) -> None:
        """Layer by layer, the rest with the whole; memory is taken now."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(backend.device().type, (dist.get_world_size(),))
        lower = None if compute == torch.float32 else compute
        policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32 if lower else None)
        for module in (*self.layers, self.module):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        self.module.to_empty(device=backend.device())
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])

    @torch.no_grad()
    def _load(self, reader: HFReader, masks: Callable[[str], Tensor] | None) -> None:
        """Read this process's rows of every weight, one weight at a time."""
        known = {place for place, _ in self.places.values()}
        assert known - set(self.buffers) == set(self.parameters), "the table and transformers name other weights"
        prunable = prunable_shapes(self.config)
        for name, (place, part) in self.places.items():
            if place in self.buffers:
                self.buffers[place].copy_(reader.read(name))
                continue
            parameter = self.parameters[place]
            own = local(parameter)
            rows = -(-parameter.shape[0] // dist.get_world_size())
            first = min(dist.get_rank() * rows, parameter.shape[0])
            here = slice(first, first + own.shape[0])
            if part is None:
                own.copy_(reader.read_rows(name, here.start, here.stop))
            elif here.start <= part.expert < here.stop:
                own, here = replace(part, expert=part.expert - first).of(own), slice(None)
                own.copy_(reader.read(name))
            else:
                continue
            if masks is not None and name in prunable:
                own.masked_fill_(~masks(name)[here].to(own.device), 0.0)

    def logits(self, tokens: Tensor) -> Tensor:
        """`[b, s, vocab]` of tokens `[b, s]`, in the type that is computed in. Collective."""
        return self.module(input_ids=tokens, use_cache=False).logits

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face name and whole weight, in the model's own type, on every process. Collective, each."""
        dtype = compute_dtype(self.config.dtype)
        parts: dict[str, dict[str, Part | None]] = {}
        for name, (place, part) in self.places.items():
            parts.setdefault(place, {})[name] = part
        for place, names in parts.items():
            together = self.buffers[place] if place in self.buffers else whole(self.parameters[place]).to(dtype)
            for name, part in names.items():
                yield name, together if part is None else part.of(together).contiguous()


def _weights(config: ModelConfig) -> list[WeightMap]:
    return get_family(config.family).weights(config)


def local(tensor: Any) -> Tensor:
    """This process's rows of a sharded tensor; they share its memory."""
    return tensor.detach().to_local()


def whole(tensor: Any) -> Tensor:
    """All rows of a sharded tensor. Collective."""
    return tensor.detach().full_tensor()


class ShardedZeros:
    """The weights of a model's prunable linears that are zero when this is made; each becomes +0.0."""

    def __init__(self, model: ShardedModel) -> None:
        places = {model.places[name][0] for name in prunable_shapes(model.config)}
        self.parameters = [parameter for name, parameter in model.parameters.items() if name in places]
        self.masks = [local(parameter) == 0 for parameter in self.parameters]
        for parameter, mask in zip(self.parameters, self.masks, strict=True):
            local(parameter).masked_fill_(mask, 0.0)

    def clear_gradients(self) -> None:
        """Between the backward pass and the optimizer's step."""
        for parameter, mask in zip(self.parameters, self.masks, strict=True):
            local(parameter.grad).mul_(~mask)

    def check(self, when: str) -> int:
        """Their number, over the whole model; UserError when one is not +0.0 any more. Collective."""
        pairs = zip(self.parameters, self.masks, strict=True)
        return check_zeros(((local(parameter)[mask], True) for parameter, mask in pairs), when)


def check_model(config: ModelConfig, dtype: str | None, given: str) -> None:
    """UserError when FSDP cannot have a model, `given` by these words, in `dtype` (None: its own)."""
    compute_dtype(dtype or config.dtype)
    if config.blocks is not None:
        raise UserError(
            f"--engine fsdp: {given} is a model whose layers differ, which transformers builds only with code of its "
            "own; train it with --engine megatron, or export it with --layers padded"
        )


def _empty_module(reader: HFReader, dtype: torch.dtype) -> Module:
    """transformers' model of a directory, without memory for parameters. No code that lies in the directory is run.

    It stays in evaluation mode: there is no dropout, as in the models of the other engine. The padding token, which
    may be the end of a text, learns like any other; transformers would give its embedding no gradient.
    """
    module = empty_model(reader.model_config, dtype)
    module.get_input_embeddings().padding_idx = None  # type: ignore[operator]
    return module


def _layers(module: Module, config: ModelConfig) -> list[Module]:
    """The decoder layers, found by the names of their weights."""
    first = {map.layer: map.hf[0] for map in _weights(config) if map.layer is not None}
    return [module.get_submodule(name[: name.index(f".{layer}.")] + f".{layer}") for layer, name in first.items()]
