"""What `verify` counts as keeping to a pattern, and as equal logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune import ranks
from megatron_prune.__main__ import main
from megatron_prune.config import VerifyConfig
from megatron_prune.decision.target import parse_target
from megatron_prune.evaluation.verify import (
    NOTHING,
    TOLERANCE,
    TOLERANCE_GPU,
    _kept_too_many,
    _logits,
    allowed,
    count_zeros,
    device_for,
    difference_of,
    open_source,
)
from megatron_prune.kernels.selection import select_rows
from megatron_prune.model.pruning import FILE
from tests.models import byte_tokenizer, tiny_llama, words


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6])
def test_counts_rounded_by_row_hold_and_denser_weights_do_not(sparsity: float) -> None:
    target = parse_target(sparsity)
    score = torch.rand(40, 33, generator=torch.Generator().manual_seed(0)) + 0.1
    pruned = score * select_rows(score, sparsity)
    assert not _kept_too_many(count_zeros(pruned, target), target)
    assert _kept_too_many(count_zeros(score * select_rows(score, sparsity - 0.1), target), target)


def test_a_dense_weight_is_noticed_whatever_the_others_are() -> None:
    target = parse_target("2:4")
    assert _kept_too_many(count_zeros(torch.ones(4, 8), target), target)
    assert not _kept_too_many(count_zeros(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), target), target)


def test_logits_are_compared_by_the_largest() -> None:
    """Models whose logits are a thousand times as large are as equal; an absolute limit would not say so."""
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(2, 3, 50, generator=generator)
    for scale in (1e-3, 1.0, 1e3):
        near, far = (
            scale * (b + share * b.abs().max() * torch.randn(b.shape, generator=generator).sign())
            for share in (9e-6, 2e-5)
        )
        assert difference_of(near, scale * b, TOLERANCE)["holds"]
        assert not difference_of(far, scale * b, TOLERANCE)["holds"]
        assert difference_of(far, scale * b, TOLERANCE_GPU)["holds"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["a", "b", "both"])
def test_logits_that_are_not_finite_are_never_equal(value: float, where: str) -> None:
    a, b = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    for logits in {"a": [a], "b": [b], "both": [a, b]}[where]:
        logits[0, 0, 0] = value
    assert not difference_of(a, b, 1.0)["holds"]


def test_a_gpu_rounds_otherwise_and_what_is_given_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VerifyConfig(input=Path("x"), against="y")
    assert allowed(config) == TOLERANCE
    assert allowed(VerifyConfig(input=Path("x"), against="y", tolerance=0.0)) == 0.0
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    assert allowed(config) == TOLERANCE_GPU


def test_the_reference_is_on_the_gpu_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_for(10**12) == torch.device("cpu")
    monkeypatch.setattr(backend, "device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (48 * 10**9, 80 * 10**9))
    assert device_for(8 * 10**9) == torch.device("cuda", 1)
    assert device_for(13 * 10**9) == torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA, and what became of it when one weight went through bfloat16."""
    root = tmp_path_factory.mktemp("verify")
    tiny_llama(root / "hf")
    tensors = load_file(tiny_llama(root / "rounded") / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].bfloat16().float()
    save_file(tensors, root / "rounded" / "model.safetensors", metadata={"format": "pt"})
    return root


def test_one_layer_rounded_to_bfloat16_is_noticed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--input", str(model / "hf"), "--against", str(model / "hf")]) == 0
    assert main(["verify", "--input", str(model / "rounded"), "--against", str(model / "hf")]) == 1
    assert ": DIFFERENT" in capsys.readouterr().out


def test_one_process_has_transformers_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for its result: eight whole models of 70B would be in the memory of one machine."""
    source, tokens = open_source(model / "hf"), torch.zeros(1, 4, dtype=torch.long)
    found = _logits(source, backend.Layout(), tokens)
    assert found is not None and found.shape == (1, 4, source.config.vocab_size)
    monkeypatch.setattr(ranks, "acts_for_all", lambda: False)
    assert _logits(source, backend.Layout(), tokens) is None


@pytest.fixture(scope="module")
def pruned(model: Path) -> Path:
    """The same model pruned to 2:4, in every form that it can have."""
    root = model
    prune = ["--method", "magnitude", "--target", "2:4"]
    assert main(["prune", "--input", str(root / "hf"), "--output", str(root / "run"), *prune]) == 0
    for verb, source, output, *more in (
        ("trim", "run", "sparse"),
        ("export", "run", "exported"),
        ("export", "run", "masks.npz", "--format", "mask-npz"),
        ("import", "exported", "again"),
        ("import", "hf", "masked", "--mask", str(root / "masks.npz")),
        ("export", "run", "fms", "--format", "fms"),
        ("import", "fms", "from_fms"),
    ):
        assert main([verb, "--input", str(root / source), "--output", str(root / output), *more]) == 0
    return root


@pytest.mark.parametrize("form", ["run", "sparse", "exported", "again", "masked", "from_fms"])
def test_the_pattern_travels_and_is_checked(pruned: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--input", str(pruned / form)]) == 0
    told = capsys.readouterr().out
    assert "pattern 2:4: holds" in told and told.endswith("\nverified\n")


def test_a_pattern_that_is_gone_is_noticed_unasked(pruned: Path, tmp_path: Path) -> None:
    """Negative control: what the directory says of itself is compared, not believed."""
    shutil.copytree(pruned / "exported", tmp_path / "filled")
    tensors = load_file(tmp_path / "filled" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(1)
    save_file(tensors, tmp_path / "filled" / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", "--input", str(tmp_path / "filled")]) == 1
    (tmp_path / "filled" / FILE).write_text('{"format": 1, "method": "wanda", "target": "2 of 4", "parameters": null}')
    assert main(["verify", "--input", str(tmp_path / "filled")]) == 2


def test_what_proves_nothing_is_not_verified(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", "--input", str(model / "hf"), "--output", str(tmp_path / "result.json")]
    assert main(words) == 1
    assert capsys.readouterr().out.splitlines()[-1] == NOTHING
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["checked"] == [] and not result["holds"] and result["zeros"]["holds"]
    assert main([*words[:3], "--target", "num_layers=2"]) == 0
    assert main([*words[:3], "--target", "num_layers=1"]) == 1


def test_of_a_padded_export_only_what_still_holds_is_said(tmp_path: Path) -> None:
    """A budget that layers of different widths keep to is exceeded by their padding."""
    hf = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    given = ["--method", "flap", "--target", "parameters=33K", "--calibration", str(words(tmp_path / "w.jsonl"))]
    given += ["--calibration-samples", "4", "--calibration-seq-length", "16"]
    assert main(["prune", "--input", str(hf), "--output", str(tmp_path / "run"), *given]) == 0
    assert main(["verify", "--input", str(tmp_path / "run")]) == 0
    for form, status in (("padded", 1), ("blocks", 0)):
        output = str(tmp_path / form)
        assert main(["export", "--input", str(tmp_path / "run"), "--output", output, "--layers", form]) == 0
        assert main(["verify", "--input", output]) == status
