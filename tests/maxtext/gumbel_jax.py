"""Runs in MaxText's environment: what JAX makes of inputs that PyTorch has seen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from megatron_prune.kernels.definition import Draw
from megatron_prune.maxtext import gumbel, layout, learn
from megatron_prune.maxtext.folder import WEIGHTS, Folder, flatten, nest, read_weights
from megatron_prune.maxtext.masks import PackedMasks
from megatron_prune.maxtext.options import LearnConfig


def compare(inputs: str, output: str) -> None:
    """Masked weights and gradients of every case of a file, and the words of Philox."""
    given = np.load(inputs)
    found = {}
    for case in given["cases"]:
        n, m, hard, noise = (int(value) for value in given[f"{case} shape"])
        key = jnp.asarray(Draw(*(int(value) for value in given[f"{case} draw"])).key(), jnp.uint32)
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


def masked_tree(path: str, logits: str, output: str) -> None:
    """The Hugging Face weights of a folder's model with masks from logits [out, groups, patterns] by weight name."""
    folder, given = Folder.open(Path(path)), np.load(logits)
    config = LearnConfig(input=folder.path, output=Path(output), seed=3, steps=5)
    by_path = {leaf.path: np.stack([given[leaf.hf.format(layer=i)] for i in range(folder.config.num_layers)])
               for leaf in learn.LEAVES}  # fmt: skip
    inputs = learn._inputs(config, folder.config, 2)
    tree = nest(read_weights(folder.path / WEIGHTS, folder.config))
    masked = learn.masked_state(tree, by_path, inputs, (2, 4, False, True), folder.config)
    flat = {path: np.asarray(value) for path, value in flatten(masked).items()}
    np.savez(output, **dict(layout.from_maxtext(flat, folder.config, {})))


def start_of_prior(path: str, prior: str) -> str:
    """Whether logits that start at a prior decode to it."""
    folder = Folder.open(Path(path))
    masks = PackedMasks(Path(prior), folder.config)
    config = LearnConfig(input=folder.path, output=Path(path))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    logits = learn._start(config, folder.config, masks, SimpleNamespace(mesh=mesh))
    decoded = dict(learn._decoded(config, folder.config, {path: np.asarray(v) for path, v in logits.items()}))
    return str(all(np.array_equal(decoded[name], masks[name]) for name in masks) and len(decoded) == len(masks))
