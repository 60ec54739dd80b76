"""Hard-concrete masks (Louizos et al. 2018, arXiv:1712.01312) and the constraint on how many of them close.

A mask z in [0, 1] is a stretched, clamped logistic variable, of which a learned `log_alpha` moves the mass:

    z = clamp(sigmoid((log u - log(1 - u) + log_alpha) / beta) * (r - l) + l, 0, 1)         u uniform, l < 0, r > 1
    P(z > 0) = sigmoid(log_alpha - beta log(-l / r))

Pure functions of tensors; `u` comes from a counter, so every process and every resumed run draws the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_prune.kernels.definition import MASK_32, hash_key
from megatron_prune.kernels.philox import philox4x32

BETA = 2 / 3
LOW, HIGH = -0.1, 1.1
"""Ends l and r of the interval that the logistic variable is stretched to."""
BOUNDS = (math.log(1e-2), math.log(1e2))
"""`log_alpha` stays between these."""


def uniform(shape: tuple[int, ...], *key: int) -> Tensor:
    """Uniform variates in (0, 1), float64: a function of the integers `key` and of the place alone."""
    count = math.prod(shape)
    block = torch.arange(-(-count // 4))
    zero = torch.zeros_like(block)
    words = philox4x32(torch.stack((block & MASK_32, block >> 32, zero, zero), dim=-1), hash_key(*key))
    return ((words.flatten()[:count].double() + 0.5) * 2.0**-32).view(shape)


def sample(log_alpha: Tensor, u: Tensor) -> Tensor:
    """z in [0, 1] from uniform variates of the same shape."""
    return _stretched(log_alpha + torch.logit(u))


def median(log_alpha: Tensor) -> Tensor:
    """z at u = 1/2: what a mask is when nothing is drawn any more."""
    return _stretched(log_alpha)


def _stretched(logit: Tensor) -> Tensor:
    return (torch.sigmoid(logit / BETA) * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def sparsity(log_alpha: Tensor) -> Tensor:
    """Expected share of masks that are closed, along the last axis."""
    return 1 - open_probability(log_alpha).mean(-1)


def lagrangian(closed: Tensor, target: float, linear: Tensor, quadratic: Tensor) -> Tensor:
    """Mean over sets of masks of linear * (s - t) + quadratic * (s - t)^2 (Xia et al. 2023, section 2.1).

    Minimised in the masks and maximised in both multipliers.
    """
    excess = closed - target
    return (linear * excess + quadratic * excess.square()).mean()


def ramp(step: int, steps: int, share: float) -> float:
    """From 0 at the first step (0) to 1 when `share` of the steps are done, a straight line."""
    length = share * steps
    return 1.0 if length <= 0 else min(1.0, step / length)
