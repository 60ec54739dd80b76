"""examples/tpu/run.sh, step after step as a user runs it, on a CPU: a model that learns 2:4, and a smaller one."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.log import read_metrics
from megatron_prune.model.convert import HFReader
from tests.maxtext import environment
from tests.maxtext.test_maxtext import verb
from tests.models import byte_tokenizer, tiny_llama, words

pytestmark = pytest.mark.slow
MORE = "grain_worker_count=0 async_checkpointing=False warmup_steps_fraction=0"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$ROOT: a Hugging Face model and text; the same smaller, layers of different sizes, as a run has decided."""
    environment.python()
    root = tmp_path_factory.mktemp("recipe")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257, num_hidden_layers=3, head_dim=16))
    text = words(root / "words.jsonl", documents=16)
    more = ["--tokenizer", root / "hf", "--append-eod", "--workers", 1]
    verb("preprocess", "--input", text, "--output", root / "tokens", *more)
    calibrated = ["--calibration", text, "--calibration-samples", 8, "--calibration-seq-length", 32]
    run = ["--input", root / "hf", "--output", root / "run", "--method", "flap", "--target", "parameters=38K"]
    verb("prune", *run, *calibrated)
    verb("export", "--input", root / "run", "--output", root / "smaller", "--format", "maxtext")
    (root / "words.txt").write_text("\n".join(json.loads(line)["text"] for line in text.read_text().splitlines()[:2]))
    return root


def run(root: Path, step: str, *flags: object, **variables: object) -> str:
    """What a step has told."""
    unknown = {"RANK", "WORLD_SIZE", *re.findall(r"^([A-Z_]+)=", (environment.ROOT / RUN).read_text(), re.MULTILINE)}
    given = {"ROOT": root, "STEPS": 2, "LENGTH": 32, "PER_DEVICE": 2, "MORE": MORE, "RANK": 0, "JAX_PLATFORMS": "cpu"}
    given["MEGATRON_PRUNE_MAXTEXT_PYTHON"] = environment.python()
    values = {key: str(value) for key, value in (given | variables).items()}
    clean: dict[str, Any] = {key: value for key, value in os.environ.items() if key not in unknown}
    done = subprocess.run(
        [environment.ROOT / RUN, step, *map(str, flags)], env=clean | values, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


RUN = "examples/tpu/run.sh"


def finish(root: Path, output: Path, **variables: object) -> None:
    """What follows learning or cutting, of a model with masks: training by a teacher, and all that looks at the run."""
    taught = {"TEACHER": root / "dense", **variables}
    run(root, "train", "--data-cache", root / "order", "--lm-weight", 1, **taught)
    records = read_metrics(output)
    assert [record["step"] for record in records] == [1, 2] and all(record["distillation_loss"] for record in records)
    assert "of them not +0.0 in the checkpoint: 0" in run(root, "verify", **variables)
    asked = ["--text", root / "words.txt", "--windows", 4, "--window", 64]
    run(root, "evaluate", *asked, "--output", f"{output}.json", **variables)
    assert json.loads(Path(f"{output}.json").read_text())["perplexity"] > 1
    run(root, "export", **variables)
    assert HFReader(Path(f"{output}_hf")).model_config.num_layers == 3


@pytest.mark.nightly
def test_a_model_that_learns_its_masks(root: Path) -> None:
    run(root, "convert")
    run(root, "learn", "--steps", 2, "--global-batch-size", 4, "--data-cache", root / "order")
    run(root, "sparse")
    finish(root, root / "trained")


def test_a_smaller_model(root: Path) -> None:
    if not (root / "dense").exists():
        run(root, "convert")
    finish(root, root / "again", MODEL=root / "smaller", OUTPUT=root / "again")
