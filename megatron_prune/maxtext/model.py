"""MaxText as a library: its configuration, model and sharding for one of our folders. Needs MaxText's environment."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import quiet, reason
from megatron_prune.maxtext.checkpoints import refuse_damaged
from megatron_prune.maxtext.folder import Folder

COORDINATOR = "JAX_COORDINATOR_ADDRESS"
"""The variable that JAX itself reads."""
MULTIPLE = 32
"""Tokens that the length of a batch is a multiple of."""
LANES = 128
"""Of a TPU's vector registers; also the shortest sequence that MaxText gives to its kernel."""
BLOCKS = ("sa_block_q", "sa_block_kv", "sa_block_kv_compute")
"""MaxText's settings of the blocks of its kernel for TPUs."""
QUIET = ("log_config=False", "enable_goodput_recording=False", "monitor_goodput=False")


def prepare() -> None:
    """What MaxText finds where its own main function starts: no cloud services, no hub, absl's flags and logging."""
    os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from absl import flags

    flags.FLAGS(["maxtext"])


def machine() -> list[str]:
    """MaxText settings that this machine asks for: without accelerator plain attention, plain experts and no cluster.

    JAX itself is not asked: hosts of a cluster must have found each other before it looks for devices.
    """
    if accelerated():
        return []
    experts = ["sparse_matmul=False", "megablox=False"]
    return ["hardware=cpu", "attention=dot_product", "skip_jax_distributed_system=True", *experts]


def join() -> None:
    """Find the other hosts, where this is one of several. Before anything asks JAX for its devices.

    TPU hosts know each other; elsewhere JAX_COORDINATOR_ADDRESS (HOST:PORT), JAX_NUM_PROCESSES and JAX_PROCESS_ID say
    who there is.
    """
    import jax

    if not jax.distributed.is_initialized():
        if COORDINATOR in os.environ:
            count, number = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
            jax.distributed.initialize(os.environ[COORDINATOR], count, number)
        elif accelerated("libtpu"):
            jax.distributed.initialize()


def accelerated(*plugins: str) -> bool:
    """Whether this environment has JAX's part for an accelerator (one of these) and may use it."""
    plugins = plugins or ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
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

    def length_multiple(self, length: int) -> int:
        """What the length of sequences must be a multiple of, where the longest has `length` tokens.

        The kernel of TPUs computes in blocks, whose sizes are MaxText's settings; a sequence shorter than a block is
        one block, of a multiple of a register's lanes. Below 128 tokens MaxText takes the plain attention.
        """
        if self.knows_trees or length <= LANES - MULTIPLE:
            return MULTIPLE
        block = math.lcm(*(getattr(self.config, name) for name in BLOCKS))
        return LANES if length <= min(getattr(self.config, name) for name in BLOCKS) else block

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
def replaced(module: Any, name: str, new: Any) -> Iterator[None]:
    """While active, `module.name` is `new`."""
    original = getattr(module, name)
    setattr(module, name, new)
    try:
        yield
    finally:
        setattr(module, name, original)


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

    with replaced(AttentionOp, "generate_attention_mask", mask):
        yield


def load(path: Path, checkpoint: Path | None, length: int, batch: int, settings: Sequence[str] = ()) -> LoadedModel:
    """The model of a folder, with the weights of a run that has trained it if given, for `batch` sequences of `length`.

    `settings`: MaxText's, KEY=VALUE. Its own checks of shapes follow ours.
    """
    prepare()
    folder = Folder.open(path)
    step = folder.step(checkpoint)
    import jax
    from flax import nnx
    from maxtext.utils import model_creation_utils

    join()
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
        config = configured(last_of_each(arguments))
        refuse_damaged(step)
        with quiet():
            model, mesh = model_creation_utils.from_pretrained(config)
    graph, state = nnx.split(model)
    return LoadedModel(config, mesh, graph, state)


def configured(arguments: Sequence[str], initialize: Callable[[list[str]], Any] | None = None) -> Any:
    """MaxText's configuration of KEY=VALUE arguments, after a YAML file; UserError for what it refuses.

    `initialize`: MaxText's function for it, where that has been replaced.
    """
    from maxtext.configs import pyconfig, types

    known = types.MaxTextConfig.model_fields
    unknown = [key for key in (text.partition("=")[0] for text in arguments[1:]) if key not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"--settings {brief(unknown[0])} is no setting of MaxText 0.2.5{hint}; its base.yml has all")
    try:
        return (initialize or pyconfig.initialize)(["", *arguments])
    except (ValueError, TypeError, KeyError, AssertionError, NotImplementedError) as error:
        given: list[Any] = getattr(error, "errors", list)()
        why = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in given) or reason(error)
        raise UserError(f"MaxText refuses its settings ({why}); change --settings") from error


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
