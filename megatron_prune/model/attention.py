"""Causal attention without Transformer Engine: torch's fused kernel, whatever part of the sequence is here."""

from __future__ import annotations

import math
from typing import Any

import megatron_prune.backend as backend  # isort: skip  # noqa: F401  (before megatron.core)
import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_prune.model import context


class SDPACoreAttention(torch.nn.Module):
    """Causal attention of this rank's heads by torch's fused kernel; `[s, b, heads, d]` in, `[s, b, heads * d]` out.

    With a sliding window `w` a token sees itself and the `w - 1` tokens before it. With context parallelism every rank
    attends from its own part of the sequence to the keys and values of all parts, which are gathered for it. A mask
    `[b, 1, s, s]` to add to the scores takes the place of both the causal order and the window.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, softmax_scale: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout
        self.window = config.window_size[0] + 1 if config.window_size else None
        self.shared = config.context_parallel_size > 1

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attention over the whole sequence, in causal order unless there is a mask."""
        assert attention_mask is None or not self.shared, "a mask with context parallelism"
        mask = self._mask(query) if attention_mask is None else attention_mask
        if self.shared:
            key, value = context.gather(key), context.gather(value)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if query.is_cuda and query.shape[1] != key.shape[1] and (mask is not None or query.dtype == torch.float32):
            # No kernel that saves memory takes both groups and a mask, or groups in float32.
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended.permute(2, 0, 1, 3).flatten(2)

    def _mask(self, query: Tensor) -> Tensor | None:
        """Bool `[queries here, keys]`, True = seen; None when plain causal attention over all tokens is meant."""
        length = query.shape[0]
        if not self.shared and (self.window is None or length <= self.window):
            return None
        everywhere = context.order(length, query.device) if self.shared else torch.arange(length, device=query.device)
        here = context.positions(length, query.device) if self.shared else everywhere
        distance = here[:, None] - everywhere[None, :]
        return (distance >= 0) & (distance < (self.window or math.inf))
