"""`train --teacher` on MaxText: the losses of the PyTorch side step by step, zeros that stay, resuming, refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.log import read_metrics
from tests.maxtext import environment
from tests.maxtext.test_maxtext import verb
from tests.models import byte_tokenizer, tiny_blocks, tiny_model, words

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
STEPS = 10
WEIGHTS = ["--lm-weight", "0.5", "--distillation-weight", "2", "--distillation-temperature", "2"]
WEIGHTS += ["--hidden-weight", "3", "--hidden-loss"]
LOSSES = ("loss", "lm_loss", "distillation_loss", "hidden_loss")
SETTINGS = ["learning_rate=1e-3", "dtype=float32", "async_checkpointing=False", f"learning_rate_schedule_steps={STEPS}"]
SETTINGS += ["warmup_steps_fraction=0", "learning_rate_final_fraction=1.0", "adam_weight_decay=0"]
SETTINGS += ["grain_worker_count=0"]
REFUSED = {
    "no folder": (["--teacher", "ROOT/teacher"], "/teacher is not a model for MaxText .export --format maxtext makes"),
    "another size": (["--teacher", "ROOT/larger_maxtext"], "its vocabulary is not that of --input .*; give a teacher"),
    "other words": (["--teacher", "ROOT/swapped"], "its vocabulary is not that of --input .*; give a teacher that"),
    "shallow": (
        ["--teacher", "ROOT/shallow_maxtext", "--hidden-weight", "1"],
        "the student has 2 layers of width 32, the teacher 1 of 32; allowed: equal widths, a teacher at least as deep",
    ),
    "tiled": (["--teacher", "ROOT/teacher_maxtext", "num_vocab_tiling=2"], "num_vocab_tiling=2: not with --teacher"),
    "none": (["--hidden-weight", "1"], "given without --teacher; give --teacher MODEL"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both sides' runs; `answers` has what MaxText's said."""
    environment.python()
    root = tmp_path_factory.mktemp("distillation")
    models = {"llama": ("llama", {}), "teacher": ("llama", {"num_hidden_layers": 5})}
    models |= {"shallow": ("llama", {"num_hidden_layers": 1}), "larger": ("llama", {"vocab_size": 260})}
    models |= {"qwen3": ("qwen3", {}), "qwen3_teacher": ("qwen3", {"num_hidden_layers": 3})}
    for name, (family, more) in models.items():
        byte_tokenizer(tiny_model(root / name, family, **{"vocab_size": 257, "head_dim": 16} | more))
        source = sparse(root, name) if name in ("llama", "qwen3") else root / name
        verb("export", "--input", source, "--output", root / f"{name}_maxtext", "--format", "maxtext")
    swap_words(root / "teacher_maxtext", root / "swapped")
    tiny_blocks(root / "padded")
    verb("export", "--input", root / "padded", "--output", root / "padded_maxtext", "--format", "maxtext")
    text = ["--input", words(root / "words.jsonl"), "--tokenizer", root / "llama", "--append-eod", "--workers", 1]
    verb("preprocess", *text, "--output", root / "tokens")
    in_pytorch(root, "torch", "llama", "teacher", [*WEIGHTS, "cosine"])
    in_pytorch(root, "warmer", "llama", "teacher", [*WEIGHTS, "cosine", "--distillation-temperature", "3"])
    in_pytorch(root, "mse", "qwen3", "qwen3_teacher", [*WEIGHTS, "mse"])
    calls = runs(root) | {name: training(root, "llama", "none", 1, *given) for name, (given, _) in REFUSED.items()}
    answers = environment.run(root, list(calls.values()))
    (root / "answers").write_text(json.dumps(dict(zip(calls, answers, strict=True))))
    return root


def sparse(root: Path, name: str) -> Path:
    """A run that has pruned a model 2:4; beside it the checkpoint that trim makes."""
    run = root / f"{name}_run"
    verb("prune", "--input", root / name, "--output", run, "--method", "magnitude", "--target", "2:4")
    verb("trim", "--input", run, "--output", root / f"{name}_sparse")
    return run


def swap_words(folder: Path, copy: Path) -> None:
    """A model whose vocabulary has two tokens exchanged."""
    shutil.copytree(folder, copy)
    file = copy / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b, *_ = vocabulary
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))


def in_pytorch(root: Path, name: str, model: str, teacher: str, losses: list[str]) -> None:
    data = ["--data", root / "tokens", "--data-cache", root / "order", "--seq-length", 32, "--train-iters", STEPS]
    batch = ["--global-batch-size", 4, "--micro-batch-size", 2, "--adam-eps", "1e-8"]
    rate = ["--lr", "1e-3", "--min-lr", "1e-3", "--lr-decay-style", "constant"]
    places = ["--input", root / f"{model}_sparse", "--teacher", root / teacher, "--output", root / name]
    verb("train", *places, *data, *batch, *rate, *losses)


