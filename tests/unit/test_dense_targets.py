"""Targets that leave some weights dense: what they mean, and what becomes of those weights and of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.__main__ import main
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.target import NM, Unstructured, parse_any_target
from megatron_prune.errors import UserError
from tests.models import small_models
from tests.runs import prune_to, refused_to_prune

DENSE = "down_proj+layers.1.*v_proj"
METHODS = [("magnitude", "2:4"), ("wanda", "0.5"), ("sparsegpt", "2:4")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    small_models(root)
    return root


def left(name: str) -> bool:
    """What `DENSE` means, by hand."""
    return "down_proj" in name or ("layers.1." in name and name.endswith("v_proj.weight"))


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("2:4,dense=down_proj+layers.0.", NM(2, 4, ("down_proj", "layers.0."))),
        ("0.5,dense=q_proj", Unstructured(0.5, ("q_proj",))),
    ],
)
def test_they_are_written_as_they_are_read(text: str, target: NM | Unstructured) -> None:
    assert parse_any_target(text) == target and str(target) == text
    sizes = {"n": 2, "m": 4} if isinstance(target, NM) else {"sparsity": 0.5}
    assert parse_any_target({**sizes, "dense": list(target.dense)}) == target
    assert target != parse_any_target(text.partition(",")[0])


@pytest.mark.parametrize(("method", "target"), METHODS)
def test_what_is_named_stays_and_the_rest_is_pruned(root: Path, tmp_path: Path, method: str, target: str) -> None:
    assert prune_to(root, tmp_path / "some", method, f"{target},dense={DENSE}") == 0
    assert prune_to(root, tmp_path / "all", method, target) == 0
    before = load_file(root / "llama" / "model.safetensors")
    some, all_ = (load_file(tmp_path / f"{name}_hf" / "model.safetensors") for name in ("some", "all"))
    masks, every = (Masks.load(tmp_path / name / "decision") for name in ("some", "all"))
    assert sum(map(left, masks.names())) == 3
    for name in masks.names():
        if left(name):
            assert masks.get(name).all() and torch.equal(some[name], before[name]), name
        else:
            half = {"2:4": some[name].unflatten(1, (-1, 4)), "0.5": some[name].unflatten(1, (1, -1))}[target]
            assert (half != 0).sum(2).float().mean() == half.shape[2] / 2, name
        if ".layers.0." in name and not left(name):  # nothing before it is left dense
            assert torch.equal(masks.get(name), every.get(name)) and torch.equal(some[name], all_[name]), name
    assert any(not torch.equal(masks.get(name), every.get(name)) for name in masks.names())


def test_they_travel_with_the_model_and_are_verified(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = f"2:4,dense={DENSE}"
    assert prune_to(root, tmp_path / "run", "wanda", target) == 0
    assert json.loads((tmp_path / "run_hf" / "pruning.json").read_text())["target"] == target
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "ck")]) == 0
    for form in ("run", "ck", "run_hf"):
        capsys.readouterr()
        assert main(["verify", str(tmp_path / form)]) == 0
        assert f"pattern {target}: holds, 3 weights are left dense" in capsys.readouterr().out
        assert main(["verify", str(tmp_path / form), "--target", "2:4"]) == 1
    file = tmp_path / "run_hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["verify", str(tmp_path / "run_hf")]) == 1


@pytest.mark.parametrize(("family", "dense"), [("gpt2", "c_fc"), ("qwen3_moe", "experts.3.+self_attn")])
def test_other_families(root: Path, tmp_path: Path, family: str, dense: str) -> None:
    """Weights that are stored transposed, and single experts."""
    assert prune_to(root, tmp_path / "run", "sparsegpt", f"2:4,dense={dense}", family) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (root / family, tmp_path / "run_hf"))
    masks = Masks.load(tmp_path / "run" / "decision")
    kept = {name for name in masks.names() if any(part in name for part in dense.split("+"))}
    assert kept and kept < set(masks.names())
    for name in masks.names():
        place = name if name in after else name.removeprefix("transformer.")
        assert (name in kept) == bool(torch.equal(after[place], before[place])) == bool(masks.get(name).all()), name


MISTAKES = {
    "a size": ("num_layers=1,dense=q_proj", "is for patterns of weights"),
    "nothing": ("2:4,dense=", "give parts of names of weights"),
    "no name": ("2:4,dense=q proj", "give parts of names of weights"),
    "not there": ("2:4,dense=gate_proj+fc_out", "no prunable weight has fc_out in its name; they are such as model."),
    "everything": ("2:4,dense=proj", "leaves all 14 prunable weights dense"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(root: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    target, message = MISTAKES[case]
    refused_to_prune(root, tmp_path / "run", "wanda", target, message, capsys)


def test_a_file_has_a_list() -> None:
    with pytest.raises(UserError, match="give a list of parts"):
        parse_any_target({"n": 2, "m": 4, "dense": "q_proj"})


def test_models_for_maxtext_may_have_them() -> None:
    """Which weights stay zero in its trainer follows from the pattern, but in those that were left dense."""
    from megatron_prune.exporting.maxtext import _source_of

    mask_of = _source_of(NM(2, 4, ("down_proj",)))
    dense = torch.arange(1.0, 17.0).reshape(2, 8)
    assert mask_of("model.layers.0.mlp.down_proj.weight", dense).all()
    sparse = dense * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(2)
    assert torch.equal(mask_of("model.layers.0.mlp.up_proj.weight", sparse), sparse != 0)
    with pytest.raises(UserError, match="up_proj.weight was pruned to 2:4,dense=down_proj and is not any more"):
        mask_of("model.layers.0.mlp.up_proj.weight", dense)
