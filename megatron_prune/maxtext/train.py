"""MaxText's own trainer, with removed weights held at zero. Nothing of MaxText is copied or changed on disk.

MaxText asks one function for its optimizer (`maxtext.optimizers.optimizers.get_optimizer`); here it gets that optimizer
inside `as_elsewhere`, which clears the gradients of removed weights before clipping and their updates after. So
clipping, Adam's means, weight decay and every layout of the weights over devices see weights that cannot move.
It also shows the optimizer the queries of LLaMA's decoder without the factor that MaxText has in them: Adam's steps are
as long whatever unit a weight is in, so that queries would learn sqrt(D) times as fast as anywhere else.

Which weights are removed is decided by the masks that lie beside the model, not by what happens to be zero: a kept
weight of a masked matrix is never exactly zero (`layout.TINY`, and no step lands there), so that on the devices zero
means removed. This takes no memory, where masks would take a byte a weight. At the start every device's part of the
weights is compared with the masks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.data.about import read_about
from megatron_prune.decision.run_folder import RunDescription
from megatron_prune.errors import UserError, one_line
from megatron_prune.maxtext import layout
from megatron_prune.maxtext.checkpoints import last_step, refuse_damaged, set_aside_damaged
from megatron_prune.maxtext.distill import Distillation, distillation, load_teacher
from megatron_prune.maxtext.folder import Folder
from megatron_prune.maxtext.masks import PackedMasks, stacked
from megatron_prune.maxtext.model import QUIET, configured, join, last_of_each, machine, prepare, replaced
from megatron_prune.maxtext.options import Data, TrainConfig
from megatron_prune.maxtext.record import RunRecord, watched
from megatron_prune.model.families import ModelConfig

CLIP = "gradient_clipping_threshold"
CLIP_DEFAULT = 1.0
"""MaxText's."""


def train(config: TrainConfig) -> None:
    """Train the model `config.input` into the run `config.output`, or go on where that run was saved last."""
    folder = Folder.open(config.input)
    arguments = settings(config, folder)
    masks = folder.masks() if config.keep_zeros else None
    losses = distillation(config, folder)
    join()
    with ExitStack() as changes:
        stops = changes.enter_context(_noted_stops())
        changes.enter_context(_begun(config, folder, masks, losses))
        clip = clipping(arguments)
        arguments = last_of_each([*arguments, f"{CLIP}=0"])  # `as_elsewhere` clips
        changes.enter_context(_optimizer(clip, folder.config, masks is not None))
        from absl import logging
        from maxtext.configs import pyconfig
        from maxtext.trainers.pre_train import train as trainer

        logging.use_absl_handler()
        changes.enter_context(replaced(pyconfig, "initialize", _configured(pyconfig.initialize)))
        changes.enter_context(losses.active(config.losses.teacher is not None) if losses else nullcontext())
        trainer.main(["", *arguments])
    done = last_step(config.output)
    if done < config.steps - 1:  # MaxText takes an error of the data for the end of the data
        why = f" ({one_line(stops[-1], 200)})" if stops else ""
        raise UserError(f"MaxText stopped after step {done} of {config.steps}{why}: give more data, or go on")


def clipping(arguments: Sequence[str]) -> float:
    """The largest norm of gradients that MaxText's arguments ask for, 0 for no limit; UserError for no number."""
    given = value(arguments, CLIP) or str(CLIP_DEFAULT)
    try:
        return float(given)
    except ValueError:
        raise UserError(f"--settings {CLIP}={given}: allowed: a number, 0 for no limit") from None


def settings(config: TrainConfig, folder: Folder) -> list[str]:
    """MaxText's arguments: the model's, then ours, then those of the user, which win."""
    prepare()
    output = config.output.resolve()
    ours = [
        *folder.arguments(),
        f"run_name={output.name}",
        f"base_output_directory={output.parent}",
        f"steps={config.steps}",
        f"max_target_length={config.seq_length}",
        "enable_checkpointing=True",
        f"checkpoint_period={config.save_interval}",
        f"max_num_checkpoints_to_keep={config.keep_checkpoints}",
        "enable_tensorboard=False",  # `RunRecord` writes its events
        *QUIET,
        *machine(),
        *data_settings(config, folder.config),
    ]
    return last_of_each([*ours, *users_settings(config.settings, folder.config)])