def training(root: Path, model: str, run: str, steps: int, *more: str) -> list[object]:
    data = ["--data", root / "tokens", "--data-cache", root / "cache", "--seq-length", 32, "--keep-checkpoints", STEPS]
    places = ["--input", root / f"{model}_maxtext", "--output", root / run, "--steps", steps]
    settings = ["per_device_batch_size=4", *(word for word in more if "=" in word), *SETTINGS]
    flags = [word.replace("ROOT", str(root)) for word in more if "=" not in word]
    return ["main", "train", *places, *data, *flags, "--settings", *settings]


def runs(root: Path) -> dict[str, list[object]]:
    taught = ["--teacher", "ROOT/teacher_maxtext", *WEIGHTS]
    padded = ["--teacher", "ROOT/padded_maxtext", "--lm-weight", "1", "gradient_accumulation_steps=2"]
    other = ["--teacher", "ROOT/qwen3_teacher_maxtext", *WEIGHTS, "mse", "gradient_accumulation_steps=2"]
    found = {
        "taught": training(root, "llama", "taught", STEPS, *taught, "cosine", "--save-interval", "1"),
        "mse": training(root, "qwen3", "mse_maxtext", 3, *other),
        "interrupted": training(root, "llama", "resumed", 4, *taught, "cosine"),
        "resumed": training(root, "llama", "resumed", STEPS, *taught, "cosine"),
        "padded": training(root, "padded", "padded_run", 2, *padded),
    }
    found["mse"][found["mse"].index("per_device_batch_size=4")] = "per_device_batch_size=2"
    verified = {f"step {step}": ("llama", root / "taught" / "checkpoints" / str(step)) for step in range(STEPS)}
    for name, (model, run) in (verified | {"verify padded": ("padded", root / "padded_run")}).items():
        found[name] = ["main", "verify", "--input", root / f"{model}_maxtext", "--checkpoint", run]
    for run in ("taught", "resumed"):
        found[f"arrays of {run}"] = ["call", "tests.maxtext.doctored", "dump", root / run, root / f"{run}.npz"]
    return found


def said(root: Path, call: str) -> str:
    return str(json.loads((root / "answers").read_text())[call])


def losses(run: Path) -> np.ndarray:
    """[steps, losses], by the names that both sides log."""
    records = [record for record in read_metrics(run) if "loss" in record]
    return np.array([[record[name] for name in LOSSES] for record in records])


def test_ten_steps_are_those_of_pytorch(root: Path) -> None:
    assert said(root, "taught").startswith("0 "), said(root, "taught")
    there, here = losses(root / "torch"), losses(root / "taught")
    assert here.shape == (STEPS, len(LOSSES)) and np.abs(there - here).max() < 1e-4
    np.testing.assert_allclose(here[:, 0], here[:, 1:] @ [0.5, 2, 3], rtol=1e-6)
    assert (np.abs(here[-1] - here[0]) > 1e-2).all()


def test_accumulated_over_parts_of_a_batch_they_are_the_same(root: Path) -> None:
    assert said(root, "mse").startswith("0 "), said(root, "mse")
    assert np.abs(losses(root / "mse")[:3] - losses(root / "mse_maxtext")).max() < 1e-4


def test_another_temperature_or_distance_shows(root: Path) -> None:
    """Control."""
    here = losses(root / "taught")
    assert np.abs(here - losses(root / "warmer")).max() > 1e-2 and np.abs(here - losses(root / "mse")).max() > 1e-2


def test_zeros_stay_in_every_step(root: Path) -> None:
    found = [said(root, f"step {step}") for step in range(STEPS)]
    assert all(re.fullmatch(r"0 zeros of the masks: 12288; .*: 0\n", answer) for answer in found), found
    assert said(root, "padded").startswith("0 ") and said(root, "verify padded").startswith("0 ")


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(root: Path) -> None:
    """Bit for bit; of the teacher, which has five layers, nothing is stored."""
    assert said(root, "resumed").startswith("0 ")
    assert np.array_equal(losses(root / "taught"), losses(root / "resumed"))
    with np.load(root / "taught.npz") as whole, np.load(root / "resumed.npz") as resumed:
        assert len(whole.files) > 30 and whole.files == resumed.files
        assert all(np.array_equal(whole[key], resumed[key]) for key in whole.files)
        assert not any(5 in whole[key].shape for key in whole.files)


@pytest.mark.parametrize("call", REFUSED)
def test_what_cannot_be_learned_from_is_one_line(root: Path, call: str) -> None:
    lines = [line for line in said(root, call).splitlines() if "error:" in line]
    assert said(root, call).startswith("2 ") and len(lines) == 1 and re.search(REFUSED[call][1], lines[0]), lines
    assert not (root / "none").exists()
