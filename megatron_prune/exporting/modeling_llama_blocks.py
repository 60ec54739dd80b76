"""A Llama model whose decoder layers differ in their numbers of heads, key/value heads and MLP channels.

They are listed in `block_configs` of config.json; a layer may lack its attention or its MLP. For transformers 5, with
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM


class BlocksLlamaConfig(LlamaConfig):
    """`block_configs`: one entry for each layer; the other sizes are those of the widest."""

    model_type = "llama_blocks"
    block_configs: list[dict[str, Any]] | None = None


class BlocksLlamaDecoderLayer(LlamaDecoderLayer):
    """A layer of its own sizes; `attention_idx` counts the layers before it that attend: its place in the cache."""

    def __init__(self, config: BlocksLlamaConfig, layer_idx: int, attention_idx: int) -> None:
        block = (config.block_configs or [])[layer_idx]
        attention, ffn = block["attention"], block["ffn"]
        sizes = copy.copy(config)
        if not attention["no_op"]:
            sizes.num_attention_heads = attention["num_attention_heads"]
            sizes.num_key_value_heads = attention["num_query_groups"]
        if not ffn["no_op"]:
            sizes.intermediate_size = ffn["ffn_hidden_size"]
        super().__init__(sizes, attention_idx)
        self.attends, self.has_mlp = not attention["no_op"], not ffn["no_op"]
        if self.attends:
            self.self_attn.config = config  # what it reads from now on, such as the kernel, is set for all layers
        else:
            del self.self_attn, self.input_layernorm
        if not self.has_mlp:
            del self.mlp, self.post_attention_layernorm

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """`[batch, length, hidden]` in and out."""
        if self.attends:
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
        if self.has_mlp:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class BlocksLlamaForCausalLM(LlamaForCausalLM):
    """The model and its output layer."""

    config_class = BlocksLlamaConfig
    _no_split_modules = ["BlocksLlamaDecoderLayer"]

    def __init__(self, config: BlocksLlamaConfig) -> None:
        super().__init__(config)
        layers: list[BlocksLlamaDecoderLayer] = []
        for number in range(config.num_hidden_layers):
            attention_idx = sum(layer.attends for layer in layers)
            layers.append(BlocksLlamaDecoderLayer(config, number, attention_idx))
        self.model.layers = nn.ModuleList(layers)
        self.post_init()
