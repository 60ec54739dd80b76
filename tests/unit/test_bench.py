"""The `bench` verb: dense figures and plain words without 2:4 kernels, both with them, and one line for mistakes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.evaluation import speed as bench
from tests.models import tiny_llama, tiny_model

FAST = "--prompt-length 8 --new-tokens 2 --repeats 1".split()
FOLDERS = ("original", "dense", "run", "sparse", "pruned")
needs_no_kernels = pytest.mark.skipif(bench.missing_kernels() is None, reason="this machine has 2:4 kernels")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, its Megatron checkpoint, and what pruning to 2:4 and exporting it gives."""
    root = tmp_path_factory.mktemp("bench")
    tiny_llama(root / "original")
    for command in (
        "import --input original --output dense",
        "prune --input dense --output run --method magnitude --target 2:4",
        "trim --input run --output sparse",
        "export --input sparse --output pruned --format hf",
    ):
        words = [str(root / word) if word in FOLDERS else word for word in command.split()]
        assert main(words) == 0, command
    return root


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must be refused."""
    capsys.readouterr()
    assert main(["bench", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@needs_no_kernels
def test_without_kernels_it_says_so_and_measures_dense(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = root / "bench.json"
    words = ["bench", "--input", str(root / "pruned"), "--output", str(output), "--batch-sizes", "1", "3", *FAST]
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert main(words) == 0
    captured = capsys.readouterr()
    assert not captured.err and not [each for each in told if "cache" in str(each.message)]
    printed = captured.out.splitlines()
    assert printed[0].startswith("no 2:4 kernels here (") and printed[0].endswith("): dense figures only")
    assert [line.split(":")[0] for line in printed if line.startswith("batch")] == ["batch 1, dense", "batch 3, dense"]
    result = json.loads(output.read_text())
    assert "sparse" not in result and result["no_sparse_kernels"]
    assert [figures["batch_size"] for figures in result["dense"]] == [1, 3]
    for figures in result["dense"]:
        tokens = figures["batch_size"] * 8
        assert figures["prefill_tokens_per_s"] == pytest.approx(tokens / figures["prefill_s"])
        assert figures["decode_tokens_per_s"] == pytest.approx(figures["batch_size"] / figures["decode_s_per_token"])
        assert figures["peak_bytes"] > result["dense_bytes"] > 0
    assert {"python", "packages", "devices"} <= set(result["environment"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_pruned_weight_is_compressed(
    family: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way through on a GPU, with a stand-in for its kernels that sees rows `[out, in]` and gives them back."""
    seen: list[Tensor] = []

    def stand_in(rows: Tensor) -> Tensor:
        assert rows.is_contiguous() and (rows.unflatten(1, (-1, 4)) != 0).sum(-1).max() <= 2
        seen.append(rows)
        return rows.clone()

    monkeypatch.setattr(bench, "missing_kernels", lambda: None)
    monkeypatch.setattr(bench, "to_sparse_semi_structured", stand_in)
    model = root / "pruned" if family == "llama" else pruned_gpt2(tmp_path / "gpt2")
    assert main(["bench", "--input", str(model), "--output", str(tmp_path / "x.json"), *FAST]) == 0
    result = json.loads((tmp_path / "x.json").read_text())
    assert len(seen) == (14 if family == "llama" else 8)
    assert result["no_sparse_kernels"] is None and len(result["sparse"]) == len(result["dense"]) == 2
    assert result["largest_logit_difference"] == 0.0 < result["largest_logit"]
    assert "times as fast" in capsys.readouterr().out


def pruned_gpt2(path: Path) -> Path:
    """A GPT-2 whose weights, stored `[in, out]`, keep the first two of every four inputs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(path, "gpt2"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".h." in name and parameter.dim() == 2:
                parameter.unflatten(0, (-1, 4))[:, 2:] = 0.0
    model.save_pretrained(path)
    return path


def test_kernels_that_refuse_a_weight_are_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(rows: Tensor) -> Tensor:
        raise RuntimeError("Error original_tensor.shape is not supported!")

    monkeypatch.setattr(bench, "missing_kernels", lambda: None)
    monkeypatch.setattr(bench, "to_sparse_semi_structured", refuse)
    message = refused(["--input", str(root / "pruned"), *FAST], capsys)
    assert "do not take model.layers.0.self_attn.q_proj.weight" in message and "--dtype" in message


CASES = {
    "missing": (["--input", "ROOT/nowhere"], "does not exist"),
    "not pruned": (
        ["--input", "ROOT/original", *FAST],
        "is not 2:4: 4608 of 4608 groups hold more than 2 of 4 weights",
    ),
    "too long": (["--input", "ROOT/pruned", "--prompt-length", "512"], "544 tokens and the model reads at most 512"),
    "no batch": (["--input", "ROOT/pruned", "--batch-sizes", "0"], "allowed: one or more numbers from 1"),
    "output exists": (["--input", "ROOT/pruned", "--output", "ROOT/original"], "already exists"),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_one_line(case: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = CASES[case]
    assert message in refused([word.replace("ROOT", str(root)) for word in words], capsys)
