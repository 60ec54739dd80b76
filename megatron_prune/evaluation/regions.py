"""A linear of which a part is 2:4 and the rest dense, run as two products of PyTorch's own kernels.

Where whole rows are dense (``2:4@0.75,tile=64xall``) each product makes some of the outputs; where whole columns are
(``tile=allx64``) each takes some of the inputs, and they are added. Tiles of both need a kernel of their own, which
PyTorch does not have. This is how SpenseGPT (arXiv:2606.10445) serves a matrix in two regions with library kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_prune.decision.target import NM
from megatron_prune.decision.tiles import dense_groups

Pack = Callable[[Tensor], Tensor]
"""2:4 matrix `[rows, in]` -> its compressed form."""


def runs(target: NM) -> bool:
    """Whether the regions of a target are products of library kernels."""
    return target.share == 1 or not (target.tiles.rows and target.tiles.columns)


def split(rows: Tensor, bias: Tensor | None, target: NM, pack: Pack) -> nn.Module:
    """The linear of a weight `[out, in]` that was pruned to `target`, in two products; its regions run."""
    dense = dense_groups(rows != 0, target)
    if not target.tiles.columns:
        return _ByRows(rows, bias, dense[:, 0], pack)
    return _ByColumns(rows, bias, dense[0].repeat_interleave(target.m), pack)


class _Two(nn.Module):
    """Two weights, which are moved and counted as any; a part that is empty is None."""

    def __init__(self, sparse: Tensor, dense: Tensor, bias: Tensor | None, pack: Pack) -> None:
        super().__init__()
        self.sparse = _held(pack(sparse.contiguous())) if sparse.numel() else None
        self.dense = _held(dense.contiguous()) if dense.numel() else None
        self.bias = None if bias is None else _held(bias)

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


class _ByRows(_Two):
    def __init__(self, rows: Tensor, bias: Tensor | None, dense: Tensor, pack: Pack) -> None:
        super().__init__(rows[~dense], rows[dense], bias, pack)
        order = torch.cat([(~dense).nonzero()[:, 0], dense.nonzero()[:, 0]])
        self.register_buffer("place", order.argsort())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        parts = [nn.functional.linear(x, weight) for weight in (self.sparse, self.dense) if weight is not None]
        return self._with_bias(torch.cat(parts, -1).index_select(-1, self.get_buffer("place")))


class _ByColumns(_Two):
    def __init__(self, rows: Tensor, bias: Tensor | None, dense: Tensor, pack: Pack) -> None:
        super().__init__(rows[:, ~dense], rows[:, dense], bias, pack)
        self.register_buffer("sparse_inputs", (~dense).nonzero()[:, 0])
        self.register_buffer("dense_inputs", dense.nonzero()[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        parts = [
            nn.functional.linear(x.index_select(-1, self.get_buffer(f"{name}_inputs")), weight)
            for name, weight in (("sparse", self.sparse), ("dense", self.dense))
            if weight is not None
        ]
        return self._with_bias(sum(parts[1:], parts[0]))


def _held(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)