def users_settings(given: Sequence[str], model: ModelConfig, but: Sequence[str] = ()) -> Sequence[str]:
    """The same; UserError for a setting that defines the model, unless it is one of `but`."""
    fixed = {*layout.settings(model), "load_parameters_path", "tokenizer_path"} - {*but}
    for argument in given:
        key, equals, _value = argument.partition("=")
        if not equals or key in fixed:
            raise UserError(f"--settings {argument}: allowed: KEY=VALUE of MaxText's keys that do not define the model")
    return given


def data_settings(config: Data, model: ModelConfig) -> list[str]:
    """Text from `preprocess`, in the order of Megatron's data sets; without, MaxText's synthetic data."""
    if not config.data:
        return ["dataset_type=synthetic"]
    prefixes, weights = _blend(config.data)
    ends = {_end_of_text(prefix, model) for prefix in prefixes}
    if len(ends) > 1:
        raise UserError(f"--data: the prefixes have different end-of-text tokens {sorted(ends)}: preprocess them alike")
    cache = config.data_cache or Path("~/.cache/megatron_prune/maxtext").expanduser()
    specs = [f"{cache.resolve()}/{prefix.name}|{prefix.resolve()}" for prefix in prefixes]
    files = specs[0] if len(specs) == 1 else ";".join(f"{s},{w}" for s, w in zip(specs, weights, strict=True))
    return [
        "dataset_type=grain",
        "grain_file_type=mmap_npy",
        f"grain_train_files={files}",
        f"mmap_eod_id={ends.pop()}",
        "reset_attention_mask=False",  # as in `train`: a window is one sequence
        f"data_shuffle_seed={config.seed}",
    ]


