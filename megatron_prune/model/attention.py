"""Causal attention without Transformer Engine: torch's fused kernel, whatever part of the sequence is here."""

from __future__ import annotations

import math
from typing import Any

import megatron_prune.backend as backend  # isort: skip  # (before megatron.core)
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_prune.model import context
from megatron_prune.model.sizes import channels_with_sink


class SDPACoreAttention(torch.nn.Module):
    """Causal attention of this rank's heads by torch's fused kernel; `[s, b, heads, d]` in, `[s, b, heads * d]` out.

    With a sliding window `w` a token sees itself and the `w - 1` tokens before it. With sinks each head has a score
    `softmax_offset` that takes part in the softmax and adds nothing: a key before all others, of a value of zeros, that
    meets a further channel of the queries. With context parallelism every rank
    attends from its own part of the sequence to the keys and values of all parts, which are gathered for it. A mask
    `[b, 1, s, s]` to add to the scores takes the place of both the causal order and the window.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        softmax_scale: float | None = None,
        window: int | None = None,
        sinks: bool = False,
        **kwargs: Any,
    ) -> None:
        """`window`: of this layer, where `config` says nothing; `sinks`: each head has one."""
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout
        self.window = config.window_size[0] + 1 if config.window_size else window
        self.shared = config.context_parallel_size > 1
        self.softmax_offset: torch.nn.Parameter | None = None
        if sinks:
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            like = dict(dtype=config.params_dtype, device=backend.device())
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, **like))
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attention over the whole sequence, in causal order unless there is a mask."""
        assert attention_mask is None or not self.shared, "a mask with context parallelism"
        mask = self._mask(query) if attention_mask is None else attention_mask
        if self.shared:
            key, value = context.gather(key), context.gather(value)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        width = value.shape[-1]
        scale = query.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        if self.softmax_offset is not None:
            query, key, value, mask = _with_sinks(query, key, value, mask, self.softmax_offset / scale)
        query, key, value = _as_wide(query, key, value)
        if query.is_cuda and query.shape[1] != key.shape[1] and (mask is not None or query.dtype == torch.float32):
            # No kernel that saves memory takes both groups and a mask, or groups in float32.
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        if attended.shape[-1] > width:
            attended = attended[..., :width]
        return attended.permute(2, 0, 1, 3).flatten(2)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """The sinks, split over the heads of the tensor-parallel ranks."""
        if self.softmax_offset is None:
            return {}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )

    def _mask(self, query: Tensor) -> Tensor | None:
        """Bool `[queries here, keys]`, True = seen; None when plain causal attention over all tokens is meant."""
        length = query.shape[0]
        unlimited = self.window is None or length <= self.window
        if not self.shared and unlimited and self.softmax_offset is None:
            return None
        everywhere = context.order(length, query.device) if self.shared else torch.arange(length, device=query.device)
        here = context.positions(length, query.device) if self.shared else everywhere
        distance = here[:, None] - everywhere[None, :]
        return (distance >= 0) & (distance < (self.window or math.inf))


def _as_wide(*tensors: Tensor) -> list[Tensor]:
    """The same with channels of zeros where there are fewer than in another: kernels that save memory want that."""
    most = max(x.shape[-1] for x in tensors)
    return [F.pad(x, (0, most - x.shape[-1])) if x.shape[-1] < most else x for x in tensors]


def _with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values `[b, heads, s, d + 1 or more]` and mask with a first key whose scores are `scores [heads]`.

    One more channel is that score in the queries, one in the first key and zero in the others.
    """
    assert mask is not None
    width = query.shape[-1]
    more = channels_with_sink(width) - width
    query = torch.cat([query, scores.to(query.dtype)[:, None, None].expand(*query.shape[:-1], 1)], dim=-1)
    query, key, value = F.pad(query, (0, more - 1)), F.pad(key, (0, more, 1, 0)), F.pad(value, (0, more, 1, 0))
    key[..., 0, width] = 1
    return query, key, value, F.pad(mask, (1, 0), value=mask.dtype == torch.bool)
