"""LoRA (Hu et al. 2021, arXiv:2106.09685): frozen weights W, trained low-rank changes W + (alpha / rank) * B A.

Both factors are float32 and sharded with the weight they belong to; a factor that tensor parallelism does not split is
replicated, and the gradients of its copies are summed:

    column-parallel   W [out / tp, in]     A [rank, in]  replicated     B [out / tp, rank]
    row-parallel      W [out, in / tp]     A [rank, in / tp]            B [out, rank]  replicated
    replicated        W [out, in]          A [rank, in]  replicated     B [out, rank]  replicated

Where this differs from the paper, and why:
- The forward pass multiplies by the changed weight, zeros kept and rounded to the model's type: exactly what the merge
  writes, so that nothing is lost in the merge, and pruned weights take no part from the first step on. A second, narrow
  path beside W could keep neither. The price is the gradient of a full weight in passing; optimizer state stays small.
- A fused linear (query, key and value; gate and up) has one A for its parts.
- Dropout leaves out input channels for a whole optimizer step instead of single inputs of single tokens: a function of
  the seed and the step, and so the same in every layout and when layers run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import megatron_prune.backend as backend  # isort: skip  # noqa: F401  (before megatron.core)
import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor
from torch.nn import Parameter

from megatron_prune.errors import UserError
from megatron_prune.kernels.definition import hash_key
from megatron_prune.model.families import ModelConfig, get_family
from megatron_prune.model.masked_linear import MaskedLinear, sequence_parallel
from megatron_prune.model.prunable import DIRECT_QUERY, LATENT, LINEARS, LocalLinear, PrunableModel


@dataclass
class Adapters:
    """What the adapters of a model share."""

    rank: int
    alpha: float
    dropout: float
    seed: int
    keep_zeros: bool
    step: int = 0
    """Optimizer step, moved on by the trainer; it decides what is dropped."""

    def generator(self, *place: int) -> torch.Generator:
        """Random numbers of one adapter for one purpose, the same on every rank."""
        low, high = hash_key(self.seed, *place)
        return torch.Generator().manual_seed(high << 31 | low >> 1)


START, DROPOUT = 0, 1
"""Purposes of random numbers."""


def add_adapters(model: PrunableModel, adapters: Adapters, targets: Sequence[str]) -> list[LocalLinear]:
    """Freeze the model and give the linears that `targets` name adapters that change nothing yet; returns them."""
    kinds = linear_kinds(model.config, targets)
    for chunk in model.chunks:
        chunk.requires_grad_(False)
    chosen = [linear for linear in model.linears() if linear.name.split(".")[-2] in kinds]
    for linear in chosen:
        _add(linear, adapters, *model.part(linear.map))
    return chosen


def linear_kinds(config: ModelConfig, targets: Sequence[str]) -> set[str]:
    """The linears, by Megatron's names, that `targets` name in Megatron's or Hugging Face's words; or UserError."""
    parts = {
        map.megatron.split(".")[-2]: {name.split(".")[-2] for name in map.hf}
        for map in get_family(config.family).weights(config)
        if map.prunable
    }
    known = {path.split(".")[-1] for path in LINEARS}
    wanted, allowed = set(targets), known.union(*parts.values(), parts)
    if "linear_qkv" in wanted and "linear_qkv" not in parts:  # what is in its place
        wanted |= parts.keys() & {path.split(".")[-1] for path in (*LATENT, DIRECT_QUERY)}
    if not wanted or wanted - allowed:
        given = ", ".join(sorted(wanted - allowed)) or "nothing"
        raise UserError(f"--lora-targets: {given} given; allowed: {', '.join(sorted(allowed))}")
    for kind, names in parts.items():
        if kind not in wanted and names & wanted and names - wanted:
            raise UserError(
                f"--lora-targets: {', '.join(sorted(names & wanted))} given; {kind} holds {', '.join(sorted(names))} "
                "in one matrix: give all of them or none"
            )
    return {kind for kind, names in parts.items() if kind in wanted or names <= wanted}


def _add(linear: LocalLinear, adapters: Adapters, part: int, parts: int) -> None:
    module, (out, inputs) = linear.module, linear.module.weight.shape
    row_parallel = module.shard_axis == 1
    whole = inputs * parts if row_parallel else inputs
    first = inputs * part if row_parallel else 0
    bound = whole**-0.5
    a = torch.empty(adapters.rank, whole).uniform_(-bound, bound, generator=adapters.generator(START, linear.tensor_id))
    module.lora_a = Parameter(a[:, first : first + inputs].to(module.weight.device, copy=True))
    module.lora_b = Parameter(torch.zeros(out, adapters.rank, device=module.weight.device))
    module.extra_axes = {}
    if module.shard_axis is not None:
        name, axis = ("lora_a", 1) if row_parallel else ("lora_b", 0)
        set_tensor_model_parallel_attributes(getattr(module, name), True, axis, 1)
        module.extra_axes = {name: axis}
    for parameter in (module.lora_a, module.lora_b):
        parameter.allreduce = getattr(module.weight, "allreduce", True)  # type: ignore[attr-defined]
    module.changed_weight = partial(_changed, module, adapters, linear.tensor_id, slice(first, first + inputs), whole)


def _changed(
    module: MaskedLinear, adapters: Adapters, tensor_id: int, columns: slice, whole: int, weight: Tensor
) -> Tensor:
    """W + (alpha / rank) * B A of this rank's shard, zeros of W kept where asked for, in W's type."""
    a: Tensor = module.lora_a
    b: Tensor = module.lora_b
    if module.shard_axis is None:
        if sequence_parallel(module):  # each rank has seen a part of the tokens
            a, b = (copy_to_tensor_model_parallel_region(x, group=module.tp_group) for x in (a, b))
    elif module.shard_axis == 0:
        a = copy_to_tensor_model_parallel_region(a, group=module.tp_group)
    else:
        b = copy_to_tensor_model_parallel_region(b, group=module.tp_group)
    if adapters.dropout and module.training:
        kept = torch.rand(whole, generator=adapters.generator(DROPOUT, tensor_id, adapters.step)) >= adapters.dropout
        a = a * (kept[columns].to(a.device) / (1 - adapters.dropout))
    change = (b @ a) * (adapters.alpha / adapters.rank)
    if adapters.keep_zeros:
        change = change.masked_fill(weight == 0, 0.0)
    return (weight.float() + change).to(weight.dtype)


@torch.no_grad()
def merge_adapters(linears: Sequence[LocalLinear]) -> None:
    """Write the changed weights in place of the frozen ones and take the adapters away."""
    for linear in linears:
        module = linear.module
        assert module.changed_weight is not None
        module.eval()
        module.weight.copy_(module.changed_weight(module.weight))
        module.changed_weight, module.extra_axes = None, {}
        del module.lora_a, module.lora_b