def as_elsewhere(inner: Any, clip: float, model: ModelConfig, masked: bool) -> Any:
    """The optimizer `inner` (optax) for the weights as Hugging Face has them, whatever factor MaxText has in them.

    `masked`: those that are zero in a masked matrix stay zero. Gradients are clipped to a norm of `clip` here (0: not
    at all), after those of removed weights are cleared. The state is that of `inner`.
    """
    import jax
    import jax.numpy as jnp
    import optax

    def only_kept(tree: Any, params: Any) -> Any:
        def of(path: Any, values: Any, weights: Any) -> Any:
            return jnp.where(weights == 0, 0, values).astype(values.dtype) if leaf_of(path) else values

        return jax.tree_util.tree_map_with_path(of, tree, params) if masked else tree

    def times(tree: Any, power: int) -> Any:
        """Times a power of the factor by which the weights are smaller."""

        def of(path: Any, values: Any) -> Any:
            leaf = leaf_of(path)
            factor = layout.factor(leaf, model) if leaf else 1.0
            return values if factor == 1.0 else (values * factor**power).astype(values.dtype)

        return jax.tree_util.tree_map_with_path(of, tree)

    def not_to_zero(path: Any, update: Any, weights: Any) -> Any:
        """A kept weight that this step would bring to zero stays where it is for the step."""
        if not masked or leaf_of(path) is None:
            return update
        lands = (jnp.abs(weights + update) < layout.TINY) & (weights != 0)
        return jnp.where(lands, 0, update).astype(update.dtype)

    def update(gradients: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        gradients = times(only_kept(gradients, params), -1)
        if clip > 0:
            gradients, _ = optax.clip_by_global_norm(clip).update(gradients, optax.EmptyState())
        updates, state = inner.update(gradients, state, times(params, 1), **extra)
        updates = times(only_kept(updates, params), -1)
        return jax.tree_util.tree_map_with_path(not_to_zero, updates, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def leaf_of(path: Any) -> layout.Leaf | None:
    """The masked matrix that a path in any of JAX's trees leads to."""
    import jax

    text = jax.tree_util.keystr(path, simple=True, separator="/")
    for leaf in layout.MASKED:
        if re.search(rf"(^|/){re.escape(leaf.path)}($|/)", text):
            return leaf
    return None


def check_state(state: Any, masks: PackedMasks, config: ModelConfig) -> None:
    """UserError unless the zeros of this host's part of the masked weights are exactly those that masks remove."""
    import jax
    from flax import nnx

    found = 0
    for path, array in jax.tree_util.tree_leaves_with_path(nnx.state(state.model, nnx.Param)):
        leaf = leaf_of(path)
        if leaf is None:
            continue
        found += 1
        kept = stacked(leaf, masks, config)
        for shard in array.addressable_shards:
            wrong = int(((np.asarray(shard.data) != 0) != kept[shard.index]).sum())
            if wrong:
                raise UserError(
                    f"{wrong} weights of {leaf.path} contradict the masks: the run was begun with another model or "
                    "trained without masks; give another --output"
                )
    if found != len(layout.masked_leaves(config)):
        raise RuntimeError(f"{found} masked matrices found in MaxText's model: this is not the MaxText that was tested")


@contextmanager
def _optimizer(clip: float, model: ModelConfig, masked: bool) -> Iterator[None]:
    """While active, MaxText's trainer uses `as_elsewhere`."""
    from maxtext.optimizers import optimizers

    original = optimizers.get_optimizer

    def get_optimizer(*args: Any, **kwargs: Any) -> Any:
        return as_elsewhere(original(*args, **kwargs), clip, model, masked)

    with replaced(optimizers, "get_optimizer", get_optimizer):
        yield


@contextmanager
def _begun(
    config: TrainConfig, folder: Folder, masks: PackedMasks | None, losses: Distillation | None
) -> Iterator[None]:
    """While active, MaxText's trainer goes on from a checkpoint that can be read, its weights are compared with the
    masks, the teacher is loaded, and the run folder is told of.
    """
    from maxtext.utils import train_utils

    run, setup = config.output, train_utils.setup_train_loop
    record: RunRecord | None = None

    def setup_train_loop(*args: Any, **kwargs: Any) -> Any:
        nonlocal record
        set_aside_damaged(run)
        done = last_step(run) + 1
        if not done:
            refuse_damaged(folder.step(None))
        if losses is not None:
            losses.teacher = load_teacher(config)
        result = setup(*args, **kwargs)
        if masks is not None:
            check_state(result[-1], masks, folder.config)
        about = RunDescription(str(config.input.resolve()), "train", pattern(masks), "training")
        record = RunRecord(run, about, config, done)
        return result

    def write(step: int, numbers: Any) -> None:
        if record is not None:
            record.write(step, numbers)

    with replaced(train_utils, "setup_train_loop", setup_train_loop), watched(write, losses.told if losses else {}):
        try:
            yield
        finally:
            if record is not None:
                record.close("trained" if last_step(run) >= config.steps - 1 else "training")


@contextmanager
def _noted_stops() -> Iterator[list[str]]:
    """Why MaxText's trainer has ended before its last step, newest last: it tells its log alone."""
    from maxtext.utils import exceptions

    told: list[str] = []

    class Noted(exceptions.StopTraining):  # type: ignore[misc]
        def __init__(self, *words: Any) -> None:
            super().__init__(*words)
            told.append(str(self))

    with replaced(exceptions, "StopTraining", Noted):
        yield told


def _configured(initialize: Any) -> Any:
    """MaxText's `initialize`, with a UserError for settings that it refuses."""

    def checked(argv: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        return configured(argv[1:], initialize)

    return checked


def pattern(masks: PackedMasks | None) -> str | None:
    """What the masks of a model say of themselves."""
    return None if masks is None else masks.pattern


def value(arguments: Sequence[str], key: str) -> str | None:
    """The value of a setting among KEY=VALUE."""
    return next((text.partition("=")[2] for text in arguments if text.startswith(key + "=")), None)


def _blend(data: Sequence[str]) -> tuple[list[Path], list[float]]:
    """`[WEIGHT] PREFIX ...` as prefixes and weights."""
    prefixes: list[Path] = []
    weights: list[float] = []
    weight = None
    for word in data:
        try:
            weight = float(word)
        except ValueError:
            prefixes.append(Path(word))
            weights.append(1.0 if weight is None else weight)
            weight = None
    if not prefixes or weight is not None:
        raise UserError(f"--data {' '.join(data)}: allowed: PREFIX ..., or WEIGHT PREFIX ...")
    return prefixes, weights


def _end_of_text(prefix: Path, model: ModelConfig) -> int:
    about = read_about(prefix.with_name(prefix.name + ".json"))
    given = about.get("vocab_size", 0)
    if given > model.vocab_size:
        raise UserError(
            f"{prefix} has a vocabulary of {given}, the model of {model.vocab_size}: preprocess it with "
            "the model's tokenizer"
        )
    end = about.get("end_of_text")
    if end is None:
        raise UserError(f"{prefix} was made by a tokenizer without end-of-text token, which MaxText needs")
    return end
