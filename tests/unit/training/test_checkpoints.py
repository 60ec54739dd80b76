"""Training checkpoints of one process: damage is found, the one before is used, stopping saves, few are kept."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.__main__ import main
from megatron_prune.files import checksum
from megatron_prune.model import checkpoint
from megatron_prune.training.loop import StepResult, Trainer
from tests.models import byte_tokenizer, tiny_llama, words
from tests.runs import COMMON, PARTS, STORED, reopened
from tools.kill_test import curve, masks

STEPS, SAVED = 12, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and a whole run of it, with all its checkpoints."""
    root = tmp_path_factory.mktemp("checkpoints")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    assert main(["import", "--input", str(root / "hf"), "--output", str(root / "model")]) == 0
    assert main(learn(root, "whole")) == 0
    return root


def learn(root: Path, name: str, *more: str) -> list[str]:
    """A run with a checkpoint every SAVED of its STEPS steps."""
    inputs = ["--input", str(root / "model"), "--output", str(root / name), "--data", str(root / "words.jsonl")]
    sizes = ["--seq-length", "16", "--global-batch-size", "2", "--train-iters", str(STEPS), "--lr", "3e-4"]
    saves = ["--save-interval", str(SAVED), "--keep-checkpoints", "9", "--eval-interval", "6"]
    held_out = ["--eval-data", str(root / "words.jsonl"), "--eval-windows", "2"]
    return ["prune", "--method", "maskllm", "--target", "2:4", *inputs, *sizes, *saves, *held_out, *more]


def steps_in(run: Path) -> list[str]:
    """What lies in a run's folder of checkpoints, but for the pointer."""
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name != "latest.json")


def assert_as_whole(root: Path, run: Path) -> None:
    """Bit for bit the run that was left alone."""
    assert curve(run) == curve(root / "whole")
    assert masks(run) == masks(root / "whole") != {}


def truncate(file: Path) -> None:
    """Cut off the end of a file."""
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, Path.unlink, flip])
@pytest.mark.parametrize("file", [*STORED, "checkpoint.json", "manifest.json"])
def test_the_checkpoint_before_a_damaged_one_is_used(
    root: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], file: str
) -> None:
    run = reopened(root / "whole", root / f"{damage.__name__}_{file}", STEPS)
    damage(run / "checkpoints" / f"step_{STEPS:07d}" / file)
    assert main(learn(root, run.name, "--resume")) == 0
    told = capsys.readouterr().out
    named = f"step_{STEPS:07d} is damaged ({file}" in told or f"{file} is damaged" in told or f"{file} does not" in told
    assert named or (file == "manifest.json" and "bytes instead of" in told)  # a size in it was flipped
    assert f"step_{STEPS - SAVED:07d}" in told.partition("resumed from")[2].splitlines()[0]
    assert_as_whole(root, run)
    assert steps_in(run) == [f"step_{step:07d}" for step in range(SAVED, STEPS + 1, SAVED)]
    shutil.rmtree(run)


