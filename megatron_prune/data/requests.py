"""Requests for log-likelihoods -> batches in which what requests share is computed once. No torch, no jax.

A request asks for the log-probability of a continuation after a context, both as tokens, by the rules of lm-eval's own
Hugging Face model: what is too long loses tokens on the left, and the last token is only predicted, never read.

Requests that begin alike (the choices of one question, questions after the same examples) become one row: a tree of
tokens in the order of a walk through it, each with its position in its own request and with the place where the tokens
after it end. A token sees those before it whose end it has not reached, so every path through the tree computes what
its request alone would:

    a b c d      tokens     a b c d x y        `a b` is computed once
    a b x y      positions  0 1 2 3 2 3
                 ends       6 6 4 4 6 6        x (at 4) sees a, b and itself: c and d end at 4

Rows go into batches by length, longest first, so that there is little padding. `plan` makes the batches, any back end
computes one answer for each question of a batch, and `collect` puts them back into the order of the requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

PAIR_COST = 1e-3
"""What attention between two tokens costs, where the rest of a layer's work on one token is 1: SmolLM2-135M on a CPU.

Larger models have less of it. It decides only whether two requests with a short common beginning share a row.
"""


@dataclass(frozen=True)
class Request:
    """Tokens to read, and those to be predicted after them: both at least one."""

    context: Sequence[int]
    continuation: Sequence[int]

    def inputs(self, longest: int) -> tuple[int, ...]:
        """What a model that reads `longest` tokens gets; its last outputs predict the continuation."""
        if not self.context or not self.continuation or len(self.continuation) > longest:
            raise ValueError(
                f"{len(self.context)} tokens of context and {len(self.continuation)} of continuation were given; "
                f"allowed: at least one of each, and a continuation of at most {longest}, which the model can read"
            )
        return (*self.context, *self.continuation)[-(longest + 1) :][:-1]


Scores = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""For each request its log-likelihood in nats, and whether every token of it is the most probable one."""


class Scorer(Protocol):
    """A model that answers requests, whatever computes it."""

    longest: int
    """Tokens that it reads."""

    def score(self, requests: Sequence[Request]) -> Scores:
        """The same on every process. Collective."""
        ...


