"""A model whose layers differ, through every verb and layout: logits, checkpoints, decisions, learned masks, export."""

from __future__ import annotations

import json
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import pytest
import torch

from megatron_prune.__main__ import main
from megatron_prune.errors import UserError
from megatron_prune.model.build import check_divisible
from megatron_prune.model.convert import HFReader
from megatron_prune.model.description import read_description
from tests.distributed.launch import ONE, PP2, TP2_SP, Layout, launch, must_pass
from tests.distributed.test_layouts import Case, differing, losses, masks
from tests.models import tiny_blocks, words

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = 1e-4
MODEL = "blocks"
CASES = [Case("wanda", "2:4"), Case("sparsegpt", "2:4", ("--true-sequential",))]
LAYOUTS = [TP2_SP, PP2]
STEPS = 4
FAMILIES = ("gpt2", "qwen3", "nemotron", "gemma3_text")
"""With biases and transposed weights, with norms of heads, without a gate, with windows and further norms."""


def commands(root: Path, layout: Layout) -> list[list[str]]:
    """Import in a layout, and everything else from the checkpoint that the layout before it has written."""
    name, flags = layout.name, layout.flags()
    model = str(root / {ONE: "one", TP2_SP: "one", PP2: "tp2sp"}[layout])
    runs, data = root / "runs" / MODEL / name, str(root / "words.jsonl")
    calibration = ["--calibration", data, "--calibration-samples", "5", "--calibration-seq-length", "32"]
    learn = ["--seq-length", "32", "--global-batch-size", "2", "--train-iters", str(STEPS), "--temperature-end", "2"]
    prune = ["prune", "--input", model, *flags]
    return [
        ["import", "--input", str(root / "hf"), "--output", str(root / name), *flags],
        ["verify", "--input", model, "--against", str(root / "hf"), "--output", str(root / f"{name}.json"), *flags],
        *(
            [*prune, "--output", str(runs / case.name), "--method", case.method, "--target", case.target]
            + [*case.options, *([] if case.method == "magnitude" else calibration)]
            for case in CASES
        ),
        [*prune, "--output", str(runs / "learned"), "--method", "maskllm", "--target", "2:4", "--data", data, *learn],
        ["trim", "--input", str(runs / CASES[1].name), "--output", str(root / f"{name}_trimmed"), *flags],
        *(
            ["export", "--input", str(root / f"{name}_trimmed"), "--output", str(root / f"{name}_{form}")]
            + ["--layers", form, *flags]
            for form in ("blocks", "padded")
        ),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, and every verb on it in every layout."""
    root = tmp_path_factory.mktemp("blocks")
    tiny_blocks(root / "hf")
    words(root / "words.jsonl")
    others = []
    for family in FAMILIES:
        tiny_blocks(root / f"{family}_hf", family)
        given, model = str(root / f"{family}_hf"), str(root / family)
        others.append(["import", "--input", given, "--output", model])
        others.append(["verify", "--input", model, "--against", given, "--output", f"{model}.json"])
    must_pass(launch(1, [*commands(root, ONE), *others], root / "commands"))
    must_pass(launch(2, [command for layout in LAYOUTS for command in commands(root, layout)], root / "commands"))
    return root


@pytest.mark.parametrize("name", [*(layout.name for layout in (ONE, *LAYOUTS)), *FAMILIES])
def test_logits_equal_transformers(root: Path, name: str) -> None:
    """Of transformers' ordinary model with every layer padded; PP=2 reads a checkpoint written at TP=2."""
    found = json.loads((root / f"{name}.json").read_text())["logits"]
    assert found["max_absolute_difference"] <= TOLERANCE
    assert found["same_argmax"] == 1.0 and found["largest_logit"] > 0.1


def test_inspect_says_what_the_layers_are(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--input", str(root / "one")]) == 0
    assert "heads/groups/ffn of each layer: 0/0/48 4/2/64 2/2/0 4/4/32" in capsys.readouterr().out


def test_a_layout_that_a_layer_does_not_allow_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "--input", str(root / "one"), "--method", "maskllm", "--target", "2:4", "--seq-length", "32"]
    assert main([*plan, "--processes", "4", "--tensor-model-parallel-size", "4"]) == 2
    assert "2 query groups were given; this layout needs a multiple of 4" in capsys.readouterr().err
    config = read_description(root / "one").config
    with pytest.raises(UserError, match="the model has 2 query groups in layer 1; allowed are the divisors of 2: 1, 2"):
        check_divisible(config, backend.Layout(tensor=4))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_shot_decision_is_the_same(root: Path, case: Case, layout: Layout) -> None:
    assert differing(masks(root, ONE, MODEL, case.name), masks(root, layout, MODEL, case.name)) == 0.0


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_mask_learning_follows_one_process(root: Path, layout: Layout) -> None:
    expected, found = losses(root, ONE, MODEL), losses(root, layout, MODEL)
    assert len(expected) == STEPS and found == pytest.approx(expected, abs=1e-5)
    assert differing(masks(root, ONE, MODEL, "learned"), masks(root, layout, MODEL, "learned")) < 1e-3


@pytest.mark.parametrize("form", ["blocks", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_exports_are_bit_equal(root: Path, form: str, layout: Layout) -> None:
    one, other = (HFReader(root / f"{x.name}_{form}") for x in (ONE, layout))
    assert one.config == other.config and (one.model_config.blocks is None) == (form == "padded")
    for name in one.names():
        assert torch.equal(one.read(name), other.read(name)), name