def test_no_good_checkpoint_is_an_error_that_names_the_damage(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = reopened(root / "whole", root / "hopeless", STEPS)
    for folder in (run / "checkpoints").glob("step_*"):
        flip(folder / COMMON)
    assert main(learn(root, run.name, "--resume")) == 2
    message = capsys.readouterr().err
    assert f"{COMMON} has changed since it was written" in message and "no other checkpoint" in message


def test_what_a_killed_save_leaves_is_ignored_and_removed(root: Path) -> None:
    """Killed while writing: a part under another name. Killed before the pointer was moved: a whole one."""
    run = reopened(root / "whole", root / "interrupted", STEPS)
    folder = run / "checkpoints"
    (folder / f"step_{STEPS:07d}").rename(folder / f"step_{STEPS:07d}.partial")
    (folder / f"step_{STEPS:07d}.partial" / "manifest.json").unlink()
    (folder / "latest.json").write_text('{"step": 3}')
    assert main(learn(root, run.name, "--resume")) == 0
    assert_as_whole(root, run)
    assert json.loads((folder / "latest.json").read_text()) == {"step": STEPS}
    assert steps_in(run) == steps_in(root / "whole")


@pytest.mark.parametrize("damage", [truncate, Path.unlink, flip])
def test_metrics_are_those_of_the_checkpoint(root: Path, damage: Callable[[Path], None]) -> None:
    run = reopened(root / "whole", root / f"metrics_{damage.__name__}", STEPS - SAVED)
    damage(run / "metrics.jsonl")
    assert main(learn(root, run.name, "--resume")) == 0
    assert_as_whole(root, run)


def test_a_damaged_pointer_is_written_anew(root: Path) -> None:
    """Also when nothing is left to save: the run had died behind its last checkpoint."""
    run = reopened(root / "whole", root / "pointer", STEPS)
    (run / "checkpoints" / "latest.json").write_text('{"step"')
    assert main(learn(root, run.name, "--resume")) == 0
    assert json.loads((run / "checkpoints" / "latest.json").read_text()) == {"step": STEPS}


@pytest.mark.parametrize("background", [(), ("--async-save",)])
def test_the_last_ones_are_kept(root: Path, background: tuple[str, ...]) -> None:
    """And what is written in the background is the same and there at the end."""
    run = root / f"kept{len(background)}"
    assert main([*learn(root, run.name, *background), "--keep-checkpoints", "2"]) == 0
    assert_as_whole(root, run)
    assert steps_in(run) == [f"step_{STEPS - SAVED:07d}", f"step_{STEPS:07d}"]
    for name in PARTS:
        here, there = (path / "checkpoints" / f"step_{STEPS - SAVED:07d}" / name for path in (run, root / "whole"))
        assert here.read_bytes() == there.read_bytes()


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Callable[[], None]], None]]:
    """Does something during an optimizer step of a given number."""
    step = Trainer.step

    def arrange(number: int, action: Callable[[], None]) -> None:
        def stepping(self: Trainer, now: int) -> StepResult:
            if now == number:
                action()
            return step(self, now)

        monkeypatch.setattr(Trainer, "step", stepping)

    yield arrange


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_step(
    root: Path, number: signal.Signals, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    at_step(4, lambda: os.kill(os.getpid(), number))
    assert main(learn(root, number.name)) == 0
    assert f"{number.name}: saved after step 5 of {STEPS}; go on with --resume" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    run = root / number.name
    assert steps_in(run) == ["step_0000003", "step_0000005"] and not (run / "decision").exists()
    at_step(-1, lambda: None)
    assert main(learn(root, number.name, "--resume")) == 0
    assert_as_whole(root, run)


def test_a_second_interrupt_ends_at_once(root: Path, at_step: Any) -> None:
    at_step(4, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and None)
    assert main(learn(root, "impatient")) == 130
    assert steps_in(root / "impatient") == ["step_0000003"]


def test_the_time_limit_saves(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit that has passed when the first step ends; without one the rest follows."""
    assert main(learn(root, "late", "--time-limit", "1e-6")) == 0
    assert f"time limit: saved after step 1 of {STEPS}" in capsys.readouterr().out
    assert main(learn(root, "late", "--resume")) == 0
    assert_as_whole(root, root / "late")


FULL_BYTES = 16384
"""More than a run's metrics, less than the data of a checkpoint."""


@pytest.mark.parametrize("background", [(), ("--async-save",)])
def test_a_full_disk_ends_the_run_and_keeps_what_was_there(
    root: Path, background: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the background the error comes at a later step, not never."""
    write, name = checkpoint._write, f"full{len(background)}"

    def full_at_second(request: Any, buckets: list[Any]) -> dict[str, str]:
        if not any("step_0000006" in str(path) for path, _key, _data in buckets):
            return write(request, buckets)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, hard))
        try:
            return write(request, buckets)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(checkpoint, "_write", full_at_second)
    assert main(learn(root, name, *background)) == 2
    message = capsys.readouterr().err
    assert "File too large" in message and "earlier checkpoints are untouched" in message
    assert steps_in(root / name) == ["step_0000003"]
    monkeypatch.undo()
    assert main(learn(root, name, "--resume")) == 0
    assert_as_whole(root, root / name)


def test_data_goes_on_where_it_was_or_not_at_all(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another batch size would skip or repeat windows."""
    run = reopened(root / "whole", root / "batch", STEPS)
    assert main([*learn(root, run.name, "--resume"), "--global-batch-size", "4"]) == 2
    assert "samples 24 and 48 was given" in capsys.readouterr().err


def test_torchrun_continues_only_its_own_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a restart the run of the same launch goes on without --resume; that of another is refused as before."""
    run = reopened(root / "whole", root / "restarted", STEPS)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert main(learn(root, run.name)) == 2
    assert "already exists" in capsys.readouterr().err
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"launch": "mine"}))
    flip(run / "checkpoints" / f"step_{STEPS:07d}" / COMMON)
    assert main(learn(root, run.name)) == 0
    assert_as_whole(root, run)
    assert main(learn(root, run.name)) == 0, "the process that ended late is not a failure"
    assert "was finished" in capsys.readouterr().out


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def saved(value: Any) -> bytes:
    """As torch.save writes it."""
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


@pytest.mark.parametrize("file", STORED)
def test_a_checkpoint_with_code_in_it_whose_sums_are_right_runs_nothing(
    root: Path, capfd: pytest.CaptureFixture[str], file: str
) -> None:
    run, marker = reopened(root / "whole", root / f"hostile_{file}", STEPS), root / f"ran_{file}"
    folder = run / "checkpoints" / f"step_{STEPS:07d}"
    attack = {"a": Attack(marker)}
    (folder / file).write_bytes(pickle.dumps(attack) if file == ".metadata" else saved(attack) * 200)
    sums = {name: checksum(folder / name) for name in json.loads((folder / "checksums.json").read_text())}
    (folder / "checksums.json").write_text(json.dumps(sums))
    checkpoint.write_manifest(folder)
    sizes = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in sizes.items() if k != "manifest.json"}))
    capfd.readouterr()
    assert main(learn(root, run.name, "--resume")) == 2
    told = capfd.readouterr().err.strip()
    assert "\n" not in told and "megatron-prune: error: checkpoint" in told and len(told) < 500
    assert not marker.exists()


@pytest.mark.parametrize("content", [{}, {"step": 3}, {"step": STEPS, "optimizer": {"step": "x"}, "scheduler": 5}])
def test_a_checkpoint_of_something_else_is_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, Any]
) -> None:
    """Whole by its checksums, but its plain values are not those of a run."""
    run = reopened(root / "whole", tmp_path / "run", last=SAVED)
    step = run / "checkpoints" / f"step_{SAVED:07d}"
    torch.save(content, step / "common.pt")
    sums = json.loads((step / "checksums.json").read_text())
    (step / "checksums.json").write_text(json.dumps(sums | {"common.pt": checksum(step / "common.pt")}))
    (step / "manifest.json").unlink()
    checkpoint.write_manifest(step)
    capsys.readouterr()
    command = learn(root, "whole", "--resume")
    assert main([str(run) if word == str(root / "whole") else word for word in command]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and str(step) in lines[0] and "use another checkpoint" in lines[0]
