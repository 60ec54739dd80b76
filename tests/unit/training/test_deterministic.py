"""`--deterministic`: what GPUs need for the same bits in every run is on while a run works, and gone after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip
import pytest
import torch

from megatron_prune.__main__ import main
from megatron_prune.kernels.selection import kth_smallest
from megatron_prune.model.build import transformer_config
from megatron_prune.training import loop
from tests.models import byte_tokenizer, tiny_llama, words
from tools.kill_test import curve, masks


def state() -> dict[str, Any]:
    """What libraries look at."""
    return {
        "torch": torch.are_deterministic_algorithms_enabled(),
        "core": backend.is_deterministic(),
        **{name: os.environ.get(name) for name in backend.DETERMINISTIC},
    }


ON = {"torch": True, "core": True, **backend.DETERMINISTIC}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deterministic")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    return root


def run(root: Path, output: str, verb: str, *more: str) -> Path:
    """A run of three steps."""
    places = ["--input", str(root / "hf"), "--output", str(root / output), "--data", str(root / "words.jsonl")]
    sizes = "--seq-length 16 --global-batch-size 2 --train-iters 3 --lr 1e-3".split()
    assert main([*verb.split(), *places, *sizes, *more]) == 0
    return root / output


def test_it_ends_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in backend.DETERMINISTIC:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    before = state()
    with backend.deterministic(False):
        assert state() == before
    with pytest.raises(RuntimeError, match="inside"), backend.deterministic(True):
        assert state() == ON
        raise RuntimeError("inside")
    assert state() == before and before["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "1"
    monkeypatch.setenv("NCCL_ALGO", "Ring")  # always the same sums, too
    with backend.deterministic(True):
        assert state() == ON | {"NCCL_ALGO": "Ring"}


VERBS = {
    "prune --method maskllm --target 2:4": "megatron_prune.training.loop.Trainer",
    "train": "megatron_prune.training.loop.Trainer",
    "train --engine fsdp": "megatron_prune.fsdp.trainer.FsdpTrainer",
    "prune --method sheared_llama --target num_layers=1": "megatron_prune.training.loop.Trainer",
}


@pytest.mark.parametrize(("verb", "trainer"), VERBS.items())
def test_every_step_is_taken_with_it(root: Path, verb: str, trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And on a CPU changes nothing: the run is the one without it, where the weights' gradients are."""
    seen = []
    step = pytest.importorskip(trainer.rpartition(".")[0]).__dict__[trainer.rpartition(".")[2]].step

    def watched(self: Any, number: int) -> Any:
        seen.append(state())
        return step(self, number)

    monkeypatch.setattr(f"{trainer}.step", watched)
    name = verb.replace(" ", "_")
    found, before = run(root, f"{name}_with", verb, "--deterministic"), state()
    assert seen == [ON] * 3 and before["torch"] is False
    assert json.loads((found / "environment.json").read_text())["deterministic"] is True
    plain = run(root, name, verb)
    assert seen[3:] == [before] * 3
    for record, other in zip(curve(found), curve(plain), strict=True):
        assert record == pytest.approx(other, rel=1e-6)
    assert masks(found) == masks(plain)


def test_megatron_core_is_told(root: Path) -> None:
    from megatron_prune.model.convert import HFReader

    config = HFReader(str(root / "hf")).model_config
    with backend.running(backend.Layout()):
        assert transformer_config(config, backend.Layout(), torch.float32).deterministic_mode is False
        with backend.deterministic(True):
            assert transformer_config(config, backend.Layout(), torch.float32).deterministic_mode is True


def test_one_shot_methods_take_it_too(root: Path) -> None:
    words = ["prune", "--input", str(root / "hf"), "--output", str(root / "one"), "--method", "magnitude"]
    assert main([*words, "--target", "0.5", "--deterministic"]) == 0
    assert json.loads((root / "one" / "environment.json").read_text())["deterministic"] is True


def test_a_run_may_go_on_without_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It changes roundings, not what is trained."""
    verb = "prune --method maskllm --target 2:4"
    run(root, "first", verb, "--deterministic", "--save-interval", "1", "--time-limit", "1e-9")
    assert "go on with --resume" in capsys.readouterr().out
    run(root, "first", verb, "--resume")
    assert masks(root / "first") == masks(run(root, "never_stopped", verb))


def test_what_has_no_such_form_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(self: Any, number: int) -> Any:
        raise RuntimeError("histc_cuda does not have a deterministic implementation, but you set 'torch.use_...'")

    monkeypatch.setattr(loop.Trainer, "step", step)
    places = ["--input", str(root / "hf"), "--output", str(root / "no"), "--data", str(root / "words.jsonl")]
    sizes = "--seq-length 16 --global-batch-size 2 --train-iters 3".split()
    capsys.readouterr()
    assert main(["train", *places, *sizes, "--deterministic"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--deterministic: histc_cuda can give other bits in every run here: leave it out")


def test_selection_needs_no_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses its selection on a GPU for the sake of indices, which are not used here."""
    seen = []

    def kthvalue(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return original(*args, **kwargs)

    original = torch.kthvalue
    monkeypatch.setattr(torch, "kthvalue", kthvalue)
    with backend.deterministic(True):
        assert kth_smallest(torch.tensor([[3, 1, 2]]), 1).item() == 2  # not float32: the way of a GPU
        assert torch.are_deterministic_algorithms_enabled()
    assert seen == [False]
