"""MaxText as a library: its configuration, model and sharding for one of our folders. Needs MaxText's environment."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.errors import UserError
from megatron_prune.maxtext.folder import Folder

QUIET = ("log_config=False", "enable_goodput_recording=False", "monitor_goodput=False")


def prepare() -> None:
    """What MaxText finds where its own main function starts: no cloud services, no hub, absl's flags and logging."""
    os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from absl import flags

    flags.FLAGS(["maxtext"])


def machine() -> list[str]:
    """MaxText settings that this machine asks for: without accelerator the plain attention and no cluster.

    JAX itself is not asked: hosts of a cluster must have found each other before it looks for devices.
    """
    if accelerated():
        return []
    return ["hardware=cpu", "attention=dot_product", "skip_jax_distributed_system=True"]


def accelerated() -> bool:
    """Whether this environment has JAX's part for an accelerator and may use it."""
    plugins = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    return os.environ.get("JAX_PLATFORMS") != "cpu" and any(importlib.util.find_spec(name) for name in plugins)


@dataclass
class LoadedModel:
    """A model in MaxText, its weights sharded over the devices as MaxText's configuration says."""

    config: Any
    """MaxText's."""
    mesh: Any
    graph: Any
    state: Any

    @contextmanager
    def sharded(self) -> Any:
        """Where computations with the model belong."""
        from flax.linen import partitioning

        with self.mesh, partitioning.axis_rules(self.config.logical_axis_rules):
            yield

    @property
    def knows_trees(self) -> bool:
        """Whether `states` may be given ends: the plain attention has a mask, the kernels of accelerators have none."""
        return self.config.attention == "dot_product"

    def states(self) -> Callable[[Any, Any, Any, Any], Any]:
        """A pure function of the state, tokens, positions and ends, all [batch, length]: [batch, length, hidden].

        States are those before the final norm. Ends are those of `evaluation.requests.Batch`, or None where no row
        branches.
        """
        import jax.numpy as jnp
        from flax import nnx

        def states(state: Any, tokens: Any, positions: Any, ends: Any = None) -> Any:
            model = nnx.merge(self.graph, state)
            with _segments_are_ends() if ends is not None else nullcontext():
                outputs = model.decoder(
                    shared_embedding=model.token_embedder,
                    decoder_input_tokens=tokens,
                    decoder_positions=positions,
                    decoder_segment_ids=jnp.ones_like(tokens) if ends is None else ends,
                    deterministic=True,
                )
            return outputs[1]  # beside the logits, which XLA leaves out because nobody uses them

        return states

    def head(self) -> Callable[[Any, Any], Any]:
        """A pure function of the state and states [batch, length, hidden]: logits [batch, length, vocabulary]."""
        from flax import nnx

        def head(state: Any, states: Any) -> Any:
            model = nnx.merge(self.graph, state)
            return model.logits_from_hidden_states_for_vocab_tiling(states, True, "train")

        return head

    def forward(self) -> Callable[[Any, Any], Any]:
        """A pure function of the state and tokens [batch, length]: logits [batch, length, vocabulary]."""
        import jax.numpy as jnp
        from flax import nnx

        def logits(state: Any, tokens: Any) -> Any:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
            model = nnx.merge(self.graph, state)
            return model(
                decoder_input_tokens=tokens,
                decoder_positions=positions,
                decoder_segment_ids=jnp.ones_like(tokens),
                enable_dropout=False,
            )

        return logits


@contextmanager
def _segments_are_ends() -> Any:
    """While a computation is traced MaxText's plain attention reads the numbers of segments as ends.

    A token sees itself and those before it whose end it has not reached, in place of those of its own segment.
    """
    import jax.numpy as jnp
    from maxtext.layers.attention_op import DEFAULT_MASK_VALUE, AttentionOp

    def mask(_self: Any, query: Any, key: Any, ends: Any, *_: Any, **__: Any) -> Any:
        here, there = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])[None, :]
        seen = (here >= there) & (here < ends[:, None, :])
        return jnp.where(seen, 0.0, DEFAULT_MASK_VALUE)[:, None, None]

    usual = AttentionOp.generate_attention_mask
    AttentionOp.generate_attention_mask = mask
    try:
        yield
    finally:
        AttentionOp.generate_attention_mask = usual


def load(path: Path, checkpoint: Path | None, length: int, batch: int, settings: Sequence[str] = ()) -> LoadedModel:
    """The model of a folder, with the weights of a run that has trained it if given, for `batch` sequences of `length`.

    `settings`: MaxText's, KEY=VALUE. Its own checks of shapes follow ours.
    """
    prepare()
    folder = Folder.open(path)
    step = folder.step(checkpoint)
    import jax
    from flax import nnx
    from maxtext.configs import pyconfig
    from maxtext.utils import model_creation_utils

    if accelerated() and not jax.distributed.is_initialized():
        jax.distributed.initialize()
    devices = jax.device_count()
    if batch % devices:
        raise UserError(f"a batch of {batch} was given; allowed: a multiple of the {devices} devices")
    with tempfile.TemporaryDirectory() as scratch:  # MaxText asks where its outputs go; loading has none
        arguments = [
            *folder.arguments(),
            f"load_parameters_path={step.resolve() / 'items'}",
            f"max_target_length={length}",
            f"per_device_batch_size={batch // devices}",
            "run_name=read",
            f"base_output_directory={scratch}",
            "enable_checkpointing=True",
            *QUIET,
            *machine(),
            *settings,
        ]
        config = pyconfig.initialize(["", *last_of_each(arguments)])
        model, mesh = model_creation_utils.from_pretrained(config)
    graph, state = nnx.split(model)
    return LoadedModel(config, mesh, graph, state)


def last_of_each(arguments: Sequence[str]) -> list[str]:
    """The same, of settings given twice the last: MaxText refuses them."""
    found = {argument.partition("=")[0]: argument for argument in arguments}
    return list(found.values())


def logits(path: Path, tokens: np.ndarray, settings: Sequence[str] = ("dtype=float32",)) -> np.ndarray:
    """Logits of tokens [batch, length], in float32."""
    import jax

    model = load(path, None, tokens.shape[1], len(tokens), settings)
    with model.sharded():
        return np.asarray(jax.jit(model.forward())(model.state, tokens.astype(np.int32)), np.float32)
