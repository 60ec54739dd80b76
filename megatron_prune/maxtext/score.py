"""Log-likelihoods of requests by a model in MaxText: what `evaluate` of the other environment asks for, through files.

The plan is the common one (`evaluation.requests`), in rows of one request each: MaxText's attention knows the order of
tokens and no trees. Rows come in few lengths and are filled up with empty ones to as many as a batch holds, so that
XLA compiles once for each length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.evaluation.requests import Batch, Request, collect, plan
from megatron_prune.maxtext.folder import Folder
from megatron_prune.maxtext.model import LoadedModel, load
from megatron_prune.maxtext.options import ScoreConfig

MULTIPLE = 64
"""Tokens that the length of a batch is a multiple of."""


def score(config: ScoreConfig) -> None:
    """Answer the requests of `config.requests` in `config.output`."""
    import jax

    requests = read_requests(config.requests)
    longest = Folder.open(config.input).config.max_position_embeddings
    devices = jax.local_device_count() if config.rows_multiple is None else config.rows_multiple
    batches = plan(requests, longest, config.tokens_per_batch, multiple=MULTIPLE, share=False)
    settings = [f"dtype={config.dtype}", *config.settings]
    model = load(config.input, config.checkpoint, MULTIPLE, devices, settings)
    total, greedy = collect(len(requests), batches, _answers(model, batches, config.tokens_per_batch, devices))
    if jax.process_index() == 0:
        np.savez(config.output, log_likelihood=total, greedy=greedy)


def write_requests(path: Path, requests: Sequence[Request]) -> None:
    """Requests as one .npz."""
    arrays: dict[str, Any] = {}
    for name in ("context", "continuation"):
        parts = [np.asarray(getattr(request, name), np.int32) for request in requests]
        arrays[name] = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        arrays[f"{name}_lengths"] = np.array([len(part) for part in parts], np.int64)
    np.savez(path, **arrays)


def read_requests(path: Path) -> list[Request]:
    """Inverse of `write_requests`."""
    with np.load(path, allow_pickle=False) as archive:
        contexts, continuations = (
            np.split(archive[name], archive[f"{name}_lengths"].cumsum()[:-1]) for name in ("context", "continuation")
        )
    pairs = zip(contexts, continuations, strict=True)
    return [Request(context.tolist(), continuation.tolist()) for context, continuation in pairs]


def _answers(model: LoadedModel, batches: Sequence[Batch], budget: int, devices: int) -> Iterator[tuple[Any, Any]]:
    """For each question of each batch the log-probability of its target, and whether none is more probable."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import multihost_utils

    forward = model.forward()

    @jax.jit
    def answer(state: Any, tokens: Any, targets: Any) -> Any:
        logits = forward(state, tokens).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == targets

    with model.sharded():
        for batch in batches:
            length = batch.tokens.shape[1]
            rows = max(batch.tokens.shape[0], budget // length)
            tokens = batch.with_rows(-(-rows // devices) * devices).tokens
            targets = np.zeros_like(tokens)
            targets.reshape(-1)[batch.places[batch.asked]] = batch.targets
            answers = answer(model.state, tokens, targets)
            found = (multihost_utils.process_allgather(values, tiled=True).reshape(-1) for values in answers)
            log_probability, best = (values[batch.places[batch.asked]] for values in found)
            yield log_probability, best
