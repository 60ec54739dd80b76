"""Layers that lose different shares (OWL): the shares against a second computation, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_prune.__main__ import main
from megatron_prune.data.calibration import windows
from megatron_prune.decision.masks import Masks, check_mask
from megatron_prune.decision.target import Unstructured, parse_any_target
from megatron_prune.errors import UserError
from megatron_prune.methods.allocation import allocate
from tests.models import byte_tokenizer, tiny_model, words
from tests.runs import prune_to, refused_to_prune

WINDOWS = "4x32"
"""Of the calibration."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("owl")
    words(root / "words.jsonl")
    for family in ("llama", "gpt2", "qwen3_moe"):
        byte_tokenizer(tiny_model(root / family, family, vocab_size=257, num_hidden_layers=4))
    return root


def outliers(folder: Path, text: Path) -> dict[int, float]:
    """Layer -> share of its weights whose score is above five times their matrix's mean, by transformers' model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    squares: dict[str, Tensor] = {}
    linears = {name: m for name, m in model.named_modules() if name.endswith("_proj")}
    for name, module in linears.items():

        def watch(_module: object, inputs: tuple[Tensor, ...], name: str = name) -> None:
            squares[name] = squares.get(name, 0) + inputs[0].flatten(0, -2).double().square().sum(0)

        module.register_forward_pre_hook(watch)
    with torch.no_grad():
        model(windows([text], AutoTokenizer.from_pretrained(folder), 4, 32, 0).tokens)
    above, size = dict[int, int](), dict[int, int]()
    for name, module in linears.items():
        layer, score = int(name.split(".")[2]), module.weight.double().abs() * squares[name].sqrt()
        above[layer] = above.get(layer, 0) + int((score > 5 * score.mean()).sum())
        size[layer] = size.get(layer, 0) + score.numel()
    return {layer: above[layer] / size[layer] for layer in size}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_layers_with_outliers_keep_more(root: Path, tmp_path: Path, method: str) -> None:
    """By the paper's formula; what rounding takes is at most a weight a row."""
    assert prune_to(root, tmp_path / "run", method, "0.5,spread=0.2", windows=WINDOWS) == 0
    found = outliers(root / "llama", root / "words.jsonl")
    low, high, mean = min(found.values()), max(found.values()), sum(found.values()) / len(found)
    assert high > low > 0
    masks = Masks.load(tmp_path / "run" / "decision")
    density = dict[int, float]()
    for layer, share in found.items():
        mine = [masks.get(name) for name in masks.names() if f".layers.{layer}." in name]
        size = sum(mask.numel() for mask in mine)
        density[layer] = sum(int(mask.sum()) for mask in mine) / size
        wanted = 0.5 + (share - mean) / (high - low) * 0.2
        assert density[layer] == pytest.approx(wanted, abs=sum(mask.shape[0] for mask in mine) / size), layer
    assert max(density.values()) - min(density.values()) == pytest.approx(0.2, abs=0.03)
    assert 0 <= sum(density.values()) / 4 - 0.5 < 0.04  # what is rounded stays


def test_all_weights_together_meet_the_target() -> None:
    """Layers of different sizes too; layers that are alike lose the same."""
    found = allocate({0: 0.01, 1: 0.03, 2: 0.02}, {0: 100, 1: 300, 2: 50}, Unstructured(0.6, (), 0.1))
    assert sum(found[layer] * size for layer, size in {0: 100, 1: 300, 2: 50}.items()) == pytest.approx(0.6 * 450)
    assert found[0] - found[1] == pytest.approx(0.1) and found[0] > found[2] > found[1]
    assert allocate({0: 0.01, 1: 0.01}, {0: 8, 1: 8}, Unstructured(0.6, (), 0.1)) == {0: 0.6, 1: 0.6}


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_other_families_and_the_road(
    root: Path, tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The target travels, and is verified: each weight within the spread, all of them by the sparsity itself."""
    target = "0.5,spread=0.1"
    assert prune_to(root, tmp_path / "run", "wanda", target, family, windows=WINDOWS) == 0
    assert json.loads((tmp_path / "run_hf" / "pruning.json").read_text())["target"] == target
    for form in ("run", "run_hf"):
        capsys.readouterr()
        assert main(["verify", str(tmp_path / form)]) == 0
        assert f"pattern {target}: holds" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "run_hf"), "--target", "0.5"]) == 1
    file = next((tmp_path / "run_hf").glob("*.safetensors"))
    tensors = load_file(file)
    for tensor in tensors.values():  # a few zeros of every weight: each is still within the spread
        flat = tensor.view(-1)
        zeros = (flat == 0).nonzero()[: flat.numel() // 25, 0]
        flat[zeros] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["verify", str(tmp_path / "run_hf"), "--output", str(tmp_path / "found.json")]) == 1
    assert json.loads((tmp_path / "found.json").read_text())["pattern"]["too_dense"] == ["all weights together"]


def test_how_it_is_written() -> None:
    target = Unstructured(0.6, ("q_proj",), 0.16)
    assert str(target) == "0.6,spread=0.16,dense=q_proj" and parse_any_target(str(target)) == target
    assert parse_any_target({"sparsity": 0.6, "spread": 0.16, "dense": ["q_proj"]}) == target
    mask = torch.zeros(10, 100, dtype=torch.bool)
    mask[:, :45] = True
    check_mask(mask, Unstructured(0.6, (), 0.1), "w")
    with pytest.raises(UserError, match="keeps 450 of 1000 weights; sparsity 0.8,spread=0.1 keeps about 200"):
        check_mask(mask, Unstructured(0.8, (), 0.1), "w")


MISTAKES = {
    "too far": ("wanda", "0.5,spread=0.5", "spread 0.5 of sparsity 0.5 is not possible; allowed: below 0.5"),
    "negative": ("wanda", "0.9,spread=-0.1", "allowed: below 0.1"),
    "without text": ("magnitude", "0.5,spread=0.1", "it looks at no text: leave spread= out, or use wanda"),
    "a pattern": ("wanda", "2:4,spread=0.1", "is not understood"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(root: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    method, target, message = MISTAKES[case]
    refused_to_prune(root, tmp_path / "run", method, target, message, capsys)
