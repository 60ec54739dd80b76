"""What this processor can do."""

from __future__ import annotations

import torch


def has_bf16_products() -> bool:
    """Whether this processor multiplies bf16 itself and this PyTorch (2.10 on) tells so and can be asked to."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    return capabilities is not None and bool(capabilities().get("avx512_bf16", False))
