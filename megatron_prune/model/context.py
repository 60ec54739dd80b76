"""How context-parallel ranks share a sequence, so that causal attention costs each of them the same.

The sequence is cut into twice as many pieces as there are ranks; of `c` ranks, rank `r` holds pieces `r` and
`2c - 1 - r`, as megatron-core's rotary embedding and Transformer Engine expect:

    c = 2, pieces 0 1 2 3:   rank 0 holds 0 and 3, rank 1 holds 1 and 2
"""

from __future__ import annotations

import megatron_prune.backend as backend  # isort: skip  # noqa: F401  (before megatron.core)
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


def size() -> int:
    """Ranks that share a sequence."""
    return parallel_state.get_context_parallel_world_size()


def order(length: int, device: torch.device | str | None = None) -> Tensor:
    """Positions `[size * length]` in the order of the ranks that hold them, `length` tokens on each."""
    ranks = size()
    pieces = torch.arange(ranks * length, device=device).view(2 * ranks, -1)
    held = [[rank, 2 * ranks - 1 - rank] for rank in range(ranks)]
    return pieces[torch.tensor(held, device=device).flatten()].flatten()


def positions(length: int, device: torch.device | str | None = None) -> Tensor:
    """Positions `[length]` of the tokens that this rank holds."""
    return order(length, device).view(size(), length)[parallel_state.get_context_parallel_rank()]


def part(x: Tensor) -> Tensor:
    """This rank's tokens `[b, s / size, ...]` of `[b, s, ...]`; s is a multiple of twice the size."""
    return x if size() == 1 else x[:, positions(x.shape[1] // size(), x.device)]


def whole(x: Tensor) -> Tensor:
    """`[b, s, ...]` from every rank's `[b, s / size, ...]`. Collective; not differentiable."""
    if size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(size())]
    dist.all_gather(parts, x.contiguous(), group=parallel_state.get_context_parallel_group())
    return torch.cat(parts, dim=1)[:, order(x.shape[1], x.device).argsort()]


def gather(x: Tensor) -> Tensor:
    """`[size * s, ...]` of every rank's `[s, ...]`, in the order of the ranks; differentiable. Collective."""
    return gather_from_sequence_parallel_region(x, group=parallel_state.get_context_parallel_group())
