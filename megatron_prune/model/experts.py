"""Experts in place of a layer's MLP: megatron-core's routing and exchange of tokens around our own linears.

Each expert is an MLP that runs on the tokens sent to it, one after the other: without Transformer Engine megatron-core
has no other form, and masks, adapters and statistics need the linears one by one. A gate multiplies what an expert
gives, where transformers has it. megatron-core multiplies the inputs of `linear_fc2` instead, so statistics of these
inputs would be weighted by gates here and by nothing in other tools.
"""

from __future__ import annotations

from typing import Any

import megatron_prune.backend as backend  # isort: skip
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_prune.model.masked_linear import (
    MaskedColumnParallelLinear,
    MaskedGatedLinear,
    MaskedRowParallelLinear,
)
from megatron_prune.model.sizes import ModelConfig


def _linears(config: TransformerConfig) -> MLPSubmodules:
    fc1 = MaskedGatedLinear if config.gated_linear_unit else MaskedColumnParallelLinear
    return MLPSubmodules(linear_fc1=fc1, linear_fc2=MaskedRowParallelLinear)


class Experts(SequentialMLP):
    """This rank's experts."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(num_local_experts, config, _linears(config), pg_collection=pg_collection)

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """`[tokens, hidden]`, sorted by expert, in and out; gates `[tokens]`. An expert may have no tokens."""
        counts = tokens_per_expert.tolist()
        found = []
        for expert, tokens, gates in zip(
            self.local_experts, permuted_local_hidden_states.split(counts), permuted_probs.split(counts), strict=True
        ):
            output, bias = expert(tokens)
            gated = (output if bias is None else output + bias) * gates.unsqueeze(-1)
            found.append(gated.to(output.dtype))
        return torch.cat(found), None


class SharedExperts(SharedExpertMLP):
    """The MLP that all tokens go through besides their experts."""

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, gate: bool = False, **_: Any) -> None:
        super().__init__(config, _linears(config), gate, pg_collection=pg_collection)


def expert_spec() -> ModuleSpec:
    """A layer's experts and their router."""
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=Experts, shared_experts=SharedExperts))


def expert_fields(config: ModelConfig, layout: backend.Layout) -> dict[str, Any]:
    """megatron-core's configuration of experts; nothing where there are none.

    Losses that balance the router's load are off: what the model is trained for stays what the user asked for.
    """
    if not config.num_moe_experts:
        return {}
    grouped = (config.moe_router_num_groups or 1) > 1
    return dict(
        num_moe_experts=config.num_moe_experts,
        moe_ffn_hidden_size=config.moe_ffn_hidden_size,
        moe_router_topk=config.moe_router_topk,
        moe_router_pre_softmax=not config.moe_renormalize,
        moe_router_load_balancing_type="none",
        moe_layer_freq=1 if config.moe_layers is None else [int(sparse) for sparse in config.moe_layers],
        moe_shared_expert_intermediate_size=config.shared_width or None,
        moe_shared_expert_gate=config.moe_shared_expert_gate,
        moe_router_score_function=config.moe_router_score_function,
        moe_router_enable_expert_bias=config.moe_router_expert_bias,
        moe_router_bias_update_rate=0.0,  # it is the model's own; another step would be no step of the optimizer
        moe_router_topk_scaling_factor=config.moe_router_topk_scaling_factor,
        moe_router_num_groups=config.moe_router_num_groups if grouped else None,
        moe_router_group_topk=config.moe_router_group_topk if grouped else None,
        moe_router_dtype="fp32" if config.moe_router_float32 else None,
        moe_token_dispatcher_type="alltoall" if backend.has_cuda() else "allgather",  # gloo gathers equal parts alone
        moe_grouped_gemm=False,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor_size,
    )
