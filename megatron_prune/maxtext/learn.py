"""Learned N:M masks (MaskLLM) on MaxText's model: the mask logits are trained, the weights are frozen.

The same maths as `megatron-prune prune --method maskllm`: patterns, schedules, regularisation, the start at a prior,
and the noise of a step, which is drawn once for a step's whole batch (there: --mask-draw step). Model, sharding and
data are MaxText's; the loop is ours, because its trainer trains what the model has.

Masks are made layer by layer, so that beside the logits, Adam's two means and one masked copy of the weights only one
layer's noise is in memory. Logits are [layers, out, in / m, patterns], sharded over all devices along `out` where that
divides. The result is a mask .npz, for `convert --masks` and `megatron-prune import --mask`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from megatron_prune.claims import claimed
from megatron_prune.decision.mask_npz import write_masks
from megatron_prune.decision.run_folder import RunDescription
from megatron_prune.errors import UserError
from megatron_prune.foreign import quiet
from megatron_prune.kernels import definition
from megatron_prune.kernels.definition import linear_schedule, pattern_table
from megatron_prune.maxtext import layout
from megatron_prune.maxtext.checkpoints import CHECKPOINTS, set_aside_damaged
from megatron_prune.maxtext.folder import MASKS, Folder
from megatron_prune.maxtext.keys import keys, row_ids
from megatron_prune.maxtext.masks import PackedMasks
from megatron_prune.maxtext.model import LoadedModel, load
from megatron_prune.maxtext.options import LearnConfig
from megatron_prune.maxtext.record import RunRecord
from megatron_prune.maxtext.train import data_settings, leaf_of, users_settings
from megatron_prune.model.families import ModelConfig

LEAVES = tuple(leaf for leaf in layout.LEAVES if leaf.prunable)
ITEMS = "default"
"""Where Orbax's manager keeps the arrays of a step."""
KEPT = 2
"""Newest checkpoints that stay."""
Logits = dict[str, Any]
"""Of every masked array, by its path."""


def learn(config: LearnConfig) -> None:
    """Learn masks into the folder `config.output`, or go on from its newest checkpoint."""
    folder = Folder.open(config.input)
    _check(config, folder)
    prior = PackedMasks(config.prior, folder.config) if config.prior else None
    if prior is not None:
        _check_prior(config, prior)
    length, batch = config.seq_length, config.global_batch_size
    data = data_settings(config, folder.config)
    more = users_settings(config.settings, folder.config, but=["weight_dtype"])
    model = load(config.input, None, length, batch, [f"steps={config.steps}", *data, *more])
    import jax
    import orbax.checkpoint as ocp

    start = _start(config, folder.config, prior, model)
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
    alone = claimed(config.output, may_exist=True) if jax.process_index() == 0 else nullcontext()
    checkpoints = (config.output / CHECKPOINTS).resolve()
    with alone, model.sharded(), quiet():
        set_aside_damaged(config.output, ITEMS)
        with ocp.CheckpointManager(checkpoints, options=options) as saver:
            _loop(config, folder.config, model, saver, start)


def _loop(config: LearnConfig, about: ModelConfig, model: LoadedModel, saver: Any, logits: Logits) -> None:
    """All steps from the newest checkpoint on, and the masks that come out."""
    import jax
    import orbax.checkpoint as ocp
    from maxtext.input_pipeline.input_pipeline_interface import create_data_iterator

    optimizer = _optimizer(config)
    state = (logits, optimizer.init(logits))
    done = int(saver.latest_step() or 0)
    if done:
        state = saver.restore(done, args=ocp.args.StandardRestore(state))
    asked = RunDescription(str(config.input.resolve()), "maskllm", f"{config.n}:{config.m}", "learning")
    record = RunRecord(config.output, asked, config, done)
    batches, _ = create_data_iterator(model.config, model.mesh)
    for _ in range(done):  # the order of the data is a function of its seed
        next(batches)
    step_of = jax.jit(partial(_step, config, about, model, optimizer), donate_argnums=0)
    for step in range(done, config.steps):
        began = time.perf_counter()
        state, metrics = step_of(state, model.state, next(batches), _inputs(config, about, step))
        found = {key: float(value) for key, value in metrics.items()}
        record.write(step + 1, found | _course(config, step, time.perf_counter() - began))
        if (step + 1) % config.save_interval == 0 or step + 1 == config.steps:
            saver.save(step + 1, args=ocp.args.StandardSave(state))
    _write(config, about, state[0])
    record.close("decided")


