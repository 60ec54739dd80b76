"""The planner: every way of packing requests asks a model the same questions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.data.requests import Batch, Request, collect, plan

LONGEST = 7
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9)
asked = st.lists(st.builds(Request, tokens, tokens.map(lambda words: words[:LONGEST])), min_size=1, max_size=12)


def score(seen: tuple[tuple[int, int], ...], target: int) -> tuple[float, bool]:
    """A language model: any function of the tokens that a token sees, with their positions, and of the target."""
    value = hash((seen, target)) % 1000
    return -value / 100, value < 700


def answer(batch: Batch, window: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    visible = batch.visible(window)
    found = []
    for question, target in enumerate(batch.targets):
        row, column = divmod(int(batch.places[batch.asked[question]]), batch.tokens.shape[1])
        seen = np.flatnonzero(visible[row, column])
        found.append(score(tuple((int(batch.positions[row, k]), int(batch.tokens[row, k])) for k in seen), int(target)))
    return np.array([value for value, _ in found]), np.array([best for _, best in found])


def alone(request: Request, window: int | None = None) -> tuple[float, bool]:
    inputs = (list(request.context) + list(request.continuation))[-(LONGEST + 1) :][:-1]
    first = len(inputs) - len(request.continuation)
    seen = [
        tuple((k, inputs[k]) for k in range(max(0, end - (window or end)), end))
        for end in range(first + 1, len(inputs) + 1)
    ]
    values = [score(tuple(view), target) for view, target in zip(seen, request.continuation, strict=True)]
    return sum(value for value, _ in values), all(best for _, best in values)


@settings(max_examples=200, deadline=None)
@given(
    requests=asked,
    budget=st.integers(1, 40),
    multiple=st.integers(1, 4),
    pair_cost=st.sampled_from([0.0, 1e-3, 1.0]),
    window=st.sampled_from([None, 2, 3]),
    share=st.booleans(),
)
def test_every_request_is_answered_as_if_it_were_alone(
    requests: list[Request], budget: int, multiple: int, pair_cost: float, window: int | None, share: bool
) -> None:
    batches = plan(requests, LONGEST, budget, pair_cost=pair_cost, multiple=multiple, share=share)
    total, greedy = collect(len(requests), batches, [answer(batch, window) for batch in batches])
    expected = [alone(request, window) for request in requests]
    assert total == pytest.approx([value for value, _ in expected])
    assert greedy.tolist() == [best for _, best in expected]
    for batch in batches:
        rows, length = batch.tokens.shape
        assert length % multiple == 0
        assert rows * length <= budget or rows == 1


@settings(max_examples=50, deadline=None)
@given(requests=asked, more=st.integers(0, 3))
def test_empty_rows_change_no_answer(requests: list[Request], more: int) -> None:
    for batch in plan(requests, LONGEST, 64):
        wide = batch.with_rows(batch.tokens.shape[0] + more)
        assert wide.tokens.shape[0] == batch.tokens.shape[0] + more
        assert answer(wide)[0].tolist() == answer(batch)[0].tolist()
        assert wide.visible().any(-1).all()  # attention over nothing is not a number


def test_choices_of_a_question_share_its_tokens() -> None:
    question = list(range(100, 150))
    (batch,) = plan([Request(question, [choice, 7, 8]) for choice in (1, 2, 3, 4)], 512, 4096)
    # the question, and of each choice all but the last token; the first is predicted by the question's last
    assert batch.tokens.shape == (1, 50 + 4 * 2)
    assert batch.positions[0, 50:].tolist() == [50, 51] * 4
    assert len(batch.places) == 1 + 4 * 2 and len(batch.targets) == 4 * 3
    assert not batch.causal


def test_one_token_choices_are_read_from_one_place() -> None:
    (batch,) = plan([Request([5, 6, 7], [1]), Request([5, 6, 7], [2])], 512, 4096)
    assert batch.tokens.tolist() == [[5, 6, 7]] and batch.places.tolist() == [2] and batch.causal


def test_a_short_common_beginning_does_not_make_long_rows() -> None:
    texts = [[1, *range(100 * n, 100 * n + 90)] for n in range(1, 9)]
    batches = plan([Request(text, [3]) for text in texts], 512, 4096)
    assert [batch.tokens.shape for batch in batches] == [(8, 91)]


def test_questions_after_the_same_examples_share_them() -> None:
    examples = list(range(1000, 1200))
    requests = [Request([*examples, n, n + 1, n + 2], [choice]) for n in range(0, 30, 3) for choice in (1, 2)]
    for budget in (4096, 100):  # also where a request alone is more than a batch should be
        (batch,) = plan(requests, 512, budget)
        assert batch.tokens.size == 200 + 10 * 3


def test_rows_of_a_batch_are_of_similar_length() -> None:
    requests = [Request(range(size), [1]) for size in (3, 90, 4, 88, 5)]
    batches = plan(requests, 512, 180, share=False)
    assert [batch.tokens.shape for batch in batches] == [(2, 90), (3, 5)]


@pytest.mark.parametrize(
    ("context", "continuation"), [([], [1]), ([1], []), ([1], [1] * 8)], ids=["nothing before", "nothing asked", "long"]
)
def test_what_no_model_can_answer_is_an_error(context: list[int], continuation: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one of each, and a continuation of at most 7"):
        plan([Request(context, continuation)], 7, 64)
