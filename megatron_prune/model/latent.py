"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, 2.1): keys and values of all heads are made from one
narrow vector of a token, and queries too, or from the hidden state.

    latent, k_rope = split(W_kv_down h)         [latent], [rope]     of a token, whole on every tensor-parallel rank
    k_nope, v = split(W_kv_up norm(latent))     [heads, nope], [heads, values]
    q_nope, q_rope = split(W_q_up norm(W_q_down h))     [heads, nope], [heads, rope]
    scores = (q_nope k_nope + R q_rope R k_rope) * scale

The rotation R turns pairs of neighbours; all heads have the same rotated keys. megatron-core has a module of its own
for this, whose gradient of these keys is wrong under tensor parallelism without Transformer Engine, and which takes no
other linears than its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import megatron_prune.backend as backend  # isort: skip  # noqa: F401  (before megatron.core)
import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_prune.model.attention import SDPACoreAttention
from megatron_prune.model.masked_linear import (
    MaskedColumnParallelLinear,
    MaskedReplicatedLinear,
    MaskedRowParallelLinear,
)
from megatron_prune.model.sizes import ModelConfig

NORM_EPSILON = 1e-6
"""Of the norms of the narrow vectors, whatever that of the model's other norms is: as transformers has it."""


class LatentAttention(MegatronModule):
    """Causal self-attention of this rank's heads: `[s, b, hidden]` in and out, or this rank's part of the sequence."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, pg_collection: Any, sizes: ModelConfig, norm: Any, **_: Any
    ) -> None:
        super().__init__(config=config)
        assert sizes.kv_lora_rank is not None and sizes.qk_head_dim is not None
        self.layer_number = layer_number
        self.sizes = sizes
        self.tp_group = pg_collection.tp
        self.split = self.tp_group.size() > 1
        self.factor = (sizes.rope_scaling or {}).get("attention_factor", 1.0)
        heads, hidden = config.num_attention_heads, config.hidden_size
        common: dict[str, Any] = dict(config=config, tp_group=self.tp_group)
        up = partial(
            MaskedColumnParallelLinear, init_method=config.init_method, bias=False, gather_output=False, **common
        )
        if sizes.q_lora_rank:
            self.linear_q_down_proj = MaskedReplicatedLinear(hidden, sizes.q_lora_rank, **common)
            self.q_layernorm = norm(config=config, hidden_size=sizes.q_lora_rank, eps=NORM_EPSILON)
            self.linear_q_up_proj = up(sizes.q_lora_rank, heads * sizes.query_channels)
        else:
            self.linear_q_proj = up(hidden, heads * sizes.query_channels)
        self.linear_kv_down_proj = MaskedReplicatedLinear(hidden, sizes.kv_lora_rank + sizes.rotated_keys, **common)
        self.kv_layernorm = norm(config=config, hidden_size=sizes.kv_lora_rank, eps=NORM_EPSILON)
        self.linear_kv_up_proj = up(sizes.kv_lora_rank, heads * (sizes.qk_head_dim + sizes.kv_channels))
        self.core_attention = SDPACoreAttention(config, softmax_scale=config.softmax_scale)
        self.linear_proj = MaskedRowParallelLinear(
            heads * sizes.kv_channels,
            hidden,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            **common,
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output and no bias; `rotary_pos_emb [s, 1, 1, rope]` has each angle twice, the second time in its end."""
        sizes = self.sizes
        assert sizes.qk_head_dim is not None and sizes.kv_lora_rank is not None
        query = self._queries(hidden_states).unflatten(-1, (-1, sizes.query_channels))
        latent, shared_key = self.linear_kv_down_proj(hidden_states)[0].split(
            [sizes.kv_lora_rank, sizes.rotated_keys], dim=-1
        )
        up = self.linear_kv_up_proj(self.kv_layernorm(latent))[0].unflatten(
            -1, (-1, sizes.qk_head_dim + sizes.kv_channels)
        )
        key, value = up.split([sizes.qk_head_dim, sizes.kv_channels], dim=-1)
        shared_key = self._for_all_heads(shared_key)[:, :, None]
        query, rotated = query.split([sizes.qk_head_dim, sizes.rotated_keys], dim=-1)
        angles = rotary_pos_emb[: query.shape[0], ..., : sizes.rotated_keys // 2]
        rotated, shared_key = (turned(x, angles, self.factor) for x in (rotated, shared_key))
        query = torch.cat([query, rotated], dim=-1)
        key = torch.cat([key, shared_key.expand(*key.shape[:-1], -1)], dim=-1)
        return self.linear_proj(self.core_attention(query, key, value, attention_mask))

    def _queries(self, hidden_states: Tensor) -> Tensor:
        """`[s, b, heads of this rank * query channels]`."""
        if not self.sizes.q_lora_rank:
            return self.linear_q_proj(hidden_states)[0]
        return self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)[0]))[0]

    def _for_all_heads(self, key: Tensor) -> Tensor:
        """The rotated channels `[s, b, rope]` of all tokens; their gradient is the sum over the heads of all ranks."""
        if not self.split:
            return key
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(key, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(key, group=self.tp_group)


def turned(x: Tensor, angles: Tensor, factor: float) -> Tensor:
    """Channels `[s, b, heads, rope]`, of which neighbours are a pair, turned by `angles [s, 1, 1, rope / 2]` and
    multiplied; first the first of all pairs, then the second.
    """
    cos, sin = ((f(angles) * factor).to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x[..., ::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
