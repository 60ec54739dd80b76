"""What a training checkpoint holds, as a sharded state dict: trained parameters, optimizer state and schedule.

The model comes as the list of chunks that a rank holds (one, or several with an interleaved pipeline). Everything is
named by its place in the whole model and has the shape of the parameter it belongs to, so that any layout reads what
any other wrote, with or without the distributed optimizer:

    decoder.layers.mlp.linear_fc2.mask_logits                 the parameter
    optimizer.exp_avg.decoder.layers.mlp.linear_fc2.mask_logits     Adam's mean, and likewise exp_avg_sq
    optimizer.master.decoder.layers.mlp.linear_fc2.weight     the float32 master of a bf16 parameter

Layers are one tensor, but where some have other parameters than the rest (a linear that stays dense has no mask
logits): then each is named by its number.

megatron-core's own state dicts of optimizers are not used: each kind of optimizer has another, the plain
mixed-precision one leaves out float32 parameters, and the distributed one loses Adam's step count without Apex.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_prune.model.checkpoint import metadata, stand_in
from megatron_prune.model.prunable import LAYERS_DIFFER
from megatron_prune.training.stopping import largest

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running means of the gradient and of its square, under torch's, Apex's and Transformer Engine's name."""
MASTER = "master"
TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)

Sharded = dict[str, dict[str, Any]]
"""Sharded tensors by chunk and parameter name."""


def training_state(chunks: Sequence[Module], optimizer: Any, scheduler: Any, is_loading: bool) -> dict[str, Any]:
    """The sharded state dict to save, or with `is_loading` the one that a checkpoint fills. Collective."""
    parameters = trained_parameters(chunks)
    return {
        "model": parameters,
        "optimizer": _optimizer_state(chunks, optimizer, parameters, is_loading),
        "scheduler": scheduler.state_dict(),
    }


def load_training_state(chunks: Sequence[Module], optimizer: Any, scheduler: Any, state: dict[str, Any]) -> None:
    """Take over what `training_state(is_loading=True)` described and a checkpoint filled."""
    load_parameters(chunks, state["model"])
    _load_optimizer_state(chunks, optimizer, state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])


def trained_parameters(chunks: Sequence[Module]) -> Sharded:
    """Sharded tensors of the parameters that require gradients."""
    return {f"chunk{number}": _trained(chunk) for number, chunk in enumerate(chunks)}


def _trained(chunk: Any) -> dict[str, Any]:
    names = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
    differ = {"non_homogeneous_layers": True} if getattr(chunk, LAYERS_DIFFER, False) else {}
    everything = chunk.sharded_state_dict(metadata=metadata() | differ)
    return {key: value for key, value in everything.items() if key in names}


def load_parameters(chunks: Sequence[Module], state: Sharded) -> None:
    """Copy loaded tensors, laid out as by `trained_parameters`, into the chunks; other parameters stay."""
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"chunk{number}"], strict=False)


def use_fused_kernel(optimizer: Any) -> None:
    """One kernel for an Adam step where it is torch's: those of Apex and of Transformer Engine are fused already.

    Left to itself torch takes one kernel an operation, and on a GPU as much memory as a moment besides.
    """
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(inner.optimizer, TORCH_ADAM):
            for group in inner.optimizer.param_groups:
                group["fused"] = True


def adam_of(optimizer: Any) -> str:
    """Whose Adam does the arithmetic: torch, apex or transformer_engine."""
    inner = getattr(optimizer, "chained_optimizers", [optimizer])[0]
    return type(inner.optimizer).__module__.partition(".")[0]


@dataclass(frozen=True)
class Slot:
    """Where an optimizer keeps the state of one parameter, or of the part of it that this rank owns."""

    adam: Any
    """The optimizer that does the arithmetic: torch's, Apex's or Transformer Engine's."""
    main: Tensor
    """What it updates: the parameter, its float32 master, or a flat part of either."""
    part: slice | None = None
    """This rank's part of the flattened parameter; None when it has all of it."""

    @property
    def state(self) -> dict[str, Any]:
        """Adam's state of the parameter; empty before the first step."""
        return self.adam.state[self.main]


def slots_of(optimizer: Any) -> dict[Parameter, Slot]:
    """The slot of every trained parameter of which this rank has optimizer state."""
    found: dict[Parameter, Slot] = {}
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        find = _distributed_slots if isinstance(inner, DistributedOptimizer) else _plain_slots
        found.update(find(inner))
    return found


