"""Runs in MaxText's environment: what JAX makes of inputs that PyTorch has seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from megatron_prune.maxtext import gumbel
from megatron_prune.maxtext.keys import hash_key


def compare(inputs: str, output: str) -> None:
    """Masked weights and gradients of every case of a file, and the words of Philox."""
    given = np.load(inputs)
    found = {}
    for case in given["cases"]:
        n, m, hard, noise = (int(value) for value in given[f"{case} shape"])
        key = jnp.asarray(hash_key(*(int(value) for value in given[f"{case} draw"])), jnp.uint32)
        rows, schedule = given[f"{case} rows"], jnp.asarray(given[f"{case} schedule"], jnp.float32)

        def masked(weight, logits, shape=(n, m, bool(hard), bool(noise)), rows=rows, key=key, schedule=schedule):
            return gumbel.masked_weight(weight, logits, rows, key, schedule, shape)

        value, backward = jax.vjp(masked, given[f"{case} weight"], given[f"{case} logits"])
        found[f"{case} value"] = value
        found[f"{case} grad_weight"], found[f"{case} grad_logits"] = backward(jnp.asarray(given[f"{case} grad"]))
    zero = jnp.zeros(4, jnp.uint32)
    words = gumbel.philox4x32(
        (jnp.asarray(given["counter"], jnp.uint32), zero, zero, zero), (*jnp.asarray(given["key"]),)
    )
    np.savez(output, words=jnp.stack(words, -1), **{name: np.asarray(value) for name, value in found.items()})
