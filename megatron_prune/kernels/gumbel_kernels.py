"""The Triton kernels of learnable N:M masks, launched by triton_gumbel.py: what csrc/gumbel.c does, on a GPU.

A thread owns whole groups, so every value below is a vector over the BLOCK groups of a program, one for each pattern k
or input i, and loops over them are unrolled with the table of patterns known to the compiler: no sum crosses threads.
Only stores go through a tile [BLOCK, width], which the compiler turns so that neighbouring threads write neighbouring
bytes. Nothing of the size of weight or logits is written but the results."""

# mypy: ignore-errors
# (kernels are written in Triton's language, which only looks like Python)

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("total", "groups", "first_group", "groups_per_row", "key")
"""Arguments whose values are not compiled in: one compilation for weights of all shapes."""


@triton.jit
def _log2(x, HARDWARE: tl.constexpr):
    """log2 of a normal x > 0. HARDWARE: NVIDIA's instruction, off by 2^-22, absolute in (1/2, 2), else relative."""
    if HARDWARE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _exp2(x, HARDWARE: tl.constexpr):
    """2^x; HARDWARE: results below the normal numbers are 0."""
    if HARDWARE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def _philox(low, high, key):
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
def _gumbel(word, HARDWARE: tl.constexpr):
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
def _place(row_ids, groups, first_group, groups_per_row, flat, inside):
    """Index in the unsharded weight, int64 [BLOCK], of the groups with index `flat` here."""
    row = flat // groups
    row_id = tl.load(row_ids + row, mask=inside, other=0)
    return row_id * groups_per_row + first_group + (flat - row * groups)


