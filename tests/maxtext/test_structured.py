"""Smaller models in MaxText: of real runs, of what trim makes of them, and trained on; and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_prune.__main__ import main
from megatron_prune.maxtext.masks import PackedMasks
from megatron_prune.model.convert import HFReader
from tests.maxtext import environment
from tests.maxtext.test_maxtext import difference, reference, verb
from tests.models import byte_tokenizer, tiny_llama, words

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
CALIBRATED = ["--calibration", "TEXT", "--calibration-samples", "8", "--calibration-seq-length", "32"]
TRAINED = ["--data", "TEXT", "--seq-length", "32", "--global-batch-size", "1"]
METHODS: dict[str, list[str]] = {
    "minitron": ["hidden_size=24,ffn_hidden_size=40,num_query_groups=1", *CALIBRATED],
    "shortgpt": ["num_layers=2", *CALIBRATED],
    "flap": ["parameters=38K", *CALIBRATED],
    "darwinlm": ["parameters=38K", *CALIBRATED, "--generations", "1", "--offspring", "2", "--survivors", "1"]
    + ["--levels", "3", "--fitness-tokens", "64", "--training-tokens", "0"],
    "sheared_llama": ["num_layers=2,ffn_hidden_size=40", *TRAINED, "--train-iters", "2"],
}
"""Target and options; of flap and darwinlm layers of different sizes come."""
UNEQUAL = ("flap", "darwinlm")
FORMS = ("run", "trimmed", "recovered")
CASES = [(method, "run") for method in METHODS]
CASES += [("minitron", "trimmed"), ("flap", "trimmed"), ("shortgpt", "recovered"), ("flap", "recovered")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every method, checkpoints of them, and those trained two steps: with references, and in MaxText."""
    environment.python()
    root = tmp_path_factory.mktemp("structured")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257, num_hidden_layers=3, head_dim=16))
    text = words(root / "words.jsonl", documents=8)
    calls = []
    for method, (target, *options) in METHODS.items():
        run, trimmed, recovered = (root / f"{method}_{form}" for form in FORMS)
        given = [str(text) if word == "TEXT" else word for word in options]
        verb("prune", "--input", root / "hf", "--output", run, "--method", method, "--target", target, *given)
        verb("trim", "--input", run, "--output", trimmed)
        if (method, "recovered") in CASES:
            data = [str(text) if word == "TEXT" else word for word in TRAINED]
            verb("train", "--input", trimmed, "--output", recovered, *data, "--train-iters", 2, "--lr", "1e-3")
        for form, folder in zip(FORMS, (trimmed, trimmed, recovered / "weights"), strict=True):
            name = f"{method}_{form}"
            if (method, form) not in CASES:
                continue
            verb("export", "--input", folder, "--output", root / f"{name}_hf", "--format", "hf")
            reference(root / f"{name}_hf", root / f"{name}.npz")
            verb("export", "--input", root / name, "--output", root / f"{name}_maxtext", "--format", "maxtext")
            places = [root / f"{name}_maxtext", root / f"{name}.npz", root / f"{name}_out.npz"]
            back = ["--input", places[0], "--output", root / f"{name}_back"]
            calls += [["logits", *places], ["main", "export", *back]]
    assert all(answer == "done" or answer.startswith("0 ") for answer in environment.run(root, calls))
    return root


@pytest.mark.parametrize(("method", "form"), CASES)
def test_logits_are_those_of_transformers(root: Path, method: str, form: str) -> None:
    largest, agreement = difference(root, f"{method}_{form}", f"{method}_{form}_out")
    assert largest < 1e-4 and agreement == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_the_models_are_smaller(root: Path, method: str) -> None:
    sizes = json.loads((root / f"{method}_run_maxtext" / "megatron_prune_maxtext.json").read_text())["model"]
    whole = HFReader(root / "hf").model_config
    changed = [name for name in ("num_layers", "hidden_size", "ffn_hidden_size") if sizes[name] != vars(whole)[name]]
    assert changed or method in UNEQUAL


def test_a_run_is_what_trim_makes_of_it_and_training_moves_it(root: Path) -> None:
    logits = [np.load(root / f"flap_{form}_out.npz")["logits"] for form in FORMS]
    assert np.array_equal(logits[0], logits[1]) and np.abs(logits[1] - logits[2]).max() > 1e-3


@pytest.mark.parametrize(("method", "form"), CASES)
def test_the_way_back(root: Path, method: str, form: str) -> None:
    """Bit-equal; of padded models what transformers computes is."""
    name = f"{method}_{form}"
    masks = root / f"{name}_maxtext" / "masks.npz"
    assert masks.exists() == (method in UNEQUAL)
    if method not in UNEQUAL:
        given, back = (load_file(root / f"{name}_{end}" / "model.safetensors") for end in ("hf", "back"))
        assert given.keys() == back.keys() and all(torch.equal(given[key], back[key]) for key in given)
        return
    wide = HFReader(root / f"{name}_back").model_config
    removed = PackedMasks(masks, wide)
    assert sum(int((~removed[key]).sum()) for key in removed) > 0
    reference(root / f"{name}_back", root / f"{name}_again.npz")
    assert difference(root, name, f"{name}_again")[0] < 1e-5


def test_a_learning_run_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = json.loads((root / "shortgpt_run" / "run.json").read_text()) | {"state": "searching"}
    (root / "unfinished").mkdir()
    (root / "unfinished" / "run.json").write_text(json.dumps(about))
    words = ["--input", str(root / "unfinished"), "--output", str(root / "none"), "--format", "maxtext"]
    assert main(["export", *words]) == 2 and "has no decision yet" in capsys.readouterr().err
