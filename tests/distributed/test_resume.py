"""A mask-learning run that is killed goes on as if nothing had happened, also in another layout."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.decision.masks import Masks
from megatron_prune.log import read_metrics
from tests.distributed.launch import DP2, ONE, TP2_SP, Layout, environment, launch, must_pass
from tests.models import byte_tokenizer, tiny_llama, words
from tests.runs import PARTS, reopened, saved_tensors
from tools.kill_test import curve, kill_and_resume, masks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS = 60
SAVED = 10


def learn(root: Path, name: str, layout: Layout = ONE, *more: str) -> list[str]:
    """A run of STEPS steps with a checkpoint every SAVED of them; weights are trained too.

    In bfloat16 gradients are not clipped: their norm has another last bit where it is summed in parts, and a weight
    that is rounded another way for it takes the losses apart by 1e-3.
    """
    options = {
        "--input": str(root / ("bf16_model" if "bf16" in name else "model")),
        "--output": str(root / name),
        "--data": str(root / "words.jsonl"),
        "--seq-length": "32",
        "--global-batch-size": "2",
        "--train-iters": str(STEPS),
        "--lr": "3e-4",
        "--save-interval": str(SAVED),
        "--keep-checkpoints": "9",
        "--eval-interval": "1000",
    }
    options |= {"--clip-grad": "0"} if "bf16" in name else {}
    pairs = [word for pair in options.items() for word in pair]
    return ["prune", "--method", "maskllm", "--target", "2:4", "--train-weights", *pairs, *layout.flags(), *more]


def start_on_two(command: list[str], *more: str) -> subprocess.Popen[str]:
    """A verb on two processes under torchrun, as a user starts it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *more]
    words = [*torchrun, "-m", "megatron_prune", *command]
    return subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def signal_rank(torchrun: subprocess.Popen[str], rank: int, number: signal.Signals, run: Path) -> None:
    """Once the run has a checkpoint, send a signal to one of torchrun's processes."""
    child = wait_for(torchrun, lambda: process_of(torchrun, rank))
    wait_for(torchrun, lambda: (run / "checkpoints" / "latest.json").exists())
    os.kill(child, number)


def process_of(torchrun: subprocess.Popen[str], rank: int) -> int | None:
    """The process that torchrun started as `rank`, once there."""
    for child in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # one of another kind that has ended
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    return None


def wait_for(torchrun: subprocess.Popen[str], found: Callable[[], Any]) -> Any:
    """What `found` returns once it is something."""
    deadline = time.monotonic() + 240
    while not (answer := found()):
        assert torchrun.poll() is None, torchrun.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.002)
    return answer


