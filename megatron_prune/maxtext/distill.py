"""Distillation in MaxText's trainer: what `megatron-prune train --teacher` lowers, by the same formulas, in JAX.

MaxText's own loss function is called as it is; while it is traced, the model's logits are noted, and where hidden
states count, each layer leaves its output (`nnx.Intermediate`, which MaxText's scan over layers stacks). The teacher's
forward pass on the same tokens, positions and segments comes beside it. So sharding, gradient accumulation, remat and
the zeros of the optimizer are MaxText's and `keep_zeros`'s, as without a teacher.

The teacher is an argument of the compiled step, beside the state and not in it: neither the optimizer nor a checkpoint
knows of it. Losses are means over the tokens that MaxText counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from megatron_prune.errors import UserError
from megatron_prune.maxtext.folder import Folder
from megatron_prune.maxtext.model import LoadedModel, load, replaced
from megatron_prune.maxtext.options import TrainConfig
from megatron_prune.training.weighting import HiddenLoss, Weighting, check_teacher, teacher_layer

OUTPUT = "layer_output"
"""Name of what a layer leaves."""
SLOTS = {"distillation_loss": "indexer_loss", "hidden_loss": "mtp_loss"}
"""Our losses -> those of MaxText that stand in their place: of parts that none of our models has, carried, accumulated,
added to the loss and told as it should be.
"""
TOLD = {name: f"learning/{key}" for name, key in ({"lm_loss": "lm_loss"} | SLOTS).items()}
"""Where MaxText tells them, times their weights."""
UNFIT = {"compiled_trainstep_file", "enable_diloco", "mtp_num_layers", "num_vocab_tiling", "training_objective"}
UNFIT |= {"use_indexer", "ici_pipeline_parallelism", "dcn_pipeline_parallelism"}
"""MaxText's settings of other steps, losses and stacks of layers."""
SMALLEST_NORM = 1e-8
"""PyTorch's, of the cosine."""


@dataclass
class Distillation:
    """The losses of one run, and its teacher."""

    weighting: Weighting
    layers: int
    """Of the student."""
    teacher: LoadedModel | None = None
    _weights: Any = field(default=None, repr=False)
    """The teacher's, while a step is traced."""

    @property
    def told(self) -> dict[str, tuple[str, float]]:
        """Name of a loss -> MaxText's name of what is told, and its weight in that."""
        return {name: (TOLD[name], weight) for name, weight in self.weighting.parts.items()}

    @contextmanager
    def active(self, taught: bool) -> Iterator[None]:
        """While active, MaxText's trainer lowers these losses; `taught`: with a teacher, which is loaded meanwhile."""
        from maxtext.trainers.pre_train import train as trainer
        from maxtext.utils import train_utils

        with ExitStack() as changes:
            changes.enter_context(replaced(trainer, "loss_fn", self._loss_of(trainer.loss_fn)))
            if taught:
                changes.enter_context(replaced(train_utils, "jit_train_step", self._jit_train_step))
            yield

    def _loss_of(self, usual: Callable[..., Any]) -> Callable[..., Any]:
        """MaxText's loss function, with the teacher's losses in training."""
        import jax.numpy as jnp

        def loss_fn(
            model: Any, config: Any, data: Any, dropout_rng: Any, params: Any, sparsity_state: Any = None,
            is_train: bool = True,
        ) -> Any:  # fmt: skip
            given = (model, config, data, dropout_rng, params, sparsity_state, is_train)
            if not is_train:
                return usual(*given)
            with _watched(model, self.weighting.hidden > 0) as logits:
                _, aux = usual(*given)
            outputs = _outputs(aux["intermediate_outputs"])
            aux["xent_sum"] = self.weighting.lm * aux["xent_sum"] if self.weighting.lm else jnp.zeros(())
            for name, loss in self._losses(logits, outputs, data).items():
                counted = data["targets_segmentation"] != 0
                mean = jnp.sum(loss * counted) / jnp.maximum(jnp.sum(counted), 1)
                aux[SLOTS[name]] = self.weighting.parts[name] * mean
            accumulates = config.gradient_accumulation_steps > 1 and not config.use_tunix_gradient_accumulation
            tokens = jnp.maximum(aux["total_weights"], 1).astype(jnp.float32)
            others = aux["moe_lb_loss"] + sum(aux[slot] for slot in SLOTS.values())
            # where MaxText accumulates, it lowers sums over tokens and divides in the end
            loss = aux["xent_sum"] + others * tokens if accumulates else aux["xent_sum"] / tokens + others
            return loss, aux

        return loss_fn

    def _losses(self, logits: list[Any], outputs: Any, data: Mapping[str, Any]) -> dict[str, Any]:
        """The teacher's losses of each token, [batch, length] in float32, by name."""
        import jax
        from flax import nnx

        if self.teacher is None:
            return {}
        x = self.weighting
        model = nnx.merge(self.teacher.graph, self._weights)
        with _watched(model, x.hidden > 0) as told:
            model(
                decoder_input_tokens=data["inputs"],
                decoder_positions=data["inputs_position"],
                decoder_segment_ids=data["inputs_segmentation"],
                enable_dropout=False,
            )
        found: dict[str, Any] = {}
        if x.distillation:
            found["distillation_loss"] = divergence(logits[0], jax.lax.stop_gradient(told[0]), x.temperature)
        if x.hidden:
            theirs = jax.lax.stop_gradient(_outputs(nnx.pop(model, nnx.Intermediate).to_pure_dict()))
            pairs = [teacher_layer(layer, self.layers, len(theirs)) for layer in range(self.layers)]
            distances = [hidden_distance(outputs[own], theirs[other], x.hidden_kind) for own, other in enumerate(pairs)]
            found["hidden_loss"] = sum(distances) / self.layers
        return found

    def _jit_train_step(
        self, config: Any, model: Any, state: Any, shardings: Any, data_sharding: Any, train_step: Any,
        params_shardings: Any, mesh: Any = None,
    ) -> _Bound:  # fmt: skip
        """MaxText's `jit_train_step`, of a step that is given the teacher's weights besides."""
        import jax

        assert self.teacher is not None

        def step(state: Any, data: Any, weights: Any) -> Any:
            self._weights = weights
            try:
                return train_step(model, config, shardings, params_shardings, state, data)
            finally:
                self._weights = None

        weights = self.teacher.state
        places = (shardings, data_sharding, jax.tree.map(lambda array: array.sharding, weights))
        return _Bound(jax.jit(step, in_shardings=places, out_shardings=(shardings, None), donate_argnums=0), weights)


