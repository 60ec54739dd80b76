"""Log-likelihoods of every family by both scorers, against transformers' logits one request at a time."""

from __future__ import annotations

import random
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_prune.data.requests import Request, plan
from megatron_prune.decision.source import open_model
from megatron_prune.errors import UserError
from megatron_prune.evaluation import likelihood
from megatron_prune.evaluation.likelihood import MegatronScorer, TransformersScorer, log_probabilities
from megatron_prune.exporting.padding import in_transformers
from megatron_prune.model.convert import HFReader
from tests.models import LLAMA3_ROPE, TINY_SIZES, tiny_blocks, tiny_model

LONGEST = 24
TOLERANCE = 1e-4


def requests(vocab_size: int) -> list[Request]:
    """Questions with several answers, some too long to be read whole, and texts after nothing but a first token."""
    generator = random.Random(0)

    def words(longest: int) -> list[int]:
        return [generator.randrange(vocab_size) for _ in range(generator.randint(1, longest))]

    questions = [words(28) for _ in range(12)]
    asked = [Request(question, words(6)) for question in questions for _ in range(generator.randint(1, 4))]
    return [*asked, *(Request([1], words(LONGEST)) for _ in range(3))]


def one_by_one(model: torch.nn.Module, asked: list[Request]) -> tuple[np.ndarray, np.ndarray]:
    """What transformers says of each request by itself."""
    values, best = [], []
    for request in asked:
        tokens = torch.tensor([*request.context, *request.continuation])[-(LONGEST + 1) :]
        with torch.no_grad():
            logits = model(tokens[None, :-1]).logits[0, -len(request.continuation) :]
        target = torch.tensor(request.continuation)
        values.append(float(F.log_softmax(logits, -1).gather(1, target[:, None]).sum()))
        best.append(bool((logits.argmax(-1) == target).all()))
    return np.array(values), np.array(best)


@pytest.mark.parametrize("kind", [*TINY_SIZES, "llama3_rope", "blocks"])
def test_both_scorers_say_what_transformers_says(kind: str, tmp_path: Path) -> None:
    if kind == "blocks":
        path = tiny_blocks(tmp_path / "hf", max_position_embeddings=LONGEST)
    else:
        family, more = ("llama", {"rope_parameters": LLAMA3_ROPE}) if kind == "llama3_rope" else (kind, {})
        key = "n_positions" if family == "gpt2" else "max_position_embeddings"
        path = tiny_model(tmp_path / "hf", family, **{key: LONGEST}, **more)
    reader = HFReader(path)
    hf = in_transformers(reader, torch.float32).eval()
    about = reader.model_config
    asked = requests(about.vocab_size)
    expected, best = one_by_one(hf, asked)
    with backend.running(backend.Layout()):
        scorer = MegatronScorer(open_model(path).load(backend.Layout(), "float32"), 100)
        found = [
            TransformersScorer(hf, LONGEST, 100, about.sliding_window, share=about.window_layers is None).score(asked),
            scorer.score(asked),
            scorer.score(asked),  # nothing is left in the model from the first time
        ]
        scorer._place = lambda module, inputs, angles: angles  # type: ignore[method-assign]
        misplaced, _ = scorer.score(asked)
    for total, greedy in found:
        assert np.abs(total - expected).max() < TOLERANCE
        assert greedy.tolist() == best.tolist()
    if kind not in (
        "gpt2",
        "gpt_oss",
        "gemma3_text",
    ):  # without a rotary embedding, or trees: below is the control for positions
        assert np.abs(misplaced - expected).max() > 100 * TOLERANCE
    assert any(not batch.causal for batch in plan(asked, LONGEST, 100))


def test_probabilities_are_those_of_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 11) * 30
    asked, targets = torch.tensor([0, 0, 3, 4]), torch.tensor([2, 10, 0, 7])
    expected = torch.log_softmax(logits.double(), -1)[asked, targets]
    found, best = log_probabilities(logits.clone(), asked, targets)
    assert (found - expected).abs().max() < 1e-4
    assert best.tolist() == (logits.argmax(-1)[asked] == targets).tolist()


def test_of_equal_logits_the_first_is_the_answer() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0]])
    _, best = log_probabilities(logits, torch.tensor([0, 0]), torch.tensor([1, 2]))
    assert best.tolist() == [True, False]


def test_processes_that_ask_different_things_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They would wait for each other's batches for ever."""
    path = tiny_model(tmp_path / "hf", "llama")
    with backend.running(backend.Layout()):
        scorer = MegatronScorer(open_model(path).load(backend.Layout(), "float32"), 100)
        monkeypatch.setattr(likelihood, "from_leader", lambda digest: "another")
        with pytest.raises(UserError, match="the processes read different items"):
            scorer.score([Request([1], [2])])