def schedule(config: LearnConfig, step: int) -> tuple[float, float, float]:
    """Scale, temperature and regularization of a step."""
    between = definition.SCHEDULES[config.schedule_shape]
    scale = between(config.scale_start, config.scale_end, step, config.steps)
    temperature = between(config.temperature_start, config.temperature_end, step, config.steps)
    return scale, temperature, linear_schedule(config.weight_regularization, 0.0, step, config.steps)


def rows(leaf: layout.Leaf, array: Any, config: ModelConfig) -> Any:
    """A stacked array of the tree as matrices [layers, out, in]; numpy or JAX."""
    _out, inputs = layout.weight_shape(leaf, config)
    return array.swapaxes(0, 1).reshape(config.num_layers, inputs, -1).swapaxes(1, 2)


def columns(leaf: layout.Leaf, matrices: Any, config: ModelConfig) -> Any:
    """Inverse of `rows`."""
    shape = layout.shapes(config)[leaf.path]
    return matrices.swapaxes(1, 2).reshape(shape[1], shape[0], *shape[2:]).swapaxes(0, 1)


def masked_state(state: Any, logits: Logits, inputs: Mapping[str, Any], shape: tuple, config: ModelConfig) -> Any:
    """The weights with every masked matrix times its mask; `inputs` as `_inputs` makes them, `shape` as `masked_weight`
    takes it.
    """
    import jax

    from megatron_prune.maxtext.gumbel import masked_weight

    def of(path: Any, array: Any) -> Any:
        leaf = leaf_of(path)
        if leaf is None:
            return array
        factor = layout.factor(leaf, config)  # regularization is of weights as they were
        weights = rows(leaf, array, config) * factor
        ids = row_ids(leaf, config)

        def layer(arguments: Any) -> Any:
            weight, own, key = arguments
            return masked_weight(weight, own, ids, key, inputs["schedule"], shape)

        masked = jax.lax.map(layer, (weights, logits[leaf.path], inputs[leaf.path])) / factor
        return columns(leaf, masked, config).astype(array.dtype)

    return jax.tree_util.tree_map_with_path(of, state)


def _check(config: LearnConfig, folder: Folder) -> None:
    if folder.config.num_moe_experts:
        raise UserError(
            f"{config.input} has experts, and learn takes models without: learn their masks with megatron-prune prune "
            "--method maskllm"
        )
    if folder.masks() is not None:
        raise UserError(
            f"{config.input} has masks, so what they remove is zero: learn masks on the dense model, and give these as "
            "--prior"
        )
    for leaf in LEAVES:
        inputs = layout.weight_shape(leaf, folder.config)[1]
        if inputs % config.m:
            raise UserError(f"--m {config.m} does not fit {leaf.hf}: its {inputs} inputs are not a multiple of it")
    if (config.output / MASKS).exists():
        raise UserError(f"{config.output} has learned its masks; give another --output")


def _check_prior(config: LearnConfig, prior: PackedMasks) -> None:
    for name in prior:
        kept = prior[name].reshape(-1, config.m).sum(-1)
        if (kept != config.n).any():
            raise UserError(f"--prior {config.prior}: the mask of {name} is not {config.n}:{config.m} in every group")


def _start(config: LearnConfig, model: ModelConfig, prior: PackedMasks | None, loaded: LoadedModel) -> Logits:
    """Logits that decode to the prior, or noise of `std`; on the devices."""
    import jax
    import jax.numpy as jnp

    from megatron_prune.maxtext.gumbel import gumbel_noise, prior_logits

    n, m = config.n, config.m
    count = len(pattern_table(n, m))
    logits: Logits = {}
    for leaf in LEAVES:
        out, inputs = layout.weight_shape(leaf, model)
        layers = np.empty((model.num_layers, out, inputs // m, count), np.float32)
        if prior is not None:
            stacked = (layout.kernel(leaf, prior[leaf.hf.format(layer=layer)], model) for layer in range(len(layers)))
            for layer, kernel in enumerate(stacked):
                layers[layer] = prior_logits(kernel.reshape(inputs, out).T, n, m, config.prior_strength, config.std)
        else:
            first = row_ids(leaf, model).astype(np.uint32)[:, None] * np.uint32(inputs // m)
            groups = first + np.arange(inputs // m, dtype=np.uint32)
            for layer, key in enumerate(keys(leaf, model, config.seed, definition.INITIAL_STEP)):
                noise = np.asarray(gumbel_noise(jnp.asarray(groups), count, jnp.asarray(key)))
                layers[layer] = config.std * (noise - definition.GUMBEL_MEAN) / definition.GUMBEL_STD
        logits[leaf.path] = jax.device_put(layers, _sharding(loaded.mesh, out))
    return logits


def _sharding(mesh: Any, out: int) -> Any:
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec(None, mesh.axis_names) if out % mesh.size == 0 else PartitionSpec())


def _optimizer(config: LearnConfig) -> Any:
    """Adam without weight decay, gradients clipped, the learning rate along a cosine."""
    import optax

    warmup = config.lr_warmup_iters
    peak, end = config.lr * config.lr_multiplier, config.min_lr * config.lr_multiplier
    falling = optax.cosine_decay_schedule(peak, max(1, config.steps - warmup), alpha=end / peak)
    rate = optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), falling], [warmup])
    adam = optax.adam(rate, config.adam_beta1, config.adam_beta2, config.adam_eps)
    return optax.chain(optax.clip_by_global_norm(config.clip_grad), adam) if config.clip_grad else adam


