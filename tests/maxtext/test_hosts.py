"""Several hosts and several devices: the same answers, zeros and masks as of one. Two processes find each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_prune.data.requests import Request
from megatron_prune.maxtext.masks import PackedMasks
from megatron_prune.maxtext.score import write_requests
from megatron_prune.model.convert import HFReader
from tests.maxtext import environment
from tests.maxtext.test_maxtext import verb
from tests.models import byte_tokenizer, tiny_llama, words

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
PLAIN = ["dtype=float32", "grain_worker_count=0"]
LAYOUTS = {"one": (1, 1), "hosts": (2, 1), "devices": (1, 4)}
"""Hosts, and devices of each."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, text and requests."""
    environment.python()
    root = tmp_path_factory.mktemp("hosts")
    byte_tokenizer(tiny_llama(root / "dense", vocab_size=257, head_dim=16))
    verb("prune", "--input", root / "dense", "--output", root / "run", "--method", "magnitude", "--target", "2:4")
    verb("export", "--input", root / "run", "--output", root / "sparse", "--format", "maxtext")
    verb("export", "--input", root / "dense", "--output", root / "whole", "--format", "maxtext")
    text = ["--input", words(root / "words.jsonl"), "--tokenizer", root / "dense", "--append-eod", "--workers", 1]
    verb("preprocess", *text, "--output", root / "tokens")
    requests = [Request(list(range(n, 3 * n)), [n, 7]) for n in (5, 20, 40, 41)]
    write_requests(root / "requests.npz", requests)
    return root


@pytest.fixture(scope="module", params=LAYOUTS)
def found(root: Path, request: pytest.FixtureRequest) -> Path:
    """What a layout made of them: answers, a trained run, learned masks."""
    hosts, devices = LAYOUTS[request.param]
    folder = root / request.param
    folder.mkdir()
    data = ["--data", root / "tokens", "--data-cache", folder / "cache", "--seq-length", 32]
    asked = ["--input", root / "sparse", "--requests", root / "requests.npz", "--output", folder / "answers_HOST.npz"]
    learn = ["--input", root / "whole", "--output", folder / "learned", *data, "--global-batch-size", 8, "--steps", 4]
    learn += ["--scale-start", 1000, "--temperature-start", 10, "--lr", "1e-3", "--settings", *PLAIN]
    train = ["--input", root / "sparse", "--output", folder / "trained", *data, "--steps", 3, "--settings", *PLAIN]
    train += [f"per_device_batch_size={8 // hosts // devices}", "learning_rate=1e-3"]
    verify = ["--input", root / "sparse", "--checkpoint", folder / "trained"]
    calls = [["main", "score", *asked], ["main", "learn", *learn], ["main", "train", *train]]
    answers = environment.run(folder, [*calls, ["main", "verify", *verify]], hosts, devices)
    assert all(answer.startswith("0 ") for answer in answers), answers
    return folder


def test_answers_are_those_of_one(root: Path, found: Path) -> None:
    with np.load(root / "one" / "answers_0.npz") as one:
        for host in range(LAYOUTS[found.name][0]):
            with np.load(found / f"answers_{host}.npz") as other:
                assert other["log_likelihood"] == pytest.approx(one["log_likelihood"], abs=1e-4)


def test_masks_are_those_of_one(root: Path, found: Path) -> None:
    config = HFReader(root / "dense").model_config
    one, other = (PackedMasks(folder / "learned" / "masks.npz", config) for folder in (root / "one", found))
    assert sum(int((one[name] != other[name]).sum()) for name in one) == 0


def test_trained_weights_are_those_of_one(root: Path, found: Path) -> None:
    """Within what another order of the sums makes; `verify` has counted the zeros."""
    calls = [["call", "tests.maxtext.doctored", "dump", root / name / "trained", root / f"{name}.npz"]
             for name in ("one", found.name)]  # fmt: skip
    environment.run(root, calls)
    with np.load(root / "one.npz") as one, np.load(root / f"{found.name}.npz") as other:
        assert one.files == other.files
        largest = max(float(np.abs(one[key] - other[key]).max()) for key in one.files if key.startswith("params"))
    assert largest < 1e-4


def test_hosts_must_know_their_number(root: Path) -> None:
    """Two results in one place are prevented before the model is loaded."""
    asked = [root / "sparse", root / "requests.npz", root / "none.npz"]
    (answer,) = environment.run(root, [["call", "tests.maxtext.doctored", "as_the_second_host", *asked]])
    assert "this is host 1 of 2 and was started as number 0" in answer and not (root / "none.npz").exists()
