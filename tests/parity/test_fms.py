"""`export --format fms`: IBM's own package opens it, computes the same logits and converts alike; `import` reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.__main__ import main
from tests.models import byte_tokenizer, tiny_blocks, tiny_llama, tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1, "intermediate_size": 86, "hidden_size": 56},
    "rope_llama3": {"rope_llama3": True, "num_key_value_heads": 4},
    "bf16": {"dtype": torch.bfloat16},
}
"""Grouped queries all but one; a width of which no factor comes out whole."""


SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps "
    "max_position_embeddings tie_word_embeddings hidden_act model_type rope_parameters"
).split()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model as Hugging Face has it, as a Megatron checkpoint and as fms has it, and back."""
    root = tmp_path_factory.mktemp("fms")
    for name, overrides in KINDS.items():
        hf, there, again, back = (root / f"{name}_{form}" for form in ("hf", "fms", "again", "back"))
        byte_tokenizer(tiny_llama(hf, vocab_size=257, **overrides))
        assert main(["import", "--input", str(hf), "--output", str(root / name)]) == 0
        assert main(["export", "--format", "fms", "--input", str(root / name), "--output", str(there)]) == 0
        assert main(["import", "--input", str(there), "--output", str(again)]) == 0
        assert main(["export", "--input", str(again), "--output", str(back)]) == 0
    return root


def fms_model(folder: Path) -> Any:
    """A directory by IBM's package."""
    llama = pytest.importorskip("fms.models.llama", reason="needs the extra `fms`")
    model = llama.LLaMA(llama.LLaMAConfig.load(folder / "fms_config.json"))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.post_init()
    return model.eval()


@pytest.mark.parametrize("name", [name for name in KINDS if name != "bf16"])
def test_logits_are_those_of_transformers(root: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 257, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(root / f"{name}_hf")(tokens).logits
        found = fms_model(root / f"{name}_fms")(tokens)
    assert (found - expected).abs().max() < 1e-4
    assert expected.std() > 0.5, "logits that differ"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_that_fms_itself_converts(root: Path, tmp_path: Path, name: str, fused: bool) -> None:
    """Bit for bit; and what it converts is imported, without a record of where it came from, fused or not."""
    llama = pytest.importorskip("fms.models.llama", reason="needs the extra `fms`")
    from fms.utils import serialization

    hf = load_file(root / f"{name}_hf" / "model.safetensors")
    config = llama.LLaMAConfig.load(root / f"{name}_fms" / "fms_config.json").updated(fused_weights=fused)
    converted = {
        key: tensor.contiguous()
        for key, tensor in serialization.get_adapted("llama", "hf", hf, {"model_config": config}).items()
    }
    if fused:
        found = load_file(root / f"{name}_fms" / "model.safetensors")
        assert found.keys() == converted.keys() | {"head.weight"}
        assert all(torch.equal(found[key], tensor) for key, tensor in converted.items())
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    config.save(theirs / "fms_config.json")
    save_file(converted, theirs / "model.safetensors")
    byte_tokenizer(theirs)
    assert main(["import", "--input", str(theirs), "--output", str(tmp_path / "model")]) == 0
    assert main(["export", "--input", str(tmp_path / "model"), "--output", str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == hf.keys() and all(torch.equal(back[key], tensor) for key, tensor in hf.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (root / f"{name}_hf", tmp_path / "back")]
    assert all(configs[0][key] == value for key, value in configs[1].items() if key in SIZES)


@pytest.mark.parametrize("name", KINDS)
def test_there_and_back_is_bit_equal(root: Path, name: str) -> None:
    before, after = (load_file(root / f"{name}_{form}" / "model.safetensors") for form in ("hf", "back"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    configs = [json.loads((root / f"{name}_{form}" / "config.json").read_text()) for form in ("hf", "back")]
    assert configs[0] == configs[1]
    assert (root / f"{name}_back" / "tokenizer.json").is_file()


def test_layers_that_differ_are_padded(root: Path, tmp_path: Path) -> None:
    """Absent halves come last, after the others' parts."""
    hf = tiny_blocks(tmp_path / "hf", hidden_size=64, head_dim=8)
    assert main(["import", "--input", str(hf), "--output", str(tmp_path / "model")]) == 0
    for form in ("hf", "fms"):
        output = ["--format", form, "--output", str(tmp_path / f"out_{form}")]
        assert main(["export", "--input", str(tmp_path / "model"), "--layers", "padded", *output]) == 0
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(32)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out_hf")(tokens).logits
        assert (fms_model(tmp_path / "out_fms")(tokens) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("family", "overrides", "more", "message"),
    [
        ("qwen2", {}, [], "this is a qwen2 model"),
        ("llama", {"head_dim": 16}, [], "this model has 4 of 16 channels and hidden_size 32"),
        ("blocks", {}, ["--layers", "blocks"], "those of this model differ"),
    ],
)
def test_other_models_are_refused(
    tmp_path: Path,
    family: str,
    overrides: dict[str, Any],
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make = tiny_blocks(tmp_path / "hf") if family == "blocks" else tiny_model(tmp_path / "hf", family, **overrides)
    assert main(["import", "--input", str(make), "--output", str(tmp_path / "model")]) == 0
    capsys.readouterr()
    given = ["--format", "fms", "--input", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *more]
    assert main(["export", *given]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"hf_config": None, "attn_bias": True}, "has attn_bias: True; allowed: False"),
    "activation": ({"hf_config": None, "activation_fn": "gelu"}, "allowed: 'swish' or 'silu'"),
    "scaling": ({"hf_config": None, "rope_scaling": {"rope_type": "ntk"}}, "rope type 'ntk'"),
    "incomplete": ({"hf_config": None, "emb_dim": None}, "is no config of fms' LLaMA"),
    "contradiction": ({"nlayers": 3}, "has nlayers: 3 and 2 in its hf_config"),
    "missing": ({"hf_config": None, "nlayers": 3}, "has no tensor base_model.layers.2.ln.weight"),
    "unknown": ({"hf_config": None, "nlayers": 1}, "it would be lost"),
    "shape": ({"hf_config": None, "src_vocab_size": 256}, "config.json asks for [256, 32]"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_directories_are_refused(
    root: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = CHANGES[name]
    folder = shutil.copytree(root / "plain_fms", tmp_path / "fms")
    file = folder / "fms_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(
        json.dumps({key: value for key, value in config.items() if value is not None or key not in changes})
    )
    capsys.readouterr()
    assert main(["import", "--input", str(folder), "--output", str(tmp_path / "x")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "x").exists()