@dataclass
class Row:
    """Requests that share a beginning, as one tree of tokens."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """For each token the number of the first that does not come after it on any path."""
    questions: list[tuple[int, int, int]] = field(default_factory=list)
    """Place of a token, the token that should follow it, number of the request that asks."""
    path: list[int] = field(default_factory=list)
    """Places of the tokens of the newest request."""

    def add(self, number: int, inputs: Sequence[int], targets: Sequence[int], shared: int) -> None:
        """A request whose first `shared` inputs are those of the request before; requests come in sorted order."""
        for place in self.path[shared:]:
            self.ends[place] = len(self.tokens)
        first = len(self.tokens)
        self.tokens += inputs[shared:]
        self.positions += range(shared, len(inputs))
        self.ends += [0] * (len(inputs) - shared)
        self.path = [*self.path[:shared], *range(first, len(self.tokens))]
        self.questions += zip(self.path[-len(targets) :], targets, [number] * len(targets), strict=True)

    def close(self) -> Row:
        """The row, complete."""
        for place in self.path:
            self.ends[place] = len(self.tokens)
        return self


@dataclass(frozen=True)
class Batch:
    """Rows of one length, padded at their ends, and the questions to answer. All arrays are int32 but `causal`."""

    tokens: NDArray[np.int32]
    """`[rows, length]`; 0 where padded."""
    positions: NDArray[np.int32]
    """`[rows, length]`: of each token in its own request."""
    ends: NDArray[np.int32]
    """`[rows, length]`: token `j` is seen by itself and by those after it that are before `ends[j]`."""
    places: NDArray[np.int32]
    """`[p]`: `row * length + column` of the tokens after which something is asked, ascending, each once."""
    asked: NDArray[np.int32]
    """`[q]`: for each question the number of its place among `places`."""
    targets: NDArray[np.int32]
    """`[q]`: the token whose log-probability is asked."""
    owners: NDArray[np.int32]
    """`[q]`: the request that asks."""
    causal: bool
    """No row branches: plain causal attention and positions 0, 1, 2, ... give the same answers."""

    def visible(self, window: int | None = None) -> NDArray[np.bool_]:
        """`[rows, length, length]`, True where a token (second index) sees another, no further back than `window`."""
        number = np.arange(self.tokens.shape[1])
        seen = (number[:, None] >= number) & (number[:, None] < self.ends[:, None, :])
        if window is not None:
            seen &= self.positions[:, :, None] - self.positions[:, None, :] < window
        return seen

    def with_rows(self, rows: int) -> Batch:
        """The same batch with empty rows after its own."""
        more = ((0, rows - self.tokens.shape[0]), (0, 0))
        ends = np.pad(self.ends, more)
        ends[self.ends.shape[0] :] = np.arange(1, ends.shape[1] + 1)
        return replace(self, tokens=np.pad(self.tokens, more), positions=np.pad(self.positions, more), ends=ends)


def plan(
    requests: Sequence[Request],
    longest: int,
    tokens_per_batch: int,
    *,
    pair_cost: float = PAIR_COST,
    multiple: int | Callable[[int], int] = 1,
    share: bool = True,
) -> list[Batch]:
    """Batches that answer all requests, in the order in which they are best computed: longest rows first.

    `longest`: tokens that the model reads; `tokens_per_batch`: rows x length, exceeded only by a single row, at most
    twice as long as a request; `multiple`: what the length of a batch must be a multiple of, which may depend on the
    length of its longest row; `share`: compute common beginnings once.
    """
    rows = sorted(_rows(requests, longest, tokens_per_batch, pair_cost, share), key=lambda row: -len(row.tokens))
    batches, start = [], 0
    while start < len(rows):
        longest_row = len(rows[start].tokens)
        unit = multiple if isinstance(multiple, int) else multiple(longest_row)
        length = -(-longest_row // unit) * unit
        count = max(1, tokens_per_batch // length)
        batches.append(_batch(rows[start : start + count], length))
        start += count
    return batches


def _rows(requests: Sequence[Request], longest: int, limit: int, pair_cost: float, share: bool) -> Iterable[Row]:
    """Sorted requests that begin alike in one row, as long as `_worth_sharing` says so."""
    inputs = [request.inputs(longest) for request in requests]
    row, last = Row(), -1
    for number in sorted(range(len(requests)), key=inputs.__getitem__):
        shared = _common(inputs[last], inputs[number]) if share and row.tokens else 0
        if row.tokens and not _worth_sharing(len(row.tokens), len(inputs[number]), shared, limit, pair_cost):
            yield row.close()
            row, shared = Row(), 0
        row.add(number, inputs[number], requests[number].continuation, shared)
        last = number
    if row.tokens:
        yield row.close()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the beginning that two sequences share."""
    shortest = min(len(one), len(other))
    return next((place for place in range(shortest) if one[place] != other[place]), shortest)


def _worth_sharing(row: int, request: int, shared: int, limit: int, pair_cost: float) -> bool:
    """Whether a request costs less in a row of `row` tokens than by itself; attention is quadratic in a row.

    Rows stay within `limit` tokens, those of longer requests within twice a request.
    """
    together = row + request - shared
    pairs = together**2 - row**2 - request**2
    return together <= max(limit, 2 * request) and shared > pair_cost * pairs


def _batch(rows: Sequence[Row], length: int) -> Batch:
    shape = (len(rows), length)
    tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    ends = np.tile(np.arange(1, length + 1, dtype=np.int32), (len(rows), 1))
    for number, row in enumerate(rows):
        size = len(row.tokens)
        tokens[number, :size], positions[number, :size], ends[number, :size] = row.tokens, row.positions, row.ends
    questions = np.array(
        [
            (number * length + place, target, owner)
            for number, row in enumerate(rows)
            for place, target, owner in row.questions
        ],
        dtype=np.int32,
    )
    places, asked = np.unique(questions[:, 0], return_inverse=True)
    causal = all(end == len(row.tokens) for row in rows for end in row.ends)
    return Batch(tokens, positions, ends, places, asked.astype(np.int32), questions[:, 1], questions[:, 2], causal)


def collect(
    count: int, batches: Sequence[Batch], answers: Iterable[tuple[NDArray[np.floating], NDArray[np.bool_]]]
) -> Scores:
    """Log-likelihood `[count]` of every request, and whether it is what the model would say by itself.

    `answers` are those of the batches, in their order: for each question the log-probability `[q]` of its target and
    whether no token is more probable `[q]`.
    """
    total, missed = np.zeros(count), np.zeros(count)
    for batch, (log_probability, is_best) in zip(batches, answers, strict=True):
        total += np.bincount(batch.owners, log_probability, minlength=count)
        missed += np.bincount(batch.owners, ~is_best, minlength=count)
    return total, missed == 0
