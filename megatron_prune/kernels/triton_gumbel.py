"""Learnable N:M masks on a GPU, in Triton: what csrc/gumbel.c does on a CPU, with the same noise. Imported by
gumbel.py for CUDA tensors, and by tests under Triton's interpreter (TRITON_INTERPRET=1, CPU tensors).

A thread owns whole groups, so every value below is a vector over the BLOCK groups of a program, one for each pattern k
or input i, and loops over them are unrolled with the table of patterns known to the compiler: no sum crosses threads.
Only stores go through a tile [BLOCK, width], which the compiler turns so that neighbouring threads write neighbouring
bytes. Nothing of the size of weight or logits is written but the results."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
"""Groups of one program, one for each of its threads."""
MAX_CHUNK = 8
"""Widest tile that is stored at once."""

# ---- on the device ----------------------------------------------------------------------------------------


@triton.jit
def _log2(x, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """log2 of a normal x > 0. HARDWARE: NVIDIA's instruction, off by 2^-22, absolute in (1/2, 2), else relative."""
    if HARDWARE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _exp2(x, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """2^x; HARDWARE: results below the normal numbers are 0."""
    if HARDWARE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def _philox(low, high, key):  # type: ignore[no-untyped-def]
    """Philox4x32-10 of the counter (low, high, 0, 0), uint32: four words. As in philox.py.

    tl.philox is the same function; with products of 64 bits a round takes two multiplications instead of four.
    """
    c0 = low
    c1 = high
    c2 = tl.zeros_like(low)
    c3 = c2
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _gumbel(word, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gumbel variate of a 32-bit word, as `philox.gumbel_from_bits`: -log(-log(u)), u = odd / 2^25.

    From u = 3/4 on x is u - 1, which is exact, and log(1 + x) = x p(x), p minimax for the relative error (1.2e-7).
    """
    odd = ((word >> 7) | 1).to(tl.int32)
    near_one = odd >= 25165824
    x = tl.where(near_one, odd - 33554432, odd).to(tl.float32) * 2.9802322387695312e-08
    p = -0.3399522006511688 * x + 0.14381851255893707
    p = p * x - 0.2578205168247223
    p = p * x + 0.3328547775745392
    p = p * x - 0.5000105500221252
    p = p * x + 0.9999999403953552
    exponential = tl.where(near_one, x * -p, _log2(tl.abs(x), HARDWARE) * -0.6931471805599453)
    return _log2(exponential, HARDWARE) * -0.6931471805599453


@triton.jit
def _place(row_ids, groups, first_group, groups_per_row, flat, inside):  # type: ignore[no-untyped-def]
    """Index in the unsharded weight, int64 [BLOCK], of the groups with index `flat` here."""
    row = flat // groups
    row_id = tl.load(row_ids + row, mask=inside, other=0)
    return row_id * groups_per_row + first_group + (flat - row * groups)


@triton.jit
def _noisy(logits, flat, inside, index, key, scale, P: tl.constexpr, NOISE: tl.constexpr, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """scale * logits + noise: a tuple of P vectors."""
    z = ()
    for block in tl.static_range((P + 3) // 4):
        if NOISE:
            counter = index * ((P + 3) // 4) + block
            words = _philox((counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32), key)
        for j in tl.static_range(4):
            if 4 * block + j < P:
                value = tl.load(logits + flat * P + (4 * block + j), mask=inside, other=0.0).to(tl.float32) * scale
                if NOISE:
                    value += _gumbel(words[j], HARDWARE)
                z = z + (value,)
    return z


@triton.jit
def _winner(z, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest of z and its pattern, the lowest where several are equal."""
    largest = z[0]
    winner = tl.zeros_like(largest).to(tl.int32)
    for k in tl.static_range(1, P):
        winner = tl.where(z[k] > largest, k, winner)
        largest = tl.maximum(z[k], largest)
    return largest, winner


@triton.jit
def _masks(  # type: ignore[no-untyped-def]
    z, inverse_temperature, TABLE: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
    HARD: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """(exp((z_k - max) / temperature), 1 / their sum, soft mask, mask of the forward pass).

    TABLE has bit 8 k + i set where pattern k keeps input i.
    """
    largest, winner = _winner(z, P)
    sharpness = inverse_temperature * 1.4426950408889634
    e = ()
    total = tl.zeros_like(largest)
    for k in tl.static_range(P):
        e = e + (_exp2((z[k] - largest) * sharpness, HARDWARE),)
        total += e[k]
    inverse_sum = 1.0 / total
    soft = ()
    mask = ()
    for i in tl.static_range(M):
        kept = tl.zeros_like(total)
        hard = tl.zeros_like(total)
        for k in tl.static_range(P):
            if (TABLE >> (8 * k + i)) & 1:
                kept += e[k]
                if HARD:
                    hard = tl.where(winner == k, 1.0, hard)
        soft = soft + (kept * inverse_sum,)
        mask = mask + ((hard if HARD else kept * inverse_sum),)
    return e, inverse_sum, soft, mask


@triton.jit
def _stack(values, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """CHUNK vectors (1, 2, 4 or 8) as the columns of a tile [BLOCK, CHUNK]. Each join appends the next lower bit."""
    v = values
    if CHUNK == 8:
        v = (tl.join(v[0], v[4]), tl.join(v[1], v[5]), tl.join(v[2], v[6]), tl.join(v[3], v[7]))
    if CHUNK >= 4:
        v = (tl.join(v[0], v[2]), tl.join(v[1], v[3]))
    if CHUNK >= 2:
        v = (tl.join(v[0], v[1]),)
    return v[0].reshape(values[0].shape[0], CHUNK)


@triton.jit
def _store(pointer, values, flat, inside, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ADD: tl.constexpr):  # type: ignore[no-untyped-def]
    """WIDTH vectors to the rows `flat` of a tensor [groups, WIDTH], replacing what is there or adding to it."""
    for first in tl.static_range(0, WIDTH, CHUNK):
        part = ()
        for j in tl.static_range(CHUNK):
            part = part + (values[first + j if first + j < WIDTH else first],)
        column = first + tl.arange(0, CHUNK)
        where = pointer + flat[:, None] * WIDTH + column[None, :]
        wanted = inside[:, None] & (column < WIDTH)[None, :]
        tile = _stack(part, CHUNK)
        if ADD:
            tile += tl.load(where, mask=wanted, other=0.0)
        tl.store(where, tile.to(pointer.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["key"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    logits, row_ids, total, groups, first_group, groups_per_row, key, scale, inverse_temperature,
    weight, output,
    TABLE: tl.constexpr, M: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
    NOISE: tl.constexpr, HARD: tl.constexpr, HARDWARE: tl.constexpr, M_CHUNK: tl.constexpr, P_CHUNK: tl.constexpr,
):  # fmt: skip
    """output = weight * mask."""
    flat = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < total
    index = _place(row_ids, groups, first_group, groups_per_row, flat, inside)
    z = _noisy(logits, flat, inside, index, key, scale, P, NOISE, HARDWARE)
    _, _, _, mask = _masks(z, inverse_temperature, TABLE, M, P, HARD, HARDWARE)
    result = ()
    for i in tl.static_range(M):
        w = tl.load(weight + flat * M + i, mask=inside, other=0.0).to(tl.float32)
        result = result + (w * mask[i],)
    _store(output, result, flat, inside, M, M_CHUNK, False)


@triton.jit(do_not_specialize=["key"])
def _backward_kernel(  # type: ignore[no-untyped-def]
    logits, row_ids, total, groups, first_group, groups_per_row, key, scale, inverse_temperature,
    weight, grad_output, grad_weight, grad_logits, regularization,
    TABLE: tl.constexpr, M: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
    NOISE: tl.constexpr, HARD: tl.constexpr, HARDWARE: tl.constexpr, M_CHUNK: tl.constexpr, P_CHUNK: tl.constexpr,
    WEIGHT: tl.constexpr, LOGITS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The wanted gradients (WEIGHT, LOGITS); ADD: that of the logits is added to what is there."""
    flat = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < total
    index = _place(row_ids, groups, first_group, groups_per_row, flat, inside)
    z = _noisy(logits, flat, inside, index, key, scale, P, NOISE, HARDWARE)
    e, inverse_sum, soft, mask = _masks(z, inverse_temperature, TABLE, M, P, HARD, HARDWARE)
    of_weight = ()
    of_mask = ()
    mean = tl.zeros_like(inverse_sum)
    for i in tl.static_range(M):
        w = tl.load(weight + flat * M + i, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad_output + flat * M + i, mask=inside, other=0.0).to(tl.float32)
        of_weight = of_weight + (mask[i] * dy,)
        of_mask = of_mask + (w * (dy - 2.0 * regularization * w * mask[i]),)
        mean += soft[i] * of_mask[i]
    if WEIGHT:
        _store(grad_weight, of_weight, flat, inside, M, M_CHUNK, False)
    if LOGITS:
        factor = scale * inverse_temperature * inverse_sum
        result = ()
        for k in tl.static_range(P):
            kept = -mean
            for i in tl.static_range(M):
                if (TABLE >> (8 * k + i)) & 1:
                    kept += of_mask[i]
            result = result + (factor * e[k] * kept,)
        _store(grad_logits, result, flat, inside, P, P_CHUNK, ADD)


@triton.jit(do_not_specialize=["key"])
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits, row_ids, total, groups, first_group, groups_per_row, key, scale, inverse_temperature,
    weight, sums,
    TABLE: tl.constexpr, M: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
    NOISE: tl.constexpr, HARD: tl.constexpr, HARDWARE: tl.constexpr, M_CHUNK: tl.constexpr, P_CHUNK: tl.constexpr,
):  # fmt: skip
    """sums[program] = (sum of the best probabilities, sum of squares of the masked weight) of its groups."""
    flat = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < total
    index = _place(row_ids, groups, first_group, groups_per_row, flat, inside)
    z = _noisy(logits, flat, inside, index, key, scale, P, NOISE, HARDWARE)
    _, inverse_sum, _, mask = _masks(z, inverse_temperature, TABLE, M, P, HARD, HARDWARE)
    square = tl.zeros_like(inverse_sum)
    for i in tl.static_range(M):
        w = tl.load(weight + flat * M + i, mask=inside, other=0.0).to(tl.float32)
        square += w * mask[i] * w * mask[i]
    best = tl.where(inside, inverse_sum, 0.0)  # the largest e is exactly 1
    tl.store(sums + tl.program_id(0) * 2, tl.sum(best, axis=0))
    tl.store(sums + tl.program_id(0) * 2 + 1, tl.sum(square, axis=0))


@triton.jit
def _winners_kernel(logits, winners, total, P: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """winners[g]: pattern with the largest logit."""
    flat = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < total
    z = ()
    for k in tl.static_range(P):
        z = z + (tl.load(logits + flat * P + k, mask=inside, other=0.0).to(tl.float32),)
    _, winner = _winner(z, P)
    tl.store(winners + flat, winner.to(tl.uint8), mask=inside)


# ---- on the host ------------------------------------------------------------------------------------------


def interpreted() -> bool:
    """Whether the kernels here run in Triton's interpreter, on tensors in CPU memory (TRITON_INTERPRET=1)."""
    return not isinstance(_forward_kernel, triton.runtime.JITFunction)


@functools.cache
def _table(bits: tuple[int, ...]) -> int:
    """Bit 8 k + i is bit i of the k-th pattern's."""
    return sum(value << (8 * k) for k, value in enumerate(bits))


def _chunk(width: int) -> int:
    return min(triton.next_power_of_2(width), MAX_CHUNK)


def _constants(logits: Tensor, m: int) -> dict[str, Any]:
    """What every kernel must know when it is compiled."""
    patterns = logits.shape[2]
    wide = logits[..., 0].numel() * max(patterns, m) + BLOCK * patterns >= 2**31
    return {"P": patterns, "INDEX": tl.int64 if wide else tl.int32, "BLOCK": BLOCK}


def _launch(kernel: Any, logits: Tensor, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
    programs = triton.cdiv(logits.shape[0] * logits.shape[1], BLOCK)
    if programs:
        with torch.cuda.device_of(logits):
            kernel[(programs,)](*arguments, **constants, num_warps=BLOCK // 32)


def run(
    kernel: Any,
    logits: Tensor,
    row_ids: Tensor,
    tensors: tuple[Any, ...],
    *,
    first_group: int,
    groups_per_row: int,
    key: tuple[int, int] | None,
    scale: float,
    temperature: float,
    bits: tuple[int, ...],
    m: int,
    hard: bool,
    **constants: Any,
) -> None:
    """Launch one of the kernels over all groups of `logits`; `tensors` are the arguments that only it has.

    bits: for each pattern, bit i set where it keeps input i. row_ids is int64 on the device of the logits.
    """
    low, high = key or (0, 0)
    signed = low | (high - ((high & 0x80000000) << 1)) << 32  # one type for the compiler, whatever the key
    rows, groups, patterns = logits.shape
    arguments = (logits, row_ids, rows * groups, groups, first_group, groups_per_row, signed, scale, 1.0 / temperature)
    common = {
        "TABLE": _table(bits),
        "M": m,
        "NOISE": key is not None,
        "HARD": hard,
        "HARDWARE": torch.version.cuda is not None and not interpreted(),
        "M_CHUNK": _chunk(m),
        "P_CHUNK": _chunk(patterns),
    }
    _launch(kernel, logits, (*arguments, *tensors), {**_constants(logits, m), **common, **constants})


def forward(weight: Tensor, logits: Tensor, **call: Any) -> Tensor:
    """weight * mask, in the weight's dtype; `call` as in `run`."""
    output = torch.empty_like(weight)
    run(_forward_kernel, logits, tensors=(weight, output), **call)
    return output


def backward(
    weight: Tensor,
    logits: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor | None,
    grad_logits: Tensor | None,
    add: bool,
    regularization: float,
    **call: Any,
) -> None:
    """Fills grad_weight and fills or (add) adds to grad_logits, where they are wanted; `call` as in `run`."""
    wanted = {"WEIGHT": grad_weight is not None, "LOGITS": grad_logits is not None, "ADD": add}
    unused = grad_output  # a pointer that is not looked at
    tensors = (
        weight,
        grad_output,
        unused if grad_weight is None else grad_weight,
        unused if grad_logits is None else grad_logits,
        regularization,
    )
    run(_backward_kernel, logits, tensors=tensors, **wanted, **call)


def statistics(weight: Tensor, logits: Tensor, **call: Any) -> tuple[float, float]:
    """Sums over groups of the best probability and over weights of (weight * mask)^2; `call` as in `run`."""
    programs = triton.cdiv(logits.shape[0] * logits.shape[1], BLOCK)
    sums = torch.zeros(programs, 2, device=logits.device)
    run(_statistics_kernel, logits, tensors=(weight, sums), **call)
    best, square = sums.double().sum(0).tolist()
    return best, square


def winners(logits: Tensor) -> Tensor:
    """Index of the largest logit of each group: uint8 [out, groups]."""
    index = torch.empty(logits.shape[:2], dtype=torch.uint8, device=logits.device)
    total = logits.shape[0] * logits.shape[1]
    _launch(_winners_kernel, logits, (logits, index, total), _constants(logits, 1))
    return index
