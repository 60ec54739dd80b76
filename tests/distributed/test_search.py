"""A search that is killed in its database, and again between generations, comes to the same model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.decision.trimming import Trim
from megatron_prune.log import read_metrics
from tests.distributed.launch import ONE, TP2_SP, Layout, launch, must_pass
from tests.models import byte_tokenizer, tiny_llama, words

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
GENERATIONS = 40


def command(root: Path, name: str, layout: Layout = ONE, *more: str) -> list[str]:
    """A search over levels of a small model."""
    options = {
        "--input": str(root / "hf"),
        "--output": str(root / name),
        "--target": "parameters=150000",
        "--calibration": str(root / "words.jsonl"),
        "--calibration-samples": "7",
        "--calibration-seq-length": "32",
        "--levels": "4",
        "--generations": str(GENERATIONS),
        "--offspring": "4",
        "--survivors": "2,1",
        "--fitness-tokens": "64,128",
        "--training-tokens": "0",
    }
    pairs = [word for pair in options.items() for word in pair]
    return ["prune", "--method", "darwinlm", *pairs, *layout.flags(), *more]


def kill_when(verb: list[str], there: Callable[[], bool]) -> None:
    """Start a verb and kill it, with no chance to save anything, once something is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "megatron_prune", *verb], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not there():
            assert process.poll() is None, "the search ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()


def history(run: Path) -> list[list[int]]:
    """The parents of all generations."""
    return [record["parent"] for record in read_metrics(run)]


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    words(tmp_path / "words.jsonl")
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=257)
    byte_tokenizer(tiny_llama(tmp_path / "hf", **sizes))
    must_pass(launch(1, [command(tmp_path, "whole")], tmp_path / "commands"))
    run = tmp_path / "killed"
    kill_when(command(tmp_path, "killed"), lambda: any((run / "database").glob("*.mlp.safetensors")))
    made = {file: file.stat().st_mtime_ns for file in (run / "database").glob("*.safetensors")}
    again = command(tmp_path, "killed", ONE, "--resume")
    metrics = run / "metrics.jsonl"
    kill_when(again, lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    assert 3 <= len(history(run)) < GENERATIONS
    must_pass(launch(2, [command(tmp_path, "killed", TP2_SP, "--resume")], tmp_path / "commands"))
    assert history(run) == history(tmp_path / "whole") and len(history(run)) == GENERATIONS
    assert Trim.load(run / "decision").units == Trim.load(tmp_path / "whole" / "decision").units
    assert all(file.stat().st_mtime_ns == at for file, at in made.items())
