"""How many tokens each expert gets, before and after experts were removed: `evaluate --expert-load` and `report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.__main__ import main
from tests.models import byte_tokenizer, tiny_llama, tiny_model, words

WINDOW, WINDOWS = 16, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, what is left of it, and both evaluated."""
    root = tmp_path_factory.mktemp("load")
    words(root / "words.jsonl")
    (root / "text.txt").write_text((root / "words.jsonl").read_text()[:3000])
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "mlp_only_layers": [1]}
    byte_tokenizer(tiny_model(root / "hf", "qwen3_moe", vocab_size=257, **sizes))
    text = ["--calibration", root / "words.jsonl", "--calibration-samples", "4", "--calibration-seq-length", "16"]
    target = ["--method", "minitron", "--target", "num_moe_experts=5,moe_ffn_hidden_size=8"]
    for command in (
        ["import", "--input", root / "hf", "--output", root / "dense"],
        ["prune", "--input", root / "dense", "--output", root / "run", *target, *text],
        ["trim", "--input", root / "run", "--output", root / "small"],
        evaluation(root, "dense"),
        evaluation(root, "small"),
        ["report", root / "run", root / "dense.json", root / "small.json", "--output", root / "page.html"],
    ):
        assert main(list(map(str, command))) == 0, command
    return root


def evaluation(root: Path, model: str) -> list[object]:
    """The verb with the count."""
    text = ["--text", root / "text.txt", "--window", WINDOW, "--windows", WINDOWS, "--expert-load"]
    return ["evaluate", "--input", root / model, *text, "--output", root / f"{model}.json"]


def test_counts_are_those_of_transformers_router(root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = json.loads((root / "dense.json").read_text())["expert_tokens"]
    text = AutoTokenizer.from_pretrained(root / "hf")((root / "text.txt").read_text(), add_special_tokens=False)
    tokens = torch.tensor(text["input_ids"][: WINDOW * WINDOWS]).view(WINDOWS, WINDOW)
    model = AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float32).eval()
    chosen: list[Any] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_hook(lambda _m, inputs, _o: chosen.append(inputs[1]))
    with torch.no_grad():
        model(tokens)
    assert found[1] is None
    expected = [torch.bincount(each.flatten(), minlength=8).tolist() for each in chosen]
    assert [found[0], found[2]] == expected and sum(found[0]) == 3 * WINDOW * WINDOWS


def test_fewer_experts_share_the_same_tokens(root: Path) -> None:
    found = json.loads((root / "small.json").read_text())["expert_tokens"]
    assert [layer and len(layer) for layer in found] == [5, None, 5]
    assert sum(found[0]) == 3 * WINDOW * WINDOWS


def test_the_report_shows_them_and_the_neurons_of_experts(root: Path) -> None:
    page = (root / "page.html").read_text()
    assert "Load of experts" in page and page.count('alt="tokens of experts of') == 2
    counts = json.loads((root / "dense.json").read_text())["expert_tokens"]
    fullest = max(max(layer) * 8 / sum(layer) for layer in counts if layer)
    assert f'<td class="n">{fullest:.2f}</td>' in page
    assert f"neurons of experts, side by side: {2 * 5 * 8} of {3 * 8 * 24}" in page


def test_without_experts_it_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "dense")]) == 0
    command = ["evaluate", "--text", str(root / "text.txt"), "--expert-load", "--input"]
    for model, expected in (("dense", "a llama model has no experts"), ("hf", "is no Megatron checkpoint")):
        assert main([*command, str(tmp_path / model)]) == 2
        assert expected in capsys.readouterr().err
