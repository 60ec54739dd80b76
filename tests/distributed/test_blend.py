"""Preprocessed text and blends under data parallelism: the same windows, so the same losses, as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import DP2, ONE, TP2, Layout, launch, must_pass
from tests.models import byte_tokenizer, tiny_llama, words
from tests.runs import curve

pytestmark = pytest.mark.distributed


def learn(root: Path, layout: Layout) -> list[str]:
    """Four steps of four windows on a blend: two accumulated micro-batches a replica with two of them, four alone."""
    places = ["--input", root / "model", "--output", root / layout.name, "--data-cache", root / f"cache-{layout.name}"]
    data = ["--data", "0.75", root / "a", "0.25", root / "b", "--data-split", "80,20", "--eval-windows", "4"]
    steps = ["--seq-length", "32", "--global-batch-size", "4", "--train-iters", "4", "--lr", "1e-2", "--min-lr", "1e-3"]
    command = ["prune", "--method", "maskllm", "--target", "2:4", *places, *data, *steps, *layout.flags()]
    return [str(word) for word in command]


def test_every_layout_reads_the_same_windows(tmp_path: Path) -> None:
    byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    first = [["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "model")]]
    for name, seed in (("a", 1), ("b", 2)):
        text = words(tmp_path / f"{name}.jsonl", 12, seed=seed)
        more = ["--tokenizer", str(tmp_path / "hf"), "--append-eod", "--workers", "2"]
        first.append(["preprocess", "--input", str(text), "--output", str(tmp_path / name), *more])
    must_pass(launch(1, [*first, learn(tmp_path, ONE)], tmp_path / "commands"))
    must_pass(launch(2, [learn(tmp_path, DP2), learn(tmp_path, TP2)], tmp_path / "commands"))
    for name, count in (("loss", 4), ("eval_loss", 2)):
        one = curve(tmp_path / ONE.name, name)
        assert len(one) == count
        assert curve(tmp_path / DP2.name, name) == pytest.approx(one, rel=1e-5)
        assert curve(tmp_path / TP2.name, name) == pytest.approx(one, rel=1e-5)
    assert len(set(curve(tmp_path / ONE.name, "loss"))) == 4, "steps that read the same windows prove nothing"
