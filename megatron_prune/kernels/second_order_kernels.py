"""The Triton kernels of the second-order solver, launched by triton_second_order.py: what csrc/second_order.c does,
on a GPU.

A program of `inside` holds all columns of a block for some rows in registers and takes them one by one: a column is
picked out of the tile by a sum in which all others count as zero, which is exact. `behind` is the product that updates
the columns on the right of the block, in tiles of a fixed size and in float32 without TF32, so that a row's sums run in
the same order whichever rows are solved with it."""

# mypy: ignore-errors
# (kernels are written in Triton's language, which only looks like Python)

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("rows", "columns", "first", "last")
"""Arguments whose values are not compiled in: one compilation for weights of all shapes."""


@triton.jit
def _pick(tile, column, j):
    """Column j of a tile [ROWS, WIDTH]: [ROWS]."""
    return tl.sum(tl.where((column == j)[None, :], tile, 0.0), axis=1)


@triton.jit
def _choose(w, upper, live, column, columns, first, j, N: tl.constexpr, M: tl.constexpr):
    """1.0 for the N highest of M scores (w / d)^2 from column first + j on, of equal ones the last: a tuple of [ROWS].

    Inputs that never fired lose to all others.
    """
    score = ()
    for i in tl.static_range(M):
        at = (first + j + i).to(tl.int64)
        root = tl.div_rn(_pick(w, column, j + i), tl.load(upper + at * (columns + 1)))
        score = score + (tl.where(tl.load(live + at) != 0, root * root, -1.0),)
    keep = ()
    for i in tl.static_range(M):
        losses = tl.zeros_like(score[0]).to(tl.int32)
        for k in tl.static_range(M):
            if k < i:
                losses += (score[k] > score[i]).to(tl.int32)
            elif k > i:
                losses += (score[k] >= score[i]).to(tl.int32)
        keep = keep + (tl.where(losses < N, 1.0, 0.0),)
    return keep


@triton.jit(do_not_specialize=SIZES)
def inside(
    weight, mask, upper, live, errors, rows, columns, first, last,
    N: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Columns [first, last) of ROWS rows: remove, spread the errors as far as last, and note them [rows, WIDTH].

    M > 0: write the mask, N:M where it is 1, and all of a group where it is 0; M = 0: obey it.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here = (row < rows)[:, None] & (first + column < last)[None, :]
    at = row[:, None] * columns + (first + column)[None, :]
    w = tl.load(weight + at, mask=here, other=0.0)
    kept = tl.load(mask + at, mask=here, other=1).to(tl.float32)
    gone = tl.zeros_like(w)
    STEP: tl.constexpr = M if M > 0 else 1
    for j in range(0, last - first, STEP):
        if M > 0:
            chosen = _choose(w, upper, live, column, columns, first, j, N, M)
        for i in tl.static_range(STEP):
            picked = (column == j + i)[None, :]
            keep = _pick(kept, column, j + i)
            if M > 0:
                keep = tl.where(keep != 0.0, chosen[i], 1.0)
            value = _pick(w, column, j + i)
            factor = upper + (first + j + i).to(tl.int64) * columns + first
            error = tl.where(keep != 0.0, 0.0, tl.div_rn(value, tl.load(factor + j + i)))
            right = (column > j + i) & (first + column < last)
            spread = error[:, None] * tl.load(factor + column, mask=right, other=0.0)[None, :]
            w = tl.where(picked, tl.where(keep != 0.0, value, 0.0)[:, None], w - spread)
            gone = tl.where(picked, error[:, None], gone)
            kept = tl.where(picked, keep[:, None], kept)
    tl.store(weight + at, w, mask=here)
    if M > 0:
        tl.store(mask + at, kept.to(mask.dtype.element_ty), mask=here)
    tl.store(errors + row[:, None] * WIDTH + column[None, :], gone, mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=SIZES)
def behind(
    weight, upper, errors, rows, columns, first, last,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """weight[:, last:] -= errors [rows, WIDTH] @ upper[first:last, last:]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = last + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        error = tl.load(errors + row[:, None] * WIDTH + depth[None, :], mask=(row < rows)[:, None], other=0.0)
        place = (first + depth).to(tl.int64)[:, None] * columns + column[None, :]
        wanted = (first + depth < last)[:, None] & (column < columns)[None, :]
        factor = tl.load(upper + place, mask=wanted, other=0.0)
        total = tl.dot(error, factor, total, input_precision="ieee")
    here = (row < rows)[:, None] & (column < columns)[None, :]
    at = weight + row[:, None] * columns + column[None, :]
    tl.store(at, tl.load(at, mask=here, other=0.0) - total, mask=here)
