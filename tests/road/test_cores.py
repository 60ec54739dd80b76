"""Both megatron-cores that are allowed: the same decisions and losses, and checkpoints that go from one to the other.

The older one lives in .venv-3.11, which tests/run.sh makes where there is a Python 3.11; without it these are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_prune.backend import core_version
from tests.models import byte_tokenizer, tiny_llama, words
from tests.runs import curve, reopened

ROOT = Path(__file__).resolve().parents[2]
OLDER = ROOT / ".venv-3.11" / "bin" / "python"
PYTHON = {"older": OLDER, "newer": Path(sys.executable)}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.skipif(not OLDER.exists(), reason="no .venv-3.11: run tools/setup_env.sh 3.11"),
    pytest.mark.skipif(core_version() < (0, 17), reason="this environment has the older megatron-core itself"),
]
ROWS = {
    "magnitude": ("--method", "magnitude", "--target", "2:4"),
    "wanda": ("--method", "wanda", "--target", "2:4"),
    "wanda_half": ("--method", "wanda", "--target", "0.5"),
    "sparsegpt": ("--method", "sparsegpt", "--target", "2:4"),
    "sparsegpt_half": ("--method", "sparsegpt", "--target", "0.5"),
    "sparsegpt_masks": ("--method", "sparsegpt", "--target", "2:4", "--no-update-weights"),
}
STEPS, SAVED = 10, 4


ONE_AFTER_ANOTHER = """
import json, sys
from megatron_prune.__main__ import main
sys.exit(max(main(words) for words in json.loads(sys.argv[1])))
"""


def verbs(which: str, cwd: Path, *commands: Sequence[str]) -> None:
    """Commands in one process of one of the two environments, which all succeed and say nothing of deprecation."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [PYTHON[which], "-c", ONE_AFTER_ANOTHER, json.dumps(commands)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deprecat" not in (done.stdout + done.stderr).lower()


def train(source: str, output: str) -> list[str]:
    """Ten steps that keep zeros."""
    places = ["--input", source, "--output", output, "--data", "words.jsonl"]
    sizes = ["--seq-length", "16", "--global-batch-size", "2", "--train-iters", str(STEPS), "--lr", "1e-3"]
    return ["train", *places, *sizes, "--save-interval", str(SAVED), "--keep-checkpoints", "9"]


def exported(source: str, output: str) -> list[list[str]]:
    """To Hugging Face format."""
    return [["export", "--input", source, "--output", output]]


def bits(folder: Path) -> dict[str, str]:
    """Name -> digest of the tensors that a folder holds."""
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model imported, pruned and trained by both."""
    root = tmp_path_factory.mktemp("cores")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    words(root / "words.jsonl")
    for which in PYTHON:
        (root / which).mkdir()
        for name in ("hf", "words.jsonl"):
            (root / which / name).symlink_to(root / name)
        made = ["import", "--input", "hf", "--output", "model", "--dtype", "float32"]
        pruned = ["prune", "--input", "model", "--output", "pruned", *ROWS["magnitude"]]
        verbs(which, root / which, made, pruned, train("pruned", "trained"), *exported("trained/weights", "alone"))
    return root


def test_one_shot_decisions_are_equal_bit_for_bit(root: Path) -> None:
    """And what six rows of the tables leave of the weights."""
    text = ("--calibration", "words.jsonl", "--calibration-samples", "8", "--calibration-seq-length", "32")
    commands: list[list[str]] = []
    for name, row in ROWS.items():
        calibrated = text if "magnitude" not in row else ()
        commands.append(["prune", "--input", "model", "--output", name, *row, *calibrated])
        commands.append(["trim", "--input", name, "--output", f"{name}_sparse"])
        commands += exported(f"{name}_sparse", f"{name}_hf")
    for which in PYTHON:
        verbs(which, root / which, *commands)
    for name in ROWS:
        decisions = [bits(root / which / name / "decision") for which in PYTHON]
        exports = [bits(root / which / f"{name}_hf") for which in PYTHON]
        assert decisions[0] == decisions[1] and exports[0] == exports[1], name


def test_ten_losses_are_equal(root: Path) -> None:
    older, newer = (curve(root / which / "trained") for which in PYTHON)
    assert len(older) == STEPS and newer == pytest.approx(older, abs=1e-6)
    assert len(set(older)) > 1


@pytest.mark.parametrize(("writer", "reader"), [("older", "newer"), ("newer", "older")])
def test_a_run_of_one_goes_on_in_the_other(root: Path, writer: str, reader: str) -> None:
    """Optimizer state included: its curve and its weights are those of a run left alone."""
    alone = root / writer / "trained"
    copy = reopened(alone, root / f"{writer}_to_{reader}", SAVED)
    target = root / f"{copy.name}_hf"
    verbs(
        reader, root / writer, [*train("pruned", str(copy)), "--resume"], *exported(str(copy / "weights"), str(target))
    )
    assert curve(copy) == pytest.approx(curve(alone), abs=1e-6)
    assert bits(target) == bits(root / writer / "alone")
