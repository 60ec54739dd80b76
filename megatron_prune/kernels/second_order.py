"""The second-order pruning solver of SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, section 3).

Removing weight j of a row w costs (w_j / U_jj)^2 in squared output error, U being the upper Cholesky factor
of the inverse Hessian (H^-1 = U^T U), and the best correction of the columns on its right is - w_j / U_jj *
U_j. Columns go left to right, in blocks; the columns behind a block are updated once a block.

Three paths, one result up to rounding: eager PyTorch (any device, the reference), a compiled one for the CPU
and Triton for a GPU (triton_second_order.py; the factor there is PyTorch's). In the compiled path a row's result is
the same bit for bit whichever rows are solved with it and however many threads there are; the sums of Triton's
product have an order of their own too, but it has only been run in Triton's interpreter. In the eager path the
update behind a block is a matrix product, whose rounding may depend on the number of rows.
`benchmarks/second_order.py` measures all of it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.kernels.compiled import load_library, load_triton
from megatron_prune.kernels.memory import expect_writes
from megatron_prune.kernels.selection import select_nm

SelectBlock = Callable[[Tensor, int], Tensor]
"""(scores [rows, b], first column) -> bool mask [rows, b] of one block."""
Sweep = Callable[[Tensor, Tensor, "Factor", int, int, int, int], None]
"""See ``sweep``."""

LEAF = 256
"""Largest matrix that is factored or inverted without being halved."""


class SingularHessian(ArithmeticError):
    """Some input is, up to float32 rounding, a combination of others: H has no usable inverse."""


@dataclass(frozen=True)
class Factor:
    """What the solver needs of a Hessian."""

    upper: Tensor
    """U, float32 [in, in], upper triangular, U^T U = (H + damping)^-1."""
    live: Tensor
    """bool [in]: False for inputs that were zero in every calibration token."""


def factorise(hessian: Tensor, percdamp: float) -> Factor:
    """Factor of ``hessian`` [in, in] after adding ``percdamp`` times the mean diagonal of live inputs.

    H^-1 = U^T U holds for U = R^-1 where H = R R^T with R upper: one Cholesky in reverse order and one
    triangular inverse, in place and in float64, instead of Cholesky, inverse, Cholesky. Dead inputs get a
    diagonal of one, which changes nothing else since they correlate with no other input. Raises
    SingularHessian when an input is explained by others but for less than the rounding of the float32 H.
    """
    diagonal = hessian.diagonal().double()
    live = diagonal > 0
    if not live.any():
        raise SingularHessian
    work = expect_writes(torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device)).copy_(hessian)
    work.diagonal().add_(torch.where(live, percdamp * diagonal[live].mean(), 1.0))
    if not _factorise_in_place(work):
        raise SingularHessian
    # U_jj^-2 = R_jj^2, the part of input j that the inputs after it leave unexplained, against the rounding of H.
    noise = torch.finfo(torch.float32).eps * diagonal.sum()
    if (live & (work.diagonal().square().reciprocal() <= noise)).any():
        raise SingularHessian
    return Factor(expect_writes(torch.empty_like(hessian, dtype=torch.float32)).copy_(work), live)


def _factorise_in_place(h: Tensor) -> bool:
    """Replace ``h`` float64 [k, k], contiguous, by U, zero below the diagonal; False when there is none."""
    library = _factor_library() if h.device.type == "cpu" else None
    if library is not None:
        space = expect_writes(torch.empty(library.second_order_space(len(h)), dtype=torch.float64))
        return bool(library.second_order_factor(h.data_ptr(), len(h), space.data_ptr(), torch.get_num_threads()))
    if not _reverse_cholesky(h):
        return False
    _invert(h)
    h.triu_()
    return True


def _reverse_cholesky(h: Tensor) -> bool:
    """Replace the upper triangle of ``h`` [k, k] by R with h = R R^T; False when there is none.

    By halves, so that nearly all work is in products of large matrices, and half of it in none.
    """
    if len(h) <= LEAF:
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        h.copy_(lower.flip(0, 1))
        return not failed
    half = len(h) // 2
    first, between, second = h[:half, :half], h[:half, half:], h[half:, half:]
    if not _reverse_cholesky(second):
        return False
    between.copy_(torch.linalg.solve_triangular(second.t(), between, upper=False, left=False))
    for start in range(0, half, LEAF):
        first[start : start + LEAF, start:].addmm_(between[start : start + LEAF], between[start:].t(), alpha=-1)
    return _reverse_cholesky(first)


def _invert(r: Tensor) -> None:
    """Replace the upper triangular ``r`` [k, k] by its inverse; what is below the diagonal is not looked at."""
    if len(r) <= LEAF:
        eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
        r.copy_(torch.linalg.solve_triangular(r, eye, upper=True))
        return
    half = len(r) // 2
    first, between, second = r[:half, :half], r[:half, half:], r[half:, half:]
    between.copy_(torch.linalg.solve_triangular(first, between, upper=True))
    between.copy_(torch.linalg.solve_triangular(second, between, upper=True, left=False).neg_())
    _invert(first)
    _invert(second)


def solve_nm(
    weight: Tensor, factor: Factor, n: int, m: int, block_size: int = 128, dense: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keep ``n`` of every ``m``, chosen on the updated weights when a group's first column is reached.

    weight [rows, in] float32 -> (mask bool [rows, in], corrected weights [rows, in], zero where mask is
    False). Blocks are rounded up to whole groups. ``dense`` bool [rows, in]: groups of which all stays, and makes up
    for what goes on their left.
    """
    weight, mask = _start(weight, factor)
    if dense is not None:
        mask.copy_(~dense)
    size = weight.shape[1] if _has_own_blocks(weight.device) else -(-block_size // m) * m
    for first, last in _blocks(weight.shape[1], size):
        sweep(weight, mask, factor, first, last, n, m)
    return mask, weight


def solve_unstructured(
    weight: Tensor, factor: Factor, select: SelectBlock, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Let ``select`` choose each block's mask from the scores of its weights updated so far.

    weight [rows, in] float32 -> (mask bool [rows, in], corrected weights [rows, in], zero where mask is
    False). ``select`` is called once a block, whatever the number of rows, so it may communicate.
    """
    weight, mask = _start(weight, factor)
    for first, last in _blocks(weight.shape[1], block_size):
        mask[:, first:last] = select(scores(weight, factor, first, last), first)
        sweep(weight, mask, factor, first, last)
    return mask, weight


def scores(weight: Tensor, factor: Factor, first: int, last: int) -> Tensor:
    """(w_j / U_jj)^2 of the columns first to last, [rows, last - first]; -1 at dead inputs: they go first."""
    diagonal = factor.upper.diagonal()[first:last]
    return (weight[:, first:last] / diagonal).square().masked_fill(~factor.live[first:last], -1.0)


def sweep(weight: Tensor, mask: Tensor, factor: Factor, first: int, last: int, n: int = 0, m: int = 0) -> None:
    """Remove weights of the columns first to last and correct all columns on their right, in place.

    With ``m`` the mask is chosen here, N:M, and written; in groups where it is False all stay. With ``m = 0`` it is
    given.
    """
    fast = _fast(weight.device) or sweep_eager
    fast(weight, mask, factor, first, last, n, m)


def sweep_eager(weight: Tensor, mask: Tensor, factor: Factor, first: int, last: int, n: int, m: int) -> None:
    """``sweep`` in PyTorch: the reference."""
    upper = factor.upper
    errors = torch.zeros_like(weight[:, first:last])
    for j in range(first, last):
        if m and j % m == 0:
            mask[:, j : j + m] = select_nm(scores(weight, factor, j, j + m), n, m) | ~mask[:, j : j + 1]
        error = torch.where(mask[:, j], 0.0, weight[:, j] / upper[j, j])
        errors[:, j - first] = error
        weight[:, j] = torch.where(mask[:, j], weight[:, j], 0.0)
        weight[:, j + 1 : last] -= torch.outer(error, upper[j, j + 1 : last])
    weight[:, last:] -= errors @ upper[first:last, last:]


def sweep_compiled(
    library: ctypes.CDLL, weight: Tensor, mask: Tensor, factor: Factor, first: int, last: int, n: int, m: int
) -> None:
    """``sweep`` in C; weight, mask and factor are contiguous CPU tensors."""
    diagonal = factor.upper.diagonal().contiguous()
    pointers = [x.data_ptr() for x in (weight, mask, factor.upper, diagonal, factor.live)]
    rows, columns = weight.shape
    library.second_order_sweep(*pointers, rows, columns, first, last, n, m, torch.get_num_threads())


def _library(source: str, **functions: tuple[Any, list[Any]]) -> ctypes.CDLL | None:
    """The library built from a file of csrc, its `functions` given their (result, arguments); None where none is."""
    library = load_library(Path(__file__).parent / "csrc" / source)
    for name, (result, arguments) in functions.items() if library is not None else ():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _compiled() -> ctypes.CDLL | None:
    sweep = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 6 + [ctypes.c_int]
    return _library("second_order.c", second_order_sweep=(None, sweep))


def _factor_library() -> ctypes.CDLL | None:
    factor = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    space = (ctypes.c_int64, [ctypes.c_int64])
    return _library("factor.c", second_order_space=space, second_order_factor=(ctypes.c_int, factor))


def _fast(device: torch.device) -> Sweep | None:
    """The quick path for tensors there; None, after one loud warning, where there is only PyTorch's."""
    if device.type == "cpu":
        library = _compiled()
        return None if library is None else functools.partial(sweep_compiled, library)
    kernels = load_triton("triton_second_order", "SparseGPT on this GPU is solved") if device.type == "cuda" else None
    return None if kernels is None else kernels.sweep


def _has_own_blocks(device: torch.device) -> bool:
    """Whether the sweep there has blocks of its own, so that larger ones change no bit of the result."""
    fast = _fast(device)
    return isinstance(fast, functools.partial) and fast.func is sweep_compiled


def _start(weight: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
    """A working copy of the weights, zero at dead inputs, and a mask that keeps everything."""
    fresh = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    start = expect_writes(fresh).copy_(weight).masked_fill_(~factor.live, 0.0)
    return start, expect_writes(torch.empty_like(start, dtype=torch.bool)).fill_(True)


def _blocks(columns: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, columns)) for first in range(0, columns, size)]
