"""The Triton kernels of learnable masks for patterns of many choices, such as 4:8 with 70: as gumbel_kernels.py, which
unrolls all of them and would take minutes to compile. Here loops run over four choices at a time, the values of a
Philox counter, and noise is drawn again in each of two passes (three in backward): longer to run, seconds to compile.

What a group has for each input is a tile [BLOCK, WIDTH]; `bits[k]` has bit i set where pattern k keeps input i."""

# mypy: ignore-errors
# (kernels are written in Triton's language, which only looks like Python)

from __future__ import annotations

import triton
import triton.language as tl

from megatron_prune.kernels.gumbel_kernels import SIZES, _exp2, _gumbel, _log2, _philox, _place


@triton.jit
def _four(
    logits, flat, inside, index, block, key, scale,
    P: tl.constexpr, NOISE: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """scale * logits + noise of the choices 4 block to 4 block + 3: four vectors, -inf beyond the last choice."""
    if NOISE:
        counter = index * ((P + 3) // 4) + block
        words = _philox((counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32), key)
    values = ()
    for j in tl.static_range(4):
        choice = tl.zeros_like(flat) + (4 * block + j)  # a tensor in the interpreter, too, whose loops count in Python
        value = tl.load(logits + flat * P + choice, mask=inside & (choice < P), other=0.0).to(tl.float32) * scale
        if NOISE:
            value += _gumbel(words[j], HARDWARE)
        values = values + (tl.where(choice < P, value, float("-inf")),)
    return values


@triton.jit
def _winner(
    logits, flat, inside, index, key, scale,
    P: tl.constexpr, NOISE: tl.constexpr, HARDWARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest value and its choice, the lowest where several are equal."""
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK,), tl.int32)
    for block in range((P + 3) // 4):
        z = _four(logits, flat, inside, index, block, key, scale, P, NOISE, HARDWARE)
        for j in tl.static_range(4):
            winner = tl.where(z[j] > largest, 4 * block + j, winner)
            largest = tl.maximum(z[j], largest)
    return largest, winner


@triton.jit
def _keeps(bits, choice, P: tl.constexpr, WIDTH: tl.constexpr):
    """float32 [WIDTH]: 1 where a choice keeps the input, 0 where not, and beyond the last choice."""
    pattern = tl.load(bits + choice, mask=choice < P, other=0).to(tl.int32)
    return ((pattern >> tl.arange(0, WIDTH)) & 1).to(tl.float32)


@triton.jit
def _masks(
    logits, flat, inside, index, key, scale, inverse_temperature, bits,
    P: tl.constexpr, NOISE: tl.constexpr, HARD: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(largest value, 1 / sum of exp((z_k - largest) / temperature), soft mask, mask of the forward pass)."""
    largest, winner = _winner(logits, flat, inside, index, key, scale, P, NOISE, HARDWARE, BLOCK)
    sharpness = inverse_temperature * 1.4426950408889634
    total = tl.zeros((BLOCK,), tl.float32)
    soft = tl.zeros((BLOCK, WIDTH), tl.float32)
    for block in range((P + 3) // 4):
        z = _four(logits, flat, inside, index, block, key, scale, P, NOISE, HARDWARE)
        for j in tl.static_range(4):
            e = _exp2((z[j] - largest) * sharpness, HARDWARE)
            total += e
            soft += e[:, None] * _keeps(bits, 4 * block + j, P, WIDTH)[None, :]
    inverse_sum = 1.0 / total
    soft *= inverse_sum[:, None]
    mask = soft
    if HARD:
        pattern = tl.load(bits + winner).to(tl.int32)
        mask = ((pattern[:, None] >> tl.arange(0, WIDTH)[None, :]) & 1).to(tl.float32)
    return largest, inverse_sum, soft, mask


@triton.jit(do_not_specialize=SIZES)
def forward(
    logits, row_ids, total, groups, first_group, groups_per_row, key, scale, inverse_temperature,
    weight, output, bits,
    M: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    NOISE: tl.constexpr, HARD: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """output = weight * mask."""
    flat = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < total
    index = _place(row_ids, groups, first_group, groups_per_row, flat, inside)
    _, _, _, mask = _masks(
        logits, flat, inside, index, key, scale, inverse_temperature, bits, P, NOISE, HARD, HARDWARE, BLOCK, WIDTH
    )
    column = tl.arange(0, WIDTH)[None, :]
    where = flat[:, None] * M + column
    there = inside[:, None] & (column < M)
    w = tl.load(weight + where, mask=there, other=0.0).to(tl.float32)
    tl.store(output + where, (w * mask).to(output.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=SIZES)
def backward(
    logits, row_ids, total, groups, first_group, groups_per_row, key, scale, inverse_temperature,
    weight, grad_output, grad_weight, grad_logits, regularization, bits,
    M: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    NOISE: tl.constexpr, HARD: tl.constexpr, HARDWARE: tl.constexpr,
    WEIGHT: tl.constexpr, LOGITS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The wanted gradients (WEIGHT, LOGITS); ADD: that of the logits is added to what is there."""
    flat = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < total
    index = _place(row_ids, groups, first_group, groups_per_row, flat, inside)
    largest, inverse_sum, soft, mask = _masks(
        logits, flat, inside, index, key, scale, inverse_temperature, bits, P, NOISE, HARD, HARDWARE, BLOCK, WIDTH
    )
    column = tl.arange(0, WIDTH)[None, :]
    where = flat[:, None] * M + column
    there = inside[:, None] & (column < M)
    w = tl.load(weight + where, mask=there, other=0.0).to(tl.float32)
    dy = tl.load(grad_output + where, mask=there, other=0.0).to(tl.float32)
    if WEIGHT:
        tl.store(grad_weight + where, (mask * dy).to(grad_weight.dtype.element_ty), mask=there)
    if LOGITS:
        of_mask = w * (dy - 2.0 * regularization * w * mask)
        mean = tl.sum(soft * of_mask, axis=1)
        sharpness = inverse_temperature * 1.4426950408889634
        factor = scale * inverse_temperature * inverse_sum
        for block in range((P + 3) // 4):
            z = _four(logits, flat, inside, index, block, key, scale, P, NOISE, HARDWARE)
            for j in tl.static_range(4):
                choice = 4 * block + j
                e = _exp2((z[j] - largest) * sharpness, HARDWARE)
                kept = tl.sum(of_mask * _keeps(bits, choice, P, WIDTH)[None, :], axis=1) - mean
                result = factor * e * kept
                place = grad_logits + flat * P + choice
                wanted = inside & (tl.zeros_like(flat) + choice < P)
                if ADD:
                    result += tl.load(place, mask=wanted, other=0.0)
                tl.store(place, result.to(grad_logits.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=("total",))
def winners(
    logits, winners, sums, total, sharpness,
    P: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """As gumbel_kernels.winners."""
    flat = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < total
    largest, winner = _winner(logits, flat, inside, flat.to(tl.int64), 0, 1.0, P, False, HARDWARE, BLOCK)
    weight = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for choice in range(P):
        z = tl.load(logits + flat * P + choice, mask=inside, other=0.0).to(tl.float32)
        exponent = (z - largest) * (sharpness * 1.4426950408889634)
        e = _exp2(exponent, HARDWARE)
        weight += e
        moment += e * exponent
    entropy = (_log2(weight, HARDWARE) - moment / weight) * 0.6931471805599453
    tl.store(sums + 2 * tl.program_id(0), tl.sum(tl.where(inside, 1.0 / weight, 0.0), axis=0))
    tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(tl.where(inside, entropy, 0.0), axis=0))
    tl.store(winners + flat, winner.to(tl.uint8), mask=inside)
