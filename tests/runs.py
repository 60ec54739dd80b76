"""What tests read from run folders and do to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_prune.__main__ import main
from megatron_prune.backend import core_version
from megatron_prune.log import read_metrics
from tests.models import byte_tokenizer, tiny_model, words


def curve(run: Path, key: str = "loss") -> list[float]:
    """The values of a metric, step by step."""
    return [record[key] for record in read_metrics(run) if key in record]


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of a checkpoint of one process, as PyTorch reads them."""
    reader = dcp.FileSystemReader(folder)
    found = reader.read_metadata().state_dict_metadata
    tensors = {name: each for name, each in found.items() if isinstance(each, TensorStorageMetadata)}
    state = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in tensors.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def set_state(run: Path, state: str) -> None:
    """Make a run's description say that it is in this state."""
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"state": state}))


def reopened(run: Path, copy: Path, last: int) -> Path:
    """A copy of a whole run that looks as if it had died behind the checkpoint of step `last`."""
    shutil.copytree(run, copy)
    finished = json.loads((copy / "run.json").read_text())["state"]
    set_state(copy, "training" if finished == "trained" else "learning")
    for result in ("decision", "weights"):
        shutil.rmtree(copy / result, ignore_errors=True)
    for folder in (copy / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > last:
            shutil.rmtree(folder)
    return copy


OLD = core_version() < (0, 19)
PARTS = ("__0_0.distcp", "__0_1.distcp") if OLD else ("__0_0.distcp",)
"""Files that megatron-core writes the tensors of one process into."""
COMMON = "common.pt" if OLD else PARTS[0]
"""File with what is not sharded."""
STORED = [*dict.fromkeys((PARTS[0], COMMON, ".metadata"))]


def imported(folder: Path, family: str) -> Path:
    """A folder with a checkpoint `ck` of a tiny model `hf`, and a text `w.jsonl`."""
    byte_tokenizer(tiny_model(folder / "hf", family, vocab_size=257))
    words(folder / "w.jsonl", documents=4)
    assert main(["import", "--input", str(folder / "hf"), "--output", str(folder / "ck")]) == 0
    return folder


def prune_to(root: Path, output: Path, method: str, target: str, family: str = "llama", windows: str = "3x16") -> int:
    """Prune the model `family` of a folder by its `words.jsonl`, and export it beside the run; the exit status.

    `windows`: of the calibration, count x length.
    """
    samples, length = windows.split("x")
    text = ["--calibration", str(root / "words.jsonl"), "--calibration-samples", samples]
    given = [] if method == "magnitude" else [*text, "--calibration-seq-length", length]
    command = ["prune", str(root / family), str(output), "--method", method, "--target", target, *given]
    return main([*command, "--export", str(output.with_name(f"{output.name}_hf"))])


def four_steps(
    root: Path, output: Path, *more: str, target: str, family: str = "llama", save_interval: int = 2
) -> list[str]:
    """The verb that learns masks of one of `models.small_models` for four steps of a few words."""
    places = ["--input", str(root / family), "--output", str(output), "--data", str(root / "words.jsonl")]
    sizes = "--seq-length 16 --global-batch-size 2 --train-iters 4 --temperature-end 2".split()
    rate = [] if "--lr" in more else ["--lr", "1e-3"]
    saving = ["--save-interval", str(save_interval), "--keep-checkpoints", "9"]
    return ["prune", "--method", "maskllm", "--target", target, *places, *sizes, *rate, *saving, *more]


def refused_to_prune(
    root: Path, output: Path, method: str, target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Assert that `prune_to` ends with status 2 and one line, and makes nothing."""
    capsys.readouterr()
    assert prune_to(root, output, method, target) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and not output.exists()


def refused_in_a_line(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that a command ends with status 2 and one line, and makes nothing called `x` in this folder."""
    capsys.readouterr()
    assert main(command.split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and not Path("x").exists()
