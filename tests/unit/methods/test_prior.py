"""Mask learning from a run whose weights were corrected: what it says, starts from and may take back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_prune.__main__ import main
from megatron_prune.decision.masks import Masks, prunable_shapes
from megatron_prune.log import read_metrics
from megatron_prune.model.description import read_description
from tests.models import stories260k

LEARN = ["--method", "maskllm", "--target", "2:4", "--train-iters", "12", "--seq-length", "64", "--lr", "1e-3"]
LEARN += ["--global-batch-size", "8", "--micro-batch-size", "8", "--min-lr", "0", "--eval-interval", "12"]
CALM = ["--scale-start", "1280", "--scale-end", "2560", "--temperature-start", "12.8", "--temperature-end", "12.8"]
LEARN += ["--scale-start", "1", "--scale-end", "1", "--temperature-start", "0.05", "--temperature-end", "0.05"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, stories that the calibration and training draw from, and a SparseGPT run that changed weights."""
    root = tmp_path_factory.mktemp("prior")
    stories260k(root / "hf")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in told(root / "hf")))
    assert main(["import", "--input", str(root / "hf"), "--output", str(root / "ck")]) == 0
    run = ["prune", "--input", str(root / "ck"), "--output", str(root / "run"), "--method", "sparsegpt"]
    text = ["--calibration", str(root / "text.jsonl"), "--calibration-samples", "48", "--calibration-seq-length", "64"]
    assert main([*run, "--target", "2:4", *text]) == 0
    return root


def told(model: Path) -> list[str]:
    """Stories that the model tells itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    start = torch.full((48, 1), 1)
    tokens = network.generate(start, do_sample=True, max_new_tokens=160, min_new_tokens=160, pad_token_id=0)
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def learn(root: Path, name: str, source: str, *more: str) -> float:
    """Held-out loss before the first step of a run from the SparseGPT run's masks on the weights of `source`."""
    data = ["--data", str(root / "text.jsonl"), "--eval-data", str(root / "text.jsonl"), "--eval-windows", "8"]
    command = ["prune", "--input", str(root / source), "--output", str(root / name), "--prior", str(root / "run")]
    assert main([*command, *LEARN, *data, *more]) == 0
    return next(record["eval_loss"] for record in read_metrics(root / name) if record.get("step", 0) == 0)


def exported(root: Path, run: str) -> dict[str, torch.Tensor]:
    """Weights of the exported model of a run, by name."""
    assert main(["trim", "--input", str(root / run), "--output", str(root / f"{run}-small")]) == 0
    command = ["export", "--input", str(root / f"{run}-small"), "--output", str(root / f"{run}-hf")]
    assert main(command) == 0
    return load_file(root / f"{run}-hf" / "model.safetensors")


def sparse(root: Path) -> dict[str, torch.Tensor]:
    """Weights of the exported model of the SparseGPT run."""
    done = root / "run-hf" / "model.safetensors"
    return load_file(done) if done.exists() else exported(root, "run")


def prunable(root: Path) -> list[str]:
    return list(prunable_shapes(read_description(root / "ck").config))


def test_learning_starts_from_the_corrected_weights_and_may_take_removed_ones_back(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = learn(root, "from-dense", "ck")
    told = capsys.readouterr().out
    assert f"--prior {root / 'run'}: its masks are taken" in told and f"--input {root / 'run' / 'weights'}" in told
    corrected = learn(root, "from-run", "run/weights")
    assert "its masks are taken" not in capsys.readouterr().out
    assert corrected < dense - 0.05, "SparseGPT's weights are better under its mask than the dense ones"
    before, after = Masks.load(root / "run" / "decision"), Masks.load(root / "from-run" / "decision")
    weights, original = exported(root, "from-run"), load_file(root / "hf" / "model.safetensors")
    back = 0
    for name in prunable(root):
        new = after.get(name) & ~before.get(name)
        back += int(new.sum())
        assert torch.equal(weights[name][new], original[name][new]), "a weight that comes back is the dense one"
        assert not weights[name][~after.get(name)].any()
    assert back > 0


def test_corrected_weights_train_on_with_the_dense_model_as_their_teacher(root: Path) -> None:
    """From where frozen ones start; the result has zeros, and held-out text gets better."""
    joint = ["--train-weights", "--teacher", str(root / "ck"), "--lm-weight", "1", "--masked-decay", "10"]
    settings = ["--weight-eps", "1e-8", "--train-norms", "--lr-multiplier", "1", "--adam-eps", "1e-4", *CALM]
    start = learn(root, "joint", "run/weights", *joint, *settings)
    frozen = ["--teacher", str(root / "ck"), "--lm-weight", "1", "--lr-multiplier", "1", "--adam-eps", "1e-4", *CALM]
    assert start == learn(root, "taught", "run/weights", *frozen)
    ends = [[r["eval_loss"] for r in read_metrics(root / name) if "eval_loss" in r][-1] for name in ("joint", "taught")]
    assert ends[0] < start - 0.05 and ends[0] < ends[1]
    masks, weights = Masks.load(root / "joint" / "decision"), exported(root, "joint")
    began = sparse(root)
    for name in prunable(root):
        assert not weights[name][~masks.get(name)].any()
        assert not torch.equal(weights[name], began[name])


def test_what_a_run_exports_has_zeros_and_its_bare_weights_are_not_exported(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, masks = sparse(root), Masks.load(root / "run" / "decision")
    for name in prunable(root):
        assert np.array_equal((weights[name] != 0).numpy() | ~masks.get(name).numpy(), np.ones_like(masks.get(name)))
        assert not weights[name][~masks.get(name)].any()
    capsys.readouterr()
    command = ["export", "--input", str(root / "run" / "weights"), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert (
        "before its decision is applied; give the run itself, or the checkpoint that trim writes"
        in capsys.readouterr().err
    )
