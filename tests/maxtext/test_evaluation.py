"""`evaluate` of a model for MaxText: the answers of the same model in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prune.__main__ import main
from megatron_prune.data.requests import Request
from megatron_prune.evaluation.likelihood import TransformersScorer
from megatron_prune.exporting.padding import in_transformers
from megatron_prune.maxtext.score import write_requests
from megatron_prune.model.convert import HFReader
from tests.maxtext import environment
from tests.models import byte_tokenizer, tiny_llama, words
from tests.tasks import write_tasks
from tests.unit.evaluation.test_tasks import NAMES, largest_difference, read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in both forms, and what both answered."""
    environment.python()
    root = tmp_path_factory.mktemp("evaluation")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257, max_position_embeddings=128))
    write_tasks(root / "tasks")
    (root / "text.txt").write_text(words(root / "words.jsonl", documents=4).read_text())
    verb("export", "--input", root / "hf", "--output", root / "maxtext", "--format", "maxtext")
    for model in ("hf", "maxtext"):
        tasks = ["--tasks", *NAMES, "--tasks-folder", root / "tasks", "--dtype", "float32"]
        verb("evaluate", "--input", root / model, *tasks, "--samples", root / f"{model}.jsonl")
        text = ["--text", root / "text.txt", "--window", 64, "--windows", 8]
        verb("evaluate", "--input", root / model, *text, "--output", root / f"{model}.json")
    return root


def verb(*words: object) -> None:
    """Run a verb that must succeed."""
    assert main([str(word) for word in words]) == 0, words


def test_answers_to_tasks_are_equal(root: Path) -> None:
    found, expected = (read(root / f"{model}.jsonl") for model in ("maxtext", "hf"))
    assert len(found) > 12 and largest_difference(found, [line["log_likelihoods"] for line in expected]) < 1e-3
    assert [line["scores"].keys() for line in found] == [line["scores"].keys() for line in expected]


def test_perplexities_are_equal(root: Path) -> None:
    found, expected = (json.loads((root / f"{model}.json").read_text()) for model in ("maxtext", "hf"))
    assert found["kind"] == "maxtext" and found["text"] == expected["text"]
    assert found["predicted_tokens"] == expected["predicted_tokens"] == 8 * 63
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.nightly
def test_trees_on_two_devices_and_rows_of_one_request(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without trees gets each request by itself; branches, repeated places and empty rows change no answer."""
    question = list(range(20, 50))
    requests = [
        Request([*question, n], [choice, 7, 8][: 1 + choice % 3]) for n in (1, 2, 3) for choice in range(60, 66)
    ]
    requests += [Request(list(range(n, 3 * n)), [n]) for n in (5, 20, 40)]
    model = in_transformers(HFReader(root / "hf"), torch.float32).eval()
    total, greedy = TransformersScorer(model, 128, 64).score(requests)
    write_requests(root / "requests.npz", requests)
    words = ["main", "score", "--input", root / "maxtext", "--requests", root / "requests.npz"]
    words += ["--tokens-per-batch", 128]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    ways = {"trees": "dot_product", "rows": "autoselected"}
    calls = [[*words, "--output", root / f"{name}.npz", "--settings", f"attention={way}"] for name, way in ways.items()]
    assert [answer[:2] for answer in environment.run(root, calls)] == ["0 ", "0 "]
    for name in ways:
        with np.load(root / f"{name}.npz") as found:
            assert found["log_likelihood"] == pytest.approx(total, abs=1e-4), name
            assert found["greedy"].tolist() == greedy.tolist()


@pytest.mark.nightly
def test_lengths_are_those_that_a_tpus_attention_takes(root: Path) -> None:
    """Compiled for TPUs, as MaxText chooses there; controls are lengths that were asked for before."""
    byte_tokenizer(tiny_llama(root / "long_hf", vocab_size=257, max_position_embeddings=2048, num_hidden_layers=1))
    verb("export", "--input", root / "long_hf", "--output", root / "long", "--format", "maxtext")
    (answer,) = environment.run(root, [["call", "tests.maxtext.kernels", "lengths", root / "long", 2047]])
    found = json.loads(answer)
    assert found["planned"] == [32, 64, 96, 128, 256, 384, 512, 1024, 1536, 2048]
    assert set(found["refused"]) == {"160", "544"}


def test_settings_are_handed_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", str(root / "text.txt"), "--window", "64", "--windows", "2"]
    assert main(["evaluate", "--input", str(root / "maxtext"), *text, "--settings", "attentoin=flash"]) == 2
    assert "is no setting of MaxText 0.2.5 (did you mean attention?)" in capsys.readouterr().err
    for flag, value in (("--settings", "attention=flash"), ("--checkpoint", "run")):
        assert main(["evaluate", "--input", str(root / "hf"), *text, flag, value]) == 2
        assert f"{flag} was given and {root / 'hf'} is no model for MaxText" in capsys.readouterr().err