@triton.jit
def _columns(tile, CHUNK: tl.constexpr):
    """The CHUNK (2, 4 or 8) columns of a tile [BLOCK, CHUNK]. Each split separates even columns from odd ones."""
    rows: tl.constexpr = tile.shape[0]
    if CHUNK == 2:
        return tl.split(tile)
    if CHUNK == 4:
        even, odd = tl.split(tile.reshape(rows, 2, 2))
        c0, c2 = tl.split(even)
        c1, c3 = tl.split(odd)
        return c0, c1, c2, c3
    even, odd = tl.split(tile.reshape(rows, 4, 2))
    c04, c26 = tl.split(even.reshape(rows, 2, 2))
    c15, c37 = tl.split(odd.reshape(rows, 2, 2))
    c0, c4 = tl.split(c04)
    c1, c5 = tl.split(c15)
    c2, c6 = tl.split(c26)
    c3, c7 = tl.split(c37)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def _load(pointer, flat, inside, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The rows `flat` of a tensor [groups, WIDTH] as a tuple of WIDTH vectors, read CHUNK columns at a time.

    CHUNK 1 suits few columns: the cache still holds the row when the next column is read.
    """
    values = ()
    for first in tl.static_range(0, WIDTH, CHUNK):
        if CHUNK == 1:
            part = (tl.load(pointer + flat * WIDTH + first, mask=inside, other=0.0).to(tl.float32),)
        else:
            column = first + tl.arange(0, CHUNK)
            wanted = inside[:, None] & (column < WIDTH)[None, :]
            tile = tl.load(pointer + flat[:, None] * WIDTH + column[None, :], mask=wanted, other=0.0)
            part = _columns(tile.to(tl.float32), CHUNK)
        for j in tl.static_range(CHUNK):
            if first + j < WIDTH:
                values = values + (part[j],)
    return values


@triton.jit
def _noisy(
    logits, flat, inside, index, key, scale,
    P: tl.constexpr, NOISE: tl.constexpr, HARDWARE: tl.constexpr, P_LOAD: tl.constexpr,
):  # fmt: skip
    """scale * logits + noise: a tuple of P vectors."""
    z = _load(logits, flat, inside, P, P_LOAD)
    noisy = ()
    for block in tl.static_range((P + 3) // 4):
        if NOISE:
            counter = index * ((P + 3) // 4) + block
            words = _philox((counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32), key)
        for j in tl.static_range(4):
            if 4 * block + j < P:
                value = z[4 * block + j] * scale
                if NOISE:
                    value += _gumbel(words[j], HARDWARE)
                noisy = noisy + (value,)
    return noisy


@triton.jit
def _winner(z, P: tl.constexpr):
    """The largest of z and its pattern, the lowest where several are equal."""
    largest = z[0]
    winner = tl.zeros_like(largest).to(tl.int32)
    for k in tl.static_range(1, P):
        winner = tl.where(z[k] > largest, k, winner)
        largest = tl.maximum(z[k], largest)
    return largest, winner


@triton.jit
def _masks(
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
def _stack(values, CHUNK: tl.constexpr):
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
def _store(pointer, values, flat, inside, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ADD: tl.constexpr):
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


@triton.jit(do_not_specialize=SIZES)
def forward(
    logits, row_ids, total, groups, first_group, groups_per_row, key, scale, inverse_temperature,
    weight, output,
    TABLE: tl.constexpr, M: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
    NOISE: tl.constexpr, HARD: tl.constexpr, HARDWARE: tl.constexpr,
    M_LOAD: tl.constexpr, P_LOAD: tl.constexpr, M_CHUNK: tl.constexpr, P_CHUNK: tl.constexpr,
):  # fmt: skip
    """output = weight * mask."""
    flat = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < total
    index = _place(row_ids, groups, first_group, groups_per_row, flat, inside)
    z = _noisy(logits, flat, inside, index, key, scale, P, NOISE, HARDWARE, P_LOAD)
    _, _, _, mask = _masks(z, inverse_temperature, TABLE, M, P, HARD, HARDWARE)
    w = _load(weight, flat, inside, M, M_LOAD)
    result = ()
    for i in tl.static_range(M):
        result = result + (w[i] * mask[i],)
    _store(output, result, flat, inside, M, M_CHUNK, False)


@triton.jit(do_not_specialize=SIZES)
def backward(
    logits, row_ids, total, groups, first_group, groups_per_row, key, scale, inverse_temperature,
    weight, grad_output, grad_weight, grad_logits, regularization,
    TABLE: tl.constexpr, M: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
    NOISE: tl.constexpr, HARD: tl.constexpr, HARDWARE: tl.constexpr,
    M_LOAD: tl.constexpr, P_LOAD: tl.constexpr, M_CHUNK: tl.constexpr, P_CHUNK: tl.constexpr,
    WEIGHT: tl.constexpr, LOGITS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The wanted gradients (WEIGHT, LOGITS); ADD: that of the logits is added to what is there."""
    flat = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < total
    index = _place(row_ids, groups, first_group, groups_per_row, flat, inside)
    z = _noisy(logits, flat, inside, index, key, scale, P, NOISE, HARDWARE, P_LOAD)
    e, inverse_sum, soft, mask = _masks(z, inverse_temperature, TABLE, M, P, HARD, HARDWARE)
    of_weight = ()
    of_mask = ()
    mean = tl.zeros_like(inverse_sum)
    w = _load(weight, flat, inside, M, M_LOAD)
    dy = _load(grad_output, flat, inside, M, M_LOAD)
    for i in tl.static_range(M):
        of_weight = of_weight + (mask[i] * dy[i],)
        of_mask = of_mask + (w[i] * (dy[i] - 2.0 * regularization * w[i] * mask[i]),)
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


@triton.jit(do_not_specialize=("total",))
def winners(
    logits, winners, sums, total, sharpness,
    P: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr, P_LOAD: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """winners[g]: pattern with the largest logit; sums[program]: of their probabilities without noise, and of the
    entropies in nats.

    sharpness is scale / temperature.
    """
    flat = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < total
    z = _load(logits, flat, inside, P, P_LOAD)
    largest, winner = _winner(z, P)
    weight = tl.zeros_like(largest)
    moment = tl.zeros_like(largest)
    for k in tl.static_range(P):
        exponent = (z[k] - largest) * (sharpness * 1.4426950408889634)
        e = _exp2(exponent, HARDWARE)
        weight += e
        moment += e * exponent
    entropy = (_log2(weight, HARDWARE) - moment / weight) * 0.6931471805599453
    tl.store(sums + 2 * tl.program_id(0), tl.sum(tl.where(inside, 1.0 / weight, 0.0), axis=0))
    tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(tl.where(inside, entropy, 0.0), axis=0))
    tl.store(winners + flat, winner.to(tl.uint8), mask=inside)
