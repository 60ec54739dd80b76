"""What a training checkpoint holds, as a sharded state dict: trained parameters, optimizer and schedule.

The model comes as the list of chunks that a rank holds (one, or several with an interleaved pipeline). Tensors are
named by their place in the whole model, so that any layout reads what any other wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from torch.nn import Module

from megatron_prune.model.checkpoint import metadata

MASTERS = "fp32_from_fp16_params"
"""Key of the float32 masters in a mixed-precision optimizer's state: one list of tensors for each parameter group."""


def training_state(chunks: Sequence[Module], optimizer: Any, scheduler: Any, is_loading: bool) -> dict[str, Any]:
    """The sharded state dict to save, or with `is_loading` the one that a checkpoint fills."""
    parameters = trained_parameters(chunks)
    return {
        "model": parameters,
        "optimizer": _optimizer_state(optimizer, parameters, is_loading),
        "scheduler": scheduler.state_dict(),
    }


def load_training_state(chunks: Sequence[Module], optimizer: Any, scheduler: Any, state: dict[str, Any]) -> None:
    """Take over what `training_state(is_loading=True)` described and a checkpoint filled."""
    load_parameters(chunks, state["model"])
    _load_optimizer_state(optimizer, state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])


def trained_parameters(chunks: Sequence[Module]) -> dict[str, dict[str, Any]]:
    """Sharded tensors of the parameters that require gradients, by chunk and name."""
    return {f"chunk{number}": _trained(chunk) for number, chunk in enumerate(chunks)}


def _trained(chunk: Any) -> dict[str, Any]:
    names = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
    everything = chunk.sharded_state_dict(metadata=metadata())
    return {key: value for key, value in everything.items() if key in names}


def load_parameters(chunks: Sequence[Module], state: dict[str, dict[str, Any]]) -> None:
    """Copy loaded tensors, laid out as by `trained_parameters`, into the chunks; other parameters stay."""
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"chunk{number}"], strict=False)


def use_fused_kernel(optimizer: Any) -> None:
    """On the CPU: one kernel for an Adam step (on a GPU the optimizer that megatron-core picks is fused already)."""
    if not backend.has_cuda():
        for group in optimizer.param_groups:
            group["fused"] = True


def _optimizer_state(optimizer: Any, parameters: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    """The optimizer's sharded state dict.

    Beside bf16 parameters megatron-core's mixed-precision optimizer also trains float32 ones, as mask logits are,
    but its sharded_state_dict looks for the bf16 ones alone and fails. Each of our groups holds one kind, so for
    this call the missing ones are put beside them.
    """
    mixed = [inner for inner in _parts(optimizer) if _is_mixed(inner)]
    before = [inner.float16_groups for inner in mixed]
    for inner in mixed:
        inner.float16_groups = [a + b for a, b in zip(inner.float16_groups, inner.fp32_from_fp32_groups, strict=True)]
    try:
        return _lists_to_dicts(optimizer.sharded_state_dict(parameters, is_loading=is_loading))
    finally:
        for inner, groups in zip(mixed, before, strict=True):
            inner.float16_groups = groups


def _load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    if any(_is_mixed(inner) for inner in _parts(optimizer)):
        state = _dicts_to_lists(state, len(optimizer.param_groups))
    optimizer.load_state_dict(state)
    use_fused_kernel(optimizer)


def _parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _is_mixed(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_from_fp32_groups")


def _lists_to_dicts(state: dict[str, Any]) -> dict[str, Any]:
    """Name the masters by group and place: distributed checkpoints lose empty lists, and with them the numbering."""
    if MASTERS in state:
        groups = enumerate(state[MASTERS])
        state[MASTERS] = {str(g): {str(i): t for i, t in enumerate(group)} for g, group in groups if group}
    return state


def _dicts_to_lists(state: dict[str, Any], groups: int) -> dict[str, Any]:
    """Inverse of `_lists_to_dicts`; a state in which no group has masters has lost the key too."""
    named = state.get(MASTERS, {})
    lists = [named.get(str(group), {}) for group in range(groups)]
    return {**state, MASTERS: [[masters[str(i)] for i in range(len(masters))] for masters in lists]}
