"""Attention made of matrix products is attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_prune.model.attention import ATTENTION_BLOCK, blockwise_attention


@pytest.mark.parametrize("length", [1, ATTENTION_BLOCK - 1, ATTENTION_BLOCK, 2 * ATTENTION_BLOCK + 3])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_blockwise_attention_is_causal_attention(length: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, length, 16, generator=generator)
    key, value = (torch.randn(2, groups, length, 16, generator=generator) for _ in range(2))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(blockwise_attention(query, key, value, 0.3), expected, atol=2e-6, rtol=0)


def test_blockwise_attention_takes_megatrons_strides_and_bf16() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(100, 2, heads, 16, generator=generator).bfloat16().permute(1, 2, 0, 3) for heads in (6, 3, 3)
    )
    found = blockwise_attention(query, key, value)
    exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0)
