"""Log-likelihoods of requests by a model in MaxText: what `evaluate` of the other environment asks for, through files.

The plan is the common one (`evaluation.requests`): requests that begin alike are trees of tokens, with a position and a
mask for each. MaxText's plain attention takes them; the kernels that it has for accelerators know the order of tokens
and no trees, and get rows of one request each. The output layer is computed only where something is asked.

XLA compiles for each shape, so rows come in few lengths, are filled up with empty ones to as many as a batch holds, and
places where something is asked are taken a fixed number at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.data.requests import Batch, Request, Scores, collect, plan
from megatron_prune.errors import UserError
from megatron_prune.maxtext.folder import Folder
from megatron_prune.maxtext.model import MULTIPLE, join, load
from megatron_prune.maxtext.options import ScoreConfig
from megatron_prune.npz import Npz
from megatron_prune.telling import process

MOST_BYTES = 2**36
"""Of the tokens of all requests."""
PLACES = 64
"""Places at which the output layer is computed at once, or as many more as the devices divide."""


def score(config: ScoreConfig) -> None:
    """Answer the requests of `config.requests` in `config.output`; every host is given the same ones and answers."""
    import jax

    requests = read_requests(config.requests)
    join()
    if jax.process_count() > 1 and process() != jax.process_index():
        raise UserError(
            f"this is host {jax.process_index()} of {jax.process_count()} and was started as number {process()}, so "
            "that its result would meet another's: set RANK to its number on each host, as examples/tpu/run.sh does"
        )
    total, greedy = JaxScorer(config).score(requests)
    write_answers(config.output, total, greedy)


class JaxScorer:
    """A model that has been loaded; what it compiles stays for further requests."""

    def __init__(self, config: ScoreConfig) -> None:
        import jax

        join()
        self.longest = Folder.open(config.input).config.max_position_embeddings
        self.tokens_per_batch = config.tokens_per_batch
        self.devices = jax.device_count() if config.rows_multiple is None else config.rows_multiple
        settings = [f"dtype={config.dtype}", *config.settings]
        self.model = load(config.input, config.checkpoint, MULTIPLE, self.devices, settings)
        self._states = jax.jit(self.model.states())
        self._answer = jax.jit(self._answer_places)

    def score(self, requests: Sequence[Request]) -> Scores:
        """See `evaluation.requests.Scorer`. Collective over the hosts."""
        batches = self.plan(requests)
        choices = max((int(np.max(np.bincount(batch.asked))) for batch in batches), default=1)
        with self.model.sharded():
            return collect(len(requests), batches, (self._answers(batch, choices) for batch in batches))

    def plan(self, requests: Sequence[Request]) -> list[Batch]:
        """Batches of lengths that the model's attention takes."""
        model, budget = self.model, self.tokens_per_batch
        return plan(requests, self.longest, budget, multiple=model.length_multiple, share=model.knows_trees)

    def _answers(self, batch: Batch, choices: int) -> tuple[Any, Any]:
        """For each question of a batch the log-probability of its target, and whether none is more probable."""
        from jax.experimental import multihost_utils

        rows = max(batch.tokens.shape[0], self.tokens_per_batch // batch.tokens.shape[1])
        full = batch.with_rows(_up(rows, self.devices))
        ends = full.ends if self.model.knows_trees else None
        states = self._states(self.model.state, full.tokens, full.positions, ends)
        column, step = _among_equals(batch.asked), _up(PLACES, self.devices)
        places = np.zeros(_up(len(batch.places), step), np.int32)
        places[: len(batch.places)] = batch.places
        targets = np.zeros((len(places), choices), np.int32)
        targets[batch.asked, column] = batch.targets
        answers = [
            self._answer(self.model.state, states, places[start : start + step], targets[start : start + step])
            for start in range(0, len(places), step)
        ]
        whole = [
            np.concatenate([multihost_utils.process_allgather(part, tiled=True) for part in parts])
            for parts in zip(*answers, strict=True)
        ]
        log_probability, best = (values[batch.asked, column] for values in whole)
        return log_probability, best

    def _answer_places(self, state: Any, states: Any, places: Any, targets: Any) -> tuple[Any, Any]:
        """For targets `[p, choices]` at places `[p]` of states `[rows, length, hidden]`; see `_answers`."""
        import jax
        import jax.numpy as jnp

        chosen = states.reshape(-1, states.shape[-1])[places]
        logits = self.model.head()(state, chosen[:, None])[:, 0].astype(jnp.float32)
        found = jnp.take_along_axis(logits, targets, axis=-1)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return found - total, logits.argmax(-1, keepdims=True) == targets


def _up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def _among_equals(values: np.ndarray) -> np.ndarray:
    """For each value how many of those before it are equal."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    found = np.empty_like(order)
    found[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return found


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
    with Npz(path, "requests of evaluate") as archive:
        contexts, continuations = (_parts(path, archive, name) for name in ("context", "continuation"))
    if len(contexts) != len(continuations):
        raise UserError(f"{path}: {len(contexts)} contexts and {len(continuations)} continuations; it is damaged")
    pairs = zip(contexts, continuations, strict=True)
    return [Request(context.tolist(), continuation.tolist()) for context, continuation in pairs]


def _parts(path: Path, archive: Npz, name: str) -> list[np.ndarray]:
    """The token ids of each request."""
    whole, lengths = archive.array(name, MOST_BYTES), archive.array(f"{name}_lengths", MOST_BYTES)
    fits = whole.dtype == np.int32 and lengths.dtype == np.int64 and whole.ndim == lengths.ndim == 1
    if not fits or lengths.min(initial=0) < 0 or lengths.sum() != len(whole):
        raise UserError(f"{path}: {name} and its lengths do not fit together; ask evaluate again")
    return np.split(whole, lengths.cumsum()[:-1])


def write_answers(path: Path, total: np.ndarray, greedy: np.ndarray) -> None:
    """Answers, as `JaxScorer.score` gives them, as one .npz."""
    np.savez(path, log_likelihood=total, greedy=greedy)


def read_answers(path: Path) -> Scores:
    """Inverse of `write_answers`."""
    with Npz(path, "answers of maxtext's score") as archive:
        total, greedy = (archive.array(name, MOST_BYTES) for name in ("log_likelihood", "greedy"))
    if total.dtype.kind != "f" or greedy.dtype != np.bool_ or total.shape != greedy.shape or total.ndim != 1:
        raise UserError(f"{path}: {total.dtype} {list(total.shape)} and {greedy.dtype} are no answers; score again")
    return total.copy(), greedy.copy()