def _plain_slots(optimizer: Any) -> Iterator[tuple[Parameter, Slot]]:
    for group in optimizer.optimizer.param_groups:
        yield from ((parameter, Slot(optimizer.optimizer, parameter)) for parameter in group["params"])
    pairs = zip(
        getattr(optimizer, "float16_groups", ()), getattr(optimizer, "fp32_from_float16_groups", ()), strict=True
    )
    for parameters, masters in pairs:
        for parameter, master in zip(parameters, masters, strict=True):
            yield parameter, Slot(optimizer.optimizer, master)


def _distributed_slots(optimizer: DistributedOptimizer) -> Iterator[tuple[Parameter, Slot]]:
    for parameter, (group, place) in optimizer.model_param_group_index_map.items():
        main = optimizer.optimizer.param_groups[group]["params"][place]
        owned = optimizer._get_model_param_range_map(parameter)["param"]
        yield parameter, Slot(optimizer.optimizer, main, slice(owned.start, owned.end))


def _group(optimizer: Any, parameter: Parameter) -> Any:
    """The ranks over which a distributed optimizer shares the state of a parameter; None with a plain one.

    They are the replicas of it: of an expert others than of the rest of the model.
    """
    inner = getattr(optimizer, "chained_optimizers", [optimizer])[0]
    if not isinstance(inner, DistributedOptimizer):
        return None
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def _kinds(parameter: Parameter) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MASTER)


def _optimizer_state(
    chunks: Sequence[Module], optimizer: Any, parameters: Sharded, is_loading: bool
) -> dict[str, dict[str, Any]]:
    """Sharded tensors of the optimizer's state by kind, chunk and parameter, and the number of steps it has done."""
    slots = slots_of(optimizer)
    state: dict[str, Any] = {"step": _steps(slots)}
    for number, chunk in enumerate(chunks):
        key = f"chunk{number}"
        for name, parameter in chunk.named_parameters():
            if name not in parameters[key]:
                continue
            for kind in _kinds(parameter):
                if is_loading:
                    tensor = torch.empty(parameter.shape, dtype=torch.float32)
                else:
                    tensor = _whole(parameter, slots.get(parameter), kind, _group(optimizer, parameter))
                sharded = make_sharded_optimizer_tensor(parameters[key][name], tensor, f"optimizer.{kind}")
                state.setdefault(kind, {}).setdefault(key, {})[name] = sharded
    return state


def _whole(parameter: Parameter, slot: Slot | None, kind: str, group: Any) -> Tensor:
    """One kind of state in the parameter's shape; on ranks that do not write it a tensor without memory. Collective."""
    if group is None:
        assert slot is not None
        return _local(slot, kind)
    flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if slot is not None:
        flat[slot.part] = _local(slot, kind)
    first = dist.get_process_group_ranks(group)[0]
    dist.reduce(flat, first, group=group)
    if dist.get_rank() != first:
        return stand_in(flat, parameter.shape)
    return flat.view(parameter.shape).cpu()


def _local(slot: Slot, kind: str) -> Tensor:
    return slot.main.detach() if kind == MASTER else slot.state[kind]


def _steps(slots: dict[Parameter, Slot]) -> int:
    """Steps that the optimizer has done. Collective.

    Transformer Engine's Adam counts by group of parameters, and not where this rank has no part of a group: the largest
    count is right, over all groups and ranks. Any other would be a wrong bias correction after a resume.
    """
    counts = [slot.state.get("step", 0) for slot in slots.values()]
    counts += [group.get("step", 0) for slot in slots.values() for group in slot.adam.param_groups]
    return largest(max(map(int, counts), default=0))[0]


@torch.no_grad()
def _load_optimizer_state(chunks: Sequence[Module], optimizer: Any, state: dict[str, Any]) -> None:
    slots = slots_of(optimizer)
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            slot = slots.get(parameter)
            if slot is None or not parameter.requires_grad:
                continue
            loaded = {kind: state[kind][f"chunk{number}"][name].to(slot.main.device) for kind in _kinds(parameter)}
            _fill(slot, loaded, state["step"])
    use_fused_kernel(optimizer)


def _fill(slot: Slot, loaded: dict[str, Tensor], step: int) -> None:
    """Take over a parameter's state, the tensors themselves; of a part of it copies, so that the rest is freed."""
    if slot.part is not None:
        loaded = {kind: tensor.flatten()[slot.part].clone() for kind, tensor in loaded.items()}
    if MASTER in loaded:
        slot.main.copy_(loaded.pop(MASTER))
    slot.state.update(loaded)
    if isinstance(slot.adam, TORCH_ADAM):
        slot.state["step"] = torch.tensor(float(step), device=slot.main.device)  # the fused kernel wants it there
        return
    for group in slot.adam.param_groups:
        group["step"] = step
