"""Gemma 3 in every layout: the same masks, units and losses, whatever its norms and windows are spread over.

Gradients of norms that are inside of row-parallel linears are what sequence parallelism could lose.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prune.decision.trimming import Trim
from tests.distributed.launch import ONE, PP2, TP2_SP, Layout, launch, must_pass
from tests.distributed.test_layouts import differing, losses, masks
from tests.models import byte_tokenizer, tiny_model, words
from tests.runs import curve

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
MODEL = "model"
STEPS = 4
LAYOUTS = [TP2_SP, PP2]
MASKS = {
    "wanda": ["wanda", "2:4"],
    "sparsegpt": ["sparsegpt", "2:4", "--true-sequential"],
    "control": ["layout_dependent", "2:4"],
}
UNITS = {
    "minitron": ["minitron", "hidden_size=24,ffn_hidden_size=32,num_query_groups=1", "--refit", "propagated"],
    "shortgpt": ["shortgpt", "num_layers=3"],
}

TOLERANCE = {"learned": 1e-4, "recovered": 1e-5}
"""Of losses. Adam's first steps take the sign of gradients that are rounding alone; where logits of masks are trained
with the weights, and ten times as fast, that grows: measured 2.6e-5 after four steps, and 2.4e-4 in gradient norms.
"""


def commands(root: Path, layout: Layout) -> list[list[str]]:
    """Everything in a layout; what is trained is read as one process has written it."""
    runs, text = root / "runs" / MODEL / layout.name, str(root / "words.jsonl")
    calibration = ["--calibration", text, "--calibration-samples", "5", "--calibration-seq-length", "32"]
    train = ["--data", text, "--seq-length", "32", "--global-batch-size", "4", "--train-iters", str(STEPS)]
    source = ["--input", str(root / MODEL), *layout.flags()]
    learn = ["--method", "maskllm", "--target", "2:4", "--temperature-end", "2", "--train-weights", "--lr", "1e-3"]
    pruned = str(root / "runs" / MODEL / ONE.name / "wanda")
    found = [
        ["prune", *source, "--output", str(runs / name), "--method", method, "--target", target, *more]
        + (calibration if name != "control" else [])
        for name, (method, target, *more) in (MASKS | UNITS).items()
    ]
    found.append(["prune", *source, "--output", str(runs / "learned"), *learn, *train])
    found.append(
        ["train", "--input", pruned, "--output", str(runs / "recovered"), "--lr", "1e-3", *train, *layout.flags()]
    )
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it."""
    root = tmp_path_factory.mktemp("gemma3")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_model(root / "hf", "gemma3_text", vocab_size=257, num_hidden_layers=4))
    first = ["import", "--input", str(root / "hf"), "--output", str(root / MODEL)]
    must_pass(launch(1, [first, *commands(root, ONE)], root / "commands"))
    must_pass(launch(2, [each for layout in LAYOUTS for each in commands(root, layout)], root / "commands"))
    return root


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", MASKS)
def test_masks_are_the_same(root: Path, name: str, layout: Layout) -> None:
    share = differing(masks(root, ONE, MODEL, name), masks(root, layout, MODEL, name))
    assert share > 0.1 if name == "control" else share == 0.0


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", UNITS)
def test_units_are_the_same(root: Path, name: str, layout: Layout) -> None:
    runs = root / "runs" / MODEL
    found, expected = (Trim.load(runs / x.name / name / "decision").units for x in (layout, ONE))
    assert (
        found == expected and (len(found.layers), len(found.hidden)) == {"minitron": (4, 24), "shortgpt": (3, 32)}[name]
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", ["learned", "recovered"])
def test_training_follows_one_process(root: Path, name: str, layout: Layout) -> None:
    runs, tolerance = root / "runs" / MODEL, TOLERANCE[name]
    expected, found = losses(root, ONE, MODEL, name), losses(root, layout, MODEL, name)
    assert len(expected) == STEPS and abs(expected[0] - expected[-1]) > 10 * tolerance * expected[0]
    assert found == pytest.approx(expected, rel=tolerance)
    norms = [curve(runs / x.name / name, "grad_norm") for x in (layout, ONE)]
    assert norms[0][0] == pytest.approx(norms[1][0], rel=2e-6), "before the first update"
    assert norms[0] == pytest.approx(norms[1], rel=10 * tolerance)