@dataclass(frozen=True)
class _Bound:
    """A compiled step whose last argument is fixed, as MaxText's trainer uses one."""

    step: Any
    weights: Any

    def __call__(self, state: Any, data: Any) -> Any:
        return self.step(state, data, self.weights)

    def lower(self, state: Any, data: Any) -> Any:
        """For its compiler."""
        return self.step.lower(state, data, self.weights)


def distillation(config: TrainConfig, student: Folder) -> Distillation | None:
    """What the options ask for, None for MaxText's own loss; its teacher is checked, and loaded by `load_teacher`."""
    weighting = Weighting.of(config.losses)
    if config.losses.teacher is not None:
        check_teacher(config.losses, config.input, student, Folder.open(config.losses.teacher))
        unfit = [text for text in config.settings if text.partition("=")[0] in UNFIT]
        if unfit:
            raise UserError(f"--settings {unfit[0]}: not with --teacher, which has a step of its own; leave one out")
    return None if weighting == Weighting() else Distillation(weighting, student.config.num_layers)


def load_teacher(config: TrainConfig) -> LoadedModel | None:
    """The frozen model of `--teacher`, over the devices as the student is. Collective."""
    import jax

    path = config.losses.teacher
    if path is None:
        return None
    own = "bfloat16" if Folder.open(path).config.dtype == "bfloat16" else "float32"
    more = [f"weight_dtype={config.losses.teacher_dtype or own}", *config.settings]
    return load(path, None, config.seq_length, jax.device_count(), more)


@contextmanager
def _watched(model: Any, hidden: bool) -> Iterator[list[Any]]:
    """While active, logits that MaxText's models give are listed; with `hidden` their layers leave their outputs."""
    from flax import nnx

    listed: list[Any] = []

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def noted(*args: Any, **kwargs: Any) -> Any:
            listed.append(call(*args, **kwargs))
            return listed[-1]

        return noted

    def leaving(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def left(layer: Any, *args: Any, **kwargs: Any) -> Any:
            found = call(layer, *args, **kwargs)
            layer.sow(nnx.Intermediate, OUTPUT, found[0])
            return found

        return left

    with ExitStack() as changes:
        kind, layer = type(model), type(model.decoder.layers)
        changes.enter_context(replaced(kind, "__call__", noting(kind.__call__)))
        if hidden:
            changes.enter_context(replaced(layer, "__call__", leaving(layer.__call__)))
        yield listed


def _outputs(intermediates: Any) -> Any:
    """Take what layers have left, [layers, batch, length, hidden], out of what MaxText hands on; None without."""
    left = intermediates.get("decoder", {}).get("layers", {}).pop(OUTPUT, None)
    return None if left is None else left[0]


def divergence(student: Any, teacher: Any, temperature: float) -> Any:
    """See `training.losses.divergence`, of logits [..., vocabulary]."""
    import jax
    import jax.numpy as jnp

    log_q, log_p = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (student, teacher))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1) * temperature**2


def hidden_distance(student: Any, teacher: Any, kind: HiddenLoss) -> Any:
    """See `training.losses.hidden_distance`: of each token, [...], from two layers' outputs [..., hidden]."""
    import jax.numpy as jnp

    a, b = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if kind == "mse":
        return jnp.mean((a - b) ** 2, -1)
    squares = [jnp.maximum(jnp.sum(x * x, -1), SMALLEST_NORM**2) for x in (a, b)]
    return 1 - jnp.sum(a * b, -1) / (jnp.sqrt(squares[0]) * jnp.sqrt(squares[1]))
