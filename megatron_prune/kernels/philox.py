"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3") and the Gumbel noise of mask learning made from it. A number is a pure function of a key (seed, step,
microbatch, tensor) and a counter (its place in the unsharded weight), so nothing is stored between forward
and backward, and every way of sharding a weight draws the same noise. Plain PyTorch, any device; the C kernel
computes the same."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prune.kernels.definition import MASK_32, MULTIPLIERS, ROUNDS, WEYL


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10: counter int64 [..., 4] in [0, 2^32) to random int64 [..., 4] in the same range."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, which is what the 64-bit product of two 32-bit words needs.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & MASK_32) ^ c1 ^ k0, p1 & MASK_32
        c2, c3 = ((p0 >> 32) & MASK_32) ^ c3 ^ k1, p0 & MASK_32
        k0, k1 = (k0 + WEYL[0]) & MASK_32, (k1 + WEYL[1]) & MASK_32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def gumbel_from_bits(bits: Tensor) -> Tensor:
    """Standard Gumbel variates, fp32, from 32-bit words held in int64.

    -log(-log(u)) with u = ((bits >> 8) + 0.5) / 2^24. u has 25 significant bits, one more than fp32 holds,
    and would round to 1 at the top; above one half the distance to 1 is exact instead, and log1p keeps it.
    """
    top = bits >> 8
    below = (top.to(torch.float32) + 0.5) * 2.0**-24
    above = ((2**24 - 1 - top).to(torch.float32) + 0.5) * 2.0**-24
    exponential = torch.where(top < 2**23, -torch.log(below), -torch.log1p(-above))
    return -torch.log(exponential)


def gumbel_noise(groups: Tensor, patterns: int, key: tuple[int, int]) -> Tensor:
    """Gumbel(0, 1) noise, fp32 [..., patterns], of the groups with unsharded index `groups` (int64 [...]).

    Pattern k of group i takes word k % 4 of the Philox block i * ceil(patterns / 4) + k // 4, whose 64-bit
    number fills the two low words of the counter; the two high words are zero.
    """
    blocks_per_group = -(-patterns // 4)
    block = groups.unsqueeze(-1) * blocks_per_group + torch.arange(blocks_per_group, device=groups.device)
    zero = torch.zeros_like(block)
    counter = torch.stack((block & MASK_32, (block >> 32) & MASK_32, zero, zero), dim=-1)
    words = philox4x32(counter, key).flatten(-2)
    return gumbel_from_bits(words[..., :patterns])
