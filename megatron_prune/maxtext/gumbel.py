"""Learnable N:M masks in JAX: what `megatron_prune.kernels.gumbel` is in PyTorch, with the same patterns, noise, values
and gradients. Noise is counter-based (Philox4x32-10), a pure function of a key and of a group's place in the unsharded
weight: any sharding that XLA chooses draws the same, nothing is kept for the backward pass, and the noise of a step is
that of the same step in PyTorch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatron_prune.kernels.definition import MULTIPLIERS, ROUNDS, WEYL, pattern_table


def _product(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """High and low 32-bit words of the 64-bit product, from products of 16-bit halves."""
    low, high = a & 0xFFFF, a >> 16
    b_low, b_high = jnp.uint32(b & 0xFFFF), jnp.uint32(b >> 16)
    first, second, third = low * b_low, low * b_high, high * b_low
    middle = (first >> 16) + (second & 0xFFFF) + (third & 0xFFFF)
    return high * b_high + (second >> 16) + (third >> 16) + (middle >> 16), a * jnp.uint32(b)


def philox4x32(counter: tuple[jax.Array, ...], key: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    """Philox4x32-10 of four uint32 words and a key of two, all of shapes that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + jnp.uint32(WEYL[0]), k1 + jnp.uint32(WEYL[1])
    return c0, c1, c2, c3


def gumbel_from_bits(bits: jax.Array) -> jax.Array:
    """Standard Gumbel variates, float32, of uint32 words; why it has two branches is in `kernels.philox`."""
    top = bits >> 8
    below = (top.astype(jnp.float32) + 0.5) * 2.0**-24
    above = ((jnp.uint32(2**24 - 1) - top).astype(jnp.float32) + 0.5) * 2.0**-24
    exponential = jnp.where(top < 2**23, -jnp.log(below), -jnp.log1p(-above))
    return -jnp.log(exponential)


def gumbel_noise(groups: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """Noise [..., count] of the groups with unsharded index `groups` (uint32 [...]); `key` uint32 [2].

    Counters have their low word only: a weight has fewer than 2^32 blocks of four words.
    """
    blocks = -(-count // 4)
    block = groups[..., None] * jnp.uint32(blocks) + jnp.arange(blocks, dtype=jnp.uint32)
    zero = jnp.zeros_like(block)
    words = philox4x32((block, zero, zero, zero), (key[0], key[1]))
    return gumbel_from_bits(jnp.stack(words, axis=-1).reshape(*groups.shape, 4 * blocks)[..., :count])


def _masks(logits: jax.Array, row_ids: jax.Array, key: jax.Array, schedule: jax.Array, shape: tuple) -> tuple:
    """Probabilities [rows, groups, patterns], forward mask [rows, groups, m] and table [patterns, m]."""
    n, m, hard, noise = shape
    scale, temperature, _ = schedule
    table = jnp.asarray(pattern_table(n, m), jnp.float32)
    noisy = logits.astype(jnp.float32) * scale
    if noise:
        per_row = logits.shape[1]
        groups = row_ids.astype(jnp.uint32)[:, None] * jnp.uint32(per_row) + jnp.arange(per_row, dtype=jnp.uint32)
        noisy = noisy + gumbel_noise(groups, logits.shape[2], key)
    probabilities = jax.nn.softmax((noisy - noisy.max(-1, keepdims=True)) / temperature, axis=-1)
    exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    mask = table[noisy.argmax(-1)] if hard else exact(probabilities, table)
    return probabilities, mask, table


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def masked_weight(
    weight: jax.Array, logits: jax.Array, row_ids: jax.Array, key: jax.Array, schedule: jax.Array, shape: tuple
) -> jax.Array:
    """`weight * mask`, mask = softmax((scale * logits + g) / temperature) @ patterns, differentiable in both.

    weight [out, in], logits [out, in / m, patterns]; `row_ids` [out]: rows of the unsharded weight, for the noise;
    `key` uint32 [2]; `schedule` float32 [3]: scale, temperature, regularization; `shape`: n, m, hard, noise.
    hard: straight-through, as in PyTorch: forward and the weight's gradient use the likeliest pattern, the logits see
    the soft one. The gradient of -regularization * sum((weight * mask)^2) is added to that of the logits.
    """
    mask = _masks(logits, row_ids, key, schedule, shape)[1]
    return (weight * mask.reshape(weight.shape)).astype(weight.dtype)


def _forward(weight: Any, logits: Any, row_ids: Any, key: Any, schedule: Any, shape: tuple) -> tuple:
    return masked_weight(weight, logits, row_ids, key, schedule, shape), (weight, logits, row_ids, key, schedule)


def _backward(shape: tuple, saved: tuple, grad_output: jax.Array) -> tuple:
    weight, logits, row_ids, key, schedule = saved
    scale, temperature, regularization = schedule
    probabilities, mask, table = _masks(logits, row_ids, key, schedule, shape)
    w = weight.astype(jnp.float32).reshape(mask.shape)
    dy = grad_output.astype(jnp.float32).reshape(mask.shape)
    grad_weight = (mask * dy).reshape(weight.shape).astype(weight.dtype)
    grad_mask = w * (dy - 2.0 * regularization * w * mask)
    grad_probabilities = jnp.matmul(grad_mask, table.T, precision=jax.lax.Precision.HIGHEST)
    mean = (probabilities * grad_probabilities).sum(-1, keepdims=True)
    grad_logits = (grad_probabilities - mean) * probabilities * (scale / temperature)
    return grad_weight, grad_logits.astype(logits.dtype), None, None, None


masked_weight.defvjp(_forward, _backward)


def decode(logits: np.ndarray, n: int, m: int) -> np.ndarray:
    """The mask the logits [out, groups, patterns] stand for, without noise: bool [out, in]."""
    return pattern_table(n, m)[np.asarray(logits).argmax(-1)].reshape(len(logits), -1)


def prior_logits(mask: np.ndarray, n: int, m: int, strength: float, std: float) -> np.ndarray:
    """Logits [out, in / m, patterns] that decode to an N:M mask [out, in], as methods.maskllm has them."""
    overlap = mask.reshape(len(mask), -1, m).astype(np.float32) @ pattern_table(n, m).T.astype(np.float32)
    return np.float32(strength * std) * (overlap - np.float32(n))