@dataclass(frozen=True)
class Outcome:
    """How a torchrun ended."""

    status: int
    output: str


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole runs on one process."""
    root = tmp_path_factory.mktemp("resume")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257, hidden_size=64, intermediate_size=128))
    imported = ["import", "--input", str(root / "hf"), "--output", str(root / "model")]
    narrow = ["import", "--input", str(root / "hf"), "--output", str(root / "bf16_model"), "--dtype", "bfloat16"]
    must_pass(launch(1, [imported, narrow, learn(root, "whole"), learn(root, "bf16")], root / "commands"))
    return root


@pytest.fixture(scope="module")
def killed(root: Path) -> Counter[str]:
    """`same`: the whole run again, killed three times; where."""
    flags = learn(root, "same")[1:]
    del flags[flags.index("--output") : flags.index("--output") + 2]
    return kill_and_resume(flags, root / "same", kills=3, steps=STEPS, seed=2)


@pytest.fixture(scope="module")
def restarted(root: Path) -> Outcome:
    """`restarted`: on two processes, one of which is killed and started again by torchrun."""
    torchrun = start_on_two(learn(root, "restarted", DP2, "--async-save"), "--max-restarts", "1")
    signal_rank(torchrun, 1, signal.SIGKILL, root / "restarted")
    output = torchrun.communicate(timeout=300)[0]
    return Outcome(torchrun.returncode, output)


@pytest.fixture(scope="module")
def stopped(root: Path) -> Outcome:
    """`stopped`: on two processes, one of which gets a SIGTERM."""
    torchrun = start_on_two(learn(root, "stopped", DP2))
    signal_rank(torchrun, 1, signal.SIGTERM, root / "stopped")
    output = torchrun.communicate(timeout=300)[0]
    return Outcome(torchrun.returncode, output)


@pytest.fixture(scope="module")
def told(root: Path, stopped: Outcome) -> str:
    """What runs say that are resumed: in the same layout, and in another one from a damaged checkpoint."""
    reopened(root / "bf16", root / "same_bf16", SAVED)
    must_pass(launch(1, [learn(root, "same_bf16", ONE, "--resume")], root / "commands"))
    other = reopened(root / "whole", root / "other", 2 * SAVED)
    file = other / "checkpoints" / f"step_{2 * SAVED:07d}" / PARTS[-1]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    still = ["--initial-logits", str(root / "whole"), "--lr", "1e-20", "--min-lr", "0", "--train-iters", "1"]
    commands = [
        learn(root, "other", TP2_SP, "--resume"),
        learn(root, "resharded", TP2_SP, *still),
        learn(root, "whole_on_two", DP2),
        learn(root, "stopped", DP2, "--resume"),
    ]
    for name in ("whole", "bf16"):
        reopened(root / name, root / f"{name}_sharded", SAVED)
        commands.append(learn(root, f"{name}_sharded", DP2, "--resume", "--use-distributed-optimizer"))
    result = launch(2, commands, root / "commands")
    must_pass(result)
    back = []
    for name in ("whole", "bf16"):
        reopened(root / f"{name}_sharded", root / f"{name}_back", 2 * SAVED)
        back.append(learn(root, f"{name}_back", ONE, "--resume"))
    must_pass(launch(1, back, root / "commands"))
    return result.stdout


def records(root: Path, name: str) -> dict[int, dict[str, float]]:
    """Step -> what was logged about it."""
    return {line["step"]: line for line in read_metrics(root / name) if "loss" in line}


def same_masks(a: Masks, b: Masks) -> float:
    """Share of the weights on which two decisions agree."""
    pairs = [(a.get(name), b.get(name)) for name in a.names()]
    return sum(int((x == y).sum()) for x, y in pairs) / sum(x.numel() for x, _ in pairs)


def assert_bit_identical(root: Path, first: str, second: str) -> None:
    """Both runs have the same curve and the same masks."""
    assert [record["step"] for record in curve(root / first) if "loss" in record] == list(range(1, STEPS + 1))
    assert curve(root / first) == curve(root / second)
    assert masks(root / first) == masks(root / second) != {}


def test_killed_three_times_is_bit_identical(root: Path, killed: Counter[str]) -> None:
    """`tools/kill_test.py --kills 20` is the long form."""
    assert sum(killed.values()) == 3 and killed["while saving"] > 0 and not killed["ended"], killed
    assert_bit_identical(root, "whole", "same")


def test_resumed_with_bf16_weights_is_bit_identical(root: Path, told: str) -> None:
    """Weights have float32 masters and mask logits are float32 themselves."""
    assert_bit_identical(root, "bf16", "same_bf16")


def test_a_lost_process_is_started_again(root: Path, told: str, restarted: Outcome) -> None:
    """torchrun --max-restarts resumes by itself and says what happened; the run is bit-identical."""
    assert restarted.status == 0, restarted.output[-4000:]
    assert "exitcode: -9" in restarted.output and "resumed from" in restarted.output
    assert_bit_identical(root, "whole_on_two", "restarted")


@pytest.mark.nightly
def test_a_process_that_hangs_ends_the_job(root: Path) -> None:
    """The others wait for it no longer than they were told to, and the launcher ends it too."""
    command = learn(root, "hanging", TP2_SP, "--distributed-timeout-minutes", "0.2", "--train-iters", "4000")
    torchrun = start_on_two(command, "--shutdown-timeout", "1")
    signal_rank(torchrun, 1, signal.SIGSTOP, root / "hanging")
    output = torchrun.communicate(timeout=300)[0]
    assert torchrun.returncode == 1
    cause = output.partition("Root Cause")[2]
    assert "rank      : 0" in cause and "Timed out waiting 12000ms" in cause


def test_a_signal_to_one_process_stops_all_of_them(root: Path, told: str, stopped: Outcome) -> None:
    """They agree on the step, end with status 0, and the rest of the run is bit-identical."""
    assert stopped.status == 0, stopped.output[-4000:]
    assert "SIGTERM: saved after step" in stopped.output
    assert_bit_identical(root, "whole_on_two", "stopped")


def test_all_processes_take_the_checkpoint_before_a_damaged_one(root: Path, told: str) -> None:
    """Each reads a part of the files; the last byte of one file was changed."""
    assert f"step_{2 * SAVED:07d} is damaged ({PARTS[-1]} has changed" in told
    assert f"step_{SAVED:07d}" in told.partition("resumed from")[2].splitlines()[0]


def test_resumed_in_another_layout_continues(root: Path, told: str) -> None:
    """Gated mask logits saved at TP=1 and loaded permuted at TP=2 would change the loss at once."""
    whole, resumed = records(root, "whole"), records(root, "other")
    assert sorted(resumed) == sorted(whole)
    for step in range(1, SAVED + 12):
        assert resumed[step]["loss"] == pytest.approx(whole[step]["loss"], abs=1e-4), step
    assert same_masks(*[Masks.load(root / name / "decision") for name in ("whole", "other")]) > 0.99


@pytest.mark.parametrize("name", ["whole", "bf16"])
def test_the_optimizer_may_be_sharded_and_whole_again(root: Path, told: str, name: str) -> None:
    """One process, then two that share the optimizer's state, then one again: moments, masters and step go along.

    Each is held to the run whose checkpoint it took.
    """
    runs = ((f"{name}_sharded", name, SAVED), (f"{name}_back", f"{name}_sharded", 2 * SAVED))
    for resumed, origin, first in runs:
        for step in range(first + 1, first + 6):
            expected = records(root, origin)[step]["loss"]
            assert records(root, resumed)[step]["loss"] == pytest.approx(expected, abs=1e-5), (resumed, step)


def test_mask_logits_are_loaded_in_another_layout_exactly(root: Path, told: str) -> None:
    """Saved on one rank, loaded on two, gate and up halves included, and not moved: the decision is the same."""
    assert same_masks(*[Masks.load(root / name / "decision") for name in ("whole", "resharded")]) == 1.0


def test_trained_weights_are_part_of_the_checkpoint(root: Path) -> None:
    tensors = saved_tensors(root / "whole" / "checkpoints" / f"step_{STEPS:07d}")
    assert any("linear_fc1.weight" in name for name in tensors)
    assert any("linear_fc1.mask_logits" in name for name in tensors)
    assert all(tensor.numel() > 0 for tensor in tensors.values())
