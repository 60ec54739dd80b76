"""A mask-learning run that is killed goes on as if nothing had happened, also in another layout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_prune.apply.decision import Masks
from tests.distributed.launch import ONE, TP2_SP, Layout, launch, must_pass
from tests.models import byte_tokenizer, tiny_llama, words

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS = 60
SAVED = 20


def learn(root: Path, name: str, layout: Layout = ONE, *more: str) -> list[str]:
    """A run of STEPS steps with a checkpoint every SAVED of them; weights are trained too."""
    options = {
        "--input": str(root / ("bf16_model" if "bf16" in name else "model")),
        "--output": str(root / name),
        "--data": str(root / "words.jsonl"),
        "--seq-length": "32",
        "--global-batch-size": "2",
        "--train-iters": str(STEPS),
        "--lr": "3e-4",
        "--save-interval": str(SAVED),
        "--eval-interval": "1000",
    }
    pairs = [word for pair in options.items() for word in pair]
    return ["prune", "--method", "maskllm", "--target", "2:4", "--train-weights", *pairs, *layout.flags(), *more]


def kill_after_first_checkpoint(command: list[str], run: Path) -> None:
    """Start a run by itself and end it with SIGKILL once its first checkpoint is complete."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_prune", *command],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not (run / "checkpoints" / "latest.json").exists():
        assert process.poll() is None, f"the run ended by itself with status {process.returncode}"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and two killed ones resumed: one in the same layout, one on two processes."""
    root = tmp_path_factory.mktemp("resume")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257, hidden_size=64, intermediate_size=128))
    imported = ["import", "--input", str(root / "hf"), "--output", str(root / "model")]
    narrow = ["import", "--input", str(root / "hf"), "--output", str(root / "bf16_model"), "--dtype", "bfloat16"]
    must_pass(launch(1, [imported, narrow, learn(root, "whole"), learn(root, "bf16")], root / "commands"))
    for name in ("same", "other", "same_bf16"):
        kill_after_first_checkpoint(learn(root, name), root / name)
    resumed = [learn(root, name, ONE, "--resume") for name in ("same", "same_bf16")]
    must_pass(launch(1, resumed, root / "commands"))
    still = ["--initial-logits", str(root / "whole"), "--lr", "1e-20", "--min-lr", "0", "--train-iters", "1"]
    commands = [learn(root, "other", TP2_SP, "--resume"), learn(root, "resharded", TP2_SP, *still)]
    must_pass(launch(2, commands, root / "commands"))
    return root


def records(root: Path, name: str) -> dict[int, dict[str, float]]:
    """Step -> what was logged about it."""
    lines = map(json.loads, (root / name / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


def same_masks(a: Masks, b: Masks) -> float:
    """Share of the weights on which two decisions agree."""
    pairs = [(a.get(name), b.get(name)) for name in a.names()]
    return sum(int((x == y).sum()) for x, y in pairs) / sum(x.numel() for x, _ in pairs)


def test_the_run_was_really_interrupted(root: Path) -> None:
    assert (root / "same" / "checkpoints").is_dir()
    first = json.loads((root / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1


@pytest.mark.parametrize(("first", "second"), [("whole", "same"), ("bf16", "same_bf16")])
def test_resumed_in_the_same_layout_is_bit_identical(root: Path, first: str, second: str) -> None:
    """In bf16, weights have float32 masters and mask logits are float32 themselves."""
    whole, resumed = records(root, first), records(root, second)
    assert sorted(resumed) == sorted(whole) == list(range(1, STEPS + 1))
    for step in whole:
        assert resumed[step]["loss"] == whole[step]["loss"], step
        assert resumed[step]["grad_norm"] == whole[step]["grad_norm"], step
        assert resumed[step]["differs_from_start_fraction"] == whole[step]["differs_from_start_fraction"], step
    decisions = [Masks.load(root / name / "decision") for name in (first, second)]
    assert same_masks(*decisions) == 1.0


def test_resumed_in_another_layout_continues(root: Path) -> None:
    """Gated mask logits saved at TP=1 and loaded permuted at TP=2 would change the loss at once.

    Small differences are rounding in another order, which Adam lets grow.
    """
    whole, resumed = records(root, "whole"), records(root, "other")
    assert sorted(resumed) == sorted(whole)
    for step in range(1, SAVED + 12):
        assert resumed[step]["loss"] == pytest.approx(whole[step]["loss"], abs=2e-3), step
    assert same_masks(*[Masks.load(root / name / "decision") for name in ("whole", "other")]) > 0.98


def test_mask_logits_are_loaded_in_another_layout_exactly(root: Path) -> None:
    """Saved on one rank, loaded on two, gate and up halves included, and not moved: the decision is the same."""
    assert same_masks(*[Masks.load(root / name / "decision") for name in ("whole", "resharded")]) == 1.0


def test_trained_weights_are_part_of_the_checkpoint(root: Path) -> None:
    from megatron.core import dist_checkpointing

    import megatron_prune.backend  # noqa: F401  (before megatron.core)

    path = root / "whole" / "checkpoints" / f"step_{STEPS:07d}"
    names = dist_checkpointing.load_tensors_metadata(str(path))
    assert any("linear_fc1.weight" in name for name in names)
    assert any("linear_fc1.mask_logits" in name for name in names)
    assert all(torch.Size(tensor.global_shape).numel() > 0 for tensor in names.values())
