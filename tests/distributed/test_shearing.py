"""Masks of units trained with the weights follow one process in every layout, also over a kill; so do the shares of two
domains of text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.decision.trimming import Trim
from megatron_prune.model.untrusted import read_common, read_table
from tests.distributed.launch import (
    DP2,
    ONE,
    PP2,
    TP2,
    TP2_PP2_SP,
    TP2_SP,
    Layout,
    launch,
    must_pass,
    picked,
    with_nightly,
)
from tests.models import byte_tokenizer, tiny_llama, words
from tests.runs import curve, reopened

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS, SAVED = 5, 3
PP2_CP2 = Layout("pp2cp2", 4, pipeline=2, context=2)
LAYOUTS = [TP2, TP2_SP, PP2, DP2, TP2_PP2_SP, PP2_CP2]
RARE = [TP2_PP2_SP.name, PP2_CP2.name]
"""On four processes, which take long on few cores: only nightly."""
TARGET = "num_layers=3,hidden_size=48,ffn_hidden_size=80,num_attention_heads=2,num_query_groups=2"
CONTROL, MOVED = "control", "moved"


def shear(root: Path, layout: Layout, name: str = "", **options: Any) -> list[str]:
    """Five steps of two windows."""
    given = {
        "method": "sheared_llama",
        "target": TARGET,
        "input": root / "model",
        "output": root / (name or layout.name),
        "data": [root / "few.jsonl", root / "words.jsonl"],
        "eval_data": [root / "words.jsonl", root / "few.jsonl"],
        "eval_windows": 4,
        "domain_interval": 2,
        "domain_targets": [1, 5],
        "seq_length": 32,
        "global_batch_size": 2,
        "train_iters": STEPS,
        "adam_eps": 1e-5,  # above the rounding of the smallest gradients, which Adam would make as large as any other
        "save_interval": SAVED,
        "lr": 1e-3,
        "mask_start": 0.5,
        "mask_lr": 0.2,
        "target_warmup": 0.5,
        **options,
    }
    words = [[f"--{key.replace('_', '-')}", *map(str, x if isinstance(x, list) else [x])] for key, x in given.items()]
    return ["prune", *(word for part in words for word in part), *layout.flags()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Every layout's run, one of another seed, and one that goes on in another layout after three steps."""
    root = tmp_path_factory.mktemp("shearing")
    words(root / "words.jsonl")
    words(root / "few.jsonl", documents=16, seed=1)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8)
    byte_tokenizer(tiny_llama(root / "hf", num_key_value_heads=4, vocab_size=257, **sizes))
    first = ["import", "--input", str(root / "hf"), "--output", str(root / "model")]
    must_pass(launch(1, [first, shear(root, ONE)], root / "commands"))
    reopened(root / ONE.name, root / MOVED, SAVED)
    for processes in (2, 4):
        layouts = picked(request, LAYOUTS, lambda layout: layout.name not in RARE)
        commands = [shear(root, layout) for layout in layouts if layout.processes == processes]
        if processes == 2:
            commands += [[*shear(root, TP2_SP, MOVED), "--resume"], ["unreduced"], shear(root, DP2, CONTROL)]
        must_pass(launch(processes, commands, root / "commands"))
    return root


def masks(root: Path, name: str) -> dict[str, torch.Tensor]:
    """What the last checkpoint has learned beside the weights."""
    path = root / name / "checkpoints" / f"step_{STEPS:07d}"
    saved = read_common(path, read_table(path))["masks"]
    return {key: state["value"] for key, state in saved.items()}


def difference(root: Path, name: str) -> float:
    """The largest one between the masks of a run and those of one process."""
    mine, other = masks(root, name), masks(root, ONE.name)
    assert mine.keys() == other.keys() and len(mine) == 10
    return max(float((mine[key] - other[key]).abs().max()) for key in mine)


@pytest.mark.parametrize("name", with_nightly([*(layout.name for layout in LAYOUTS), MOVED], lambda x: x not in RARE))
def test_training_follows_one_process(root: Path, name: str) -> None:
    expected = curve(root / ONE.name)
    assert len(expected) == STEPS
    assert curve(root / name) == pytest.approx(expected, abs=1e-5)
    shares = curve(root / name, "domain_weight/few.jsonl")
    assert len(shares) == 2 and shares[1] > shares[0] > 0.3
    assert shares == pytest.approx(curve(root / ONE.name, "domain_weight/few.jsonl"), abs=1e-5)
    assert difference(root, name) < 1e-5
    a, b = (Trim.load(root / run / "decision").units for run in (ONE.name, name))
    assert a == b


def test_masks_move(root: Path) -> None:
    """What is compared is far from the start, whose spread is 0.01, and masks of a kind differ."""
    found = masks(root, ONE.name)
    assert all(float(found[kind].std()) > 0.1 for kind in ("layer", "hidden", "group", "head", "ffn"))


def test_unreduced_gradients_are_noticed(root: Path) -> None:
    """Negative control: masks that follow the gradients of one replica."""
    assert difference(root, CONTROL) > 1e-3


@pytest.mark.parametrize("name", [TP2_SP.name, PP2.name, MOVED])
def test_weights_are_the_same(root: Path, name: str) -> None:
    import megatron_prune.backend as backend
    from megatron_prune.model.checkpoint import load_model

    with backend.running(backend.Layout()):
        a, b = (load_model(root / run / "weights", backend.Layout()) for run in (ONE.name, name))
        for parameter, other in zip(a.parameters.values(), b.parameters.values(), strict=True):
            torch.testing.assert_close(parameter, other, atol=1e-5, rtol=1e-5)