def _inputs(config: LearnConfig, model: ModelConfig, step: int) -> dict[str, np.ndarray]:
    """What changes from step to step: the schedule, and the keys of every layer."""
    found = {leaf.path: keys(leaf, model, config.seed, step) for leaf in LEAVES}
    return found | {"schedule": np.array(schedule(config, step), np.float32)}


def _step(
    config: LearnConfig, about: ModelConfig, model: LoadedModel, optimizer: Any, state: Any, weights: Any, batch: Any,
    inputs: Mapping[str, Any],
) -> Any:  # fmt: skip
    """One optimizer step on the logits: new state and metrics."""
    import jax
    import jax.numpy as jnp
    import optax

    shape = (config.n, config.m, config.hard, True)
    logits, moments = state

    def loss_of(logits: Logits) -> Any:
        predicted = model.forward()(masked_state(weights, logits, inputs, shape, about), batch["inputs"])
        losses = optax.softmax_cross_entropy_with_integer_labels(predicted.astype(jnp.float32), batch["targets"])
        counted = batch["targets_segmentation"] != 0
        return jnp.sum(losses * counted) / jnp.maximum(jnp.sum(counted), 1)

    loss, gradients = jax.value_and_grad(loss_of)(logits)
    updates, moments = optimizer.update(gradients, moments, logits)
    sharpness = inputs["schedule"][0] / inputs["schedule"][1]
    best = [jax.nn.softmax(values * sharpness, axis=-1).max(-1) for values in logits.values()]
    metrics = {
        "loss": loss,
        "grad_norm": optax.global_norm(gradients),
        "max_probability": sum(jnp.sum(values) for values in best) / sum(values.size for values in best),
    }
    return (optax.apply_updates(logits, updates), moments), metrics


def _course(config: LearnConfig, step: int, seconds: float) -> dict[str, float]:
    """The schedule of a step, and its speed."""
    scale, temperature, regularization = schedule(config, step)
    tokens = config.global_batch_size * config.seq_length
    found = {"scale": scale, "temperature": temperature, "weight_regularization": regularization}
    return found | {"tokens_per_s": tokens / seconds}


def _write(config: LearnConfig, model: ModelConfig, logits: Logits) -> None:
    """The masks that the logits stand for, by Hugging Face name. Every process takes part, the first writes."""
    import jax
    from jax.experimental import multihost_utils

    whole = {path: multihost_utils.process_allgather(values, tiled=True) for path, values in logits.items()}
    masks = dict(_decoded(config, model, whole))
    if jax.process_index() == 0:
        ordered = [(name, masks[name]) for layer in range(model.num_layers) for name in masks if f".{layer}." in name]
        file = config.output / MASKS
        write_masks(file, ordered, f"{config.n}:{config.m}", anew=True)
        print(f"{file}: {config.n}:{config.m}")


def _decoded(config: LearnConfig, model: ModelConfig, logits: Logits) -> Iterator[tuple[str, np.ndarray]]:
    from megatron_prune.maxtext.gumbel import decode

    for leaf in LEAVES:
        for layer in range(model.num_layers):
            rows_of = decode(logits[leaf.path][layer], config.n, config.m)
            kernel = rows_of.T.reshape(layout.shapes(model)[leaf.path][:1] + layout.shapes(model)[leaf.path][2:])
            yield leaf.hf.format(layer=layer), layout.weight(leaf, kernel, model)
