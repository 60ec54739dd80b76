"""Replicas of a model share the writing of a checkpoint, and what they write is what one process would have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import DP2, ONE, Layout, launch, must_pass, with_nightly
from tests.models import byte_tokenizer, tiny_llama, words
from tests.runs import curve, reopened

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS, SAVED = 4, 2


def train(root: Path, output: str, layout: Layout, *more: str) -> list[str]:
    """Four steps with a checkpoint in the middle."""
    places = ["--input", str(root / "model"), "--output", str(root / output), "--data", str(root / "words.jsonl")]
    sizes = ["--seq-length", "32", "--global-batch-size", "2", "--train-iters", str(STEPS), "--lr", "1e-3"]
    return ["train", *places, *sizes, "--save-interval", str(SAVED), "--keep-checkpoints", "9", *layout.flags(), *more]


def written(folder: Path) -> list[int]:
    """Bytes of tensors that each process wrote."""
    sizes = [0, 0]
    for part in folder.glob("__*.distcp"):
        sizes[int(part.name.split("_")[2])] += part.stat().st_size
    return sizes


@pytest.mark.parametrize("shared", with_nightly([False, True], bool))
def test_replicas_share_the_writing(tmp_path: Path, shared: bool) -> None:
    """A distributed optimizer's state is in one place alone and written from there; all else is shared out.

    One process goes on from either, with the curve of the two left alone.
    """
    byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257, num_hidden_layers=4))
    words(tmp_path / "words.jsonl")
    made = ["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "model")]
    more = ("--use-distributed-optimizer",) if shared else ()
    must_pass(launch(2, [made, train(tmp_path, "run", DP2, *more)], tmp_path / "work"))
    first, second = written(tmp_path / "run" / "checkpoints" / f"step_{SAVED:07d}")
    weights = written(tmp_path / "run" / "weights" / "weights")
    assert 0.5 < weights[0] / weights[1] < 2
    assert second == 0 or 0.5 < first / second < 2
    assert (second == 0) == shared
    copy = reopened(tmp_path / "run", tmp_path / "copy", SAVED)
    must_pass(launch(1, [[*train(tmp_path, "copy", ONE), "--resume"]], tmp_path / "work"))
    assert curve(copy) == pytest.approx(curve(tmp_path / "run"), rel=1e-5)
