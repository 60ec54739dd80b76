"""What the environment says of devices: whether a GPU may be used, and how exact its float32 products are.

Loads nothing, since PyTorch looks at some of these variables when it is imported.
"""

from __future__ import annotations

import os

from megatron_prune.errors import UserError, brief

DEVICE = "MEGATRON_PRUNE_DEVICE"
"""`cpu`: no GPU is used, also where there is one, and processes talk over gloo."""

TF32 = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
"""NVIDIA's images set it to 1; PyTorch, when it is imported, then takes 10 bits of mantissa for float32 products."""


def whole_float32() -> None:
    """Forget that variable: Hessians, refits and float32 models mean float32. To be called before PyTorch is there."""
    os.environ.pop(TF32, None)


def cpu_demanded() -> bool:
    """Whether the user wants the CPU, whatever there is."""
    asked = os.environ.get(DEVICE, "")
    if asked not in ("", "cpu"):
        raise UserError(
            f"{DEVICE}={brief(asked)} was given; allowed: cpu, or leave it unset for a GPU where there is one"
        )
    return asked == "cpu"


def has_cuda() -> bool:
    """Whether this process computes on a GPU with PyTorch: it sees one, and the user wants no CPU.

    No where there is no PyTorch, as in MaxText's environment.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return False
    return not cpu_demanded() and torch.cuda.is_available()
