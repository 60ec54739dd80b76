"""Hugging Face weights as MaxText's tree and back: in numpy, against the formulas written out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune.__main__ import main
from megatron_prune.decision.mask_npz import write_masks
from megatron_prune.decision.masks import prunable_shapes as decided_shapes
from megatron_prune.errors import UserError
from megatron_prune.exporting import maxtext as exporter
from megatron_prune.maxtext import layout
from megatron_prune.maxtext.hf import HFDirectory, write_directory
from megatron_prune.maxtext.masks import PackedMasks, prunable_shapes
from megatron_prune.model.families import FAMILIES, ModelConfig
from tests.models import byte_tokenizer, tiny_blocks, tiny_llama, tiny_model

ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, **layout.LLAMA3}


def config(**changes: Any) -> ModelConfig:
    """Four heads of 16, two groups, which are not together as wide as the model."""
    hf = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 16}
    hf |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 51, "max_position_embeddings": 64}
    return FAMILIES["llama"].from_hf(hf | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False} | changes)


def weights(model: ModelConfig) -> dict[str, np.ndarray]:
    """Random weights by Hugging Face name."""
    random = np.random.default_rng(0)
    maps = FAMILIES[model.family].weights(model)
    shapes = {name: shape for map in maps for name, shape in zip(map.hf, map.shapes, strict=True)}
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def test_every_array_is_the_formula() -> None:
    model = config()
    given = weights(model)
    tree = layout.to_maxtext(given.__getitem__, model, {})
    assert {path: array.shape for path, array in tree.items()} == layout.shapes(model)
    attention, mlp = "decoder/layers/self_attention/", "decoder/layers/mlp/"
    for layer in range(3):
        hf = {name.split(".")[-2]: given[name] for name in given if f"layers.{layer}." in name}
        for head in range(4):
            rows = slice(16 * head, 16 * head + 16)
            assert np.array_equal(tree[attention + "query/kernel"][:, layer, head], hf["q_proj"][rows].T / 4)
            assert np.array_equal(tree[attention + "out/kernel"][head, layer], hf["o_proj"][:, rows].T)
        assert np.array_equal(tree[attention + "key/kernel"][:, layer, 1], hf["k_proj"][16:32].T)
        assert np.array_equal(tree[mlp + "wi_0/kernel"][:, layer], hf["gate_proj"].T)
        assert np.array_equal(tree[mlp + "wi_1/kernel"][:, layer], hf["up_proj"].T)
        assert np.array_equal(tree[mlp + "wo/kernel"][:, layer], hf["down_proj"].T)
    assert np.array_equal(tree["token_embedder/embedding"], given["model.embed_tokens.weight"])
    assert np.array_equal(tree["decoder/logits_dense/kernel"], given["lm_head.weight"].T)


def test_llama3_interleaves_rows_and_says_so() -> None:
    plain, scaled = config(), config(rope_parameters=ROPE)
    given = weights(plain)
    key = "decoder/layers/self_attention/key/kernel"
    trees = [layout.to_maxtext(given.__getitem__, model, {}) for model in (plain, scaled)]
    assert np.array_equal(trees[1][key][..., 0::2], trees[0][key][..., :8])
    assert np.array_equal(trees[1][key][..., 1::2], trees[0][key][..., 8:])
    value = key.replace("key", "value")
    assert np.array_equal(trees[1][value], trees[0][value])
    said = [{key: layout.settings(model)[key] for key in ("rope_type", "rope_use_scale")} for model in (plain, scaled)]
    assert said == [
        {"rope_type": "default", "rope_use_scale": False},
        {"rope_type": "llama3.1", "rope_use_scale": True},
    ]


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": ROPE}, {"tie_word_embeddings": True}])
def test_back_is_bit_equal(changes: dict[str, Any]) -> None:
    model = config(**changes)
    given = weights(model)
    tree = layout.to_maxtext(given.__getitem__, model, {})
    back = dict(layout.from_maxtext(tree, model, {}))
    assert all(np.array_equal(back[name], given[name]) for name in given)
    assert np.array_equal(back["lm_head.weight"], given.get("lm_head.weight", given["model.embed_tokens.weight"]))


@pytest.mark.parametrize("family, more", [
    ("qwen2", {"query/bias": (4, 3, 6), "key/bias": (2, 3, 6), "value/bias": (2, 3, 6)}),
    ("qwen3", {"query_norm/scale": (16, 3), "key_norm/scale": (16, 3)}),
])  # fmt: skip
def test_decoders_of_other_families(family: str, more: dict[str, tuple[int, ...]]) -> None:
    """Their own arrays, queries without LLaMA's factor, and the way back bit for bit."""
    hf = {"model_type": family, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": 51}
    hf |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
    model = FAMILIES[family].from_hf(hf | ({"head_dim": 16} if family == "qwen3" else {}))
    layout.check(model)
    given = weights(model)
    tree = layout.to_maxtext(given.__getitem__, model, {})
    start = "decoder/layers/self_attention/"
    assert {path: tree[start + path].shape for path in more} == more and set(tree) == set(layout.shapes(model))
    query, width = given["model.layers.1.self_attn.q_proj.weight"], model.kv_channels
    assert np.array_equal(tree[start + "query/kernel"][:, 1, 3], query[3 * width : 4 * width].T)
    vector = "q_proj.bias" if family == "qwen2" else "q_norm.weight"
    values = given[f"model.layers.2.self_attn.{vector}"].reshape(tree[start + next(iter(more))][..., 0].shape[0], -1)
    assert np.array_equal(tree[start + next(iter(more))][:, 2].reshape(values.shape), values)
    back = dict(layout.from_maxtext(tree, model, {}))
    assert all(np.array_equal(back[key], given[key]) for key in given)
    said = layout.settings(model)
    assert said["decoder_block"] == family
    assert (said["attention_bias"], said["use_qk_norm"]) == (family == "qwen2", family == "qwen3")


EXPERTS = {"model_type": "qwen3_moe", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
EXPERTS |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 51, "rms_norm_eps": 1e-6}
EXPERTS |= {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}


@pytest.mark.parametrize("family, block, names, scale", [
    ("mixtral", "MoeBlock_0", ("block_sparse_moe.", "w1", "w3", "w2"), 4),
    ("qwen3_moe", "moe_block", ("mlp.", "gate_proj", "up_proj", "down_proj"), 1),
])  # fmt: skip
def test_experts(family: str, block: str, names: tuple[str, ...], scale: int) -> None:
    """One array of all experts and layers, the router beside them without masks, and the way back bit for bit."""
    own = {"model_type": family, "num_local_experts": 5}
    width = 20 if family == "qwen3_moe" else 40
    model = FAMILIES[family].from_hf(EXPERTS | own)
    layout.check(model)
    given = weights(model)
    tree = layout.to_maxtext(given.__getitem__, model, {})
    assert {path: array.shape for path, array in tree.items()} == layout.shapes(model)
    start, (there, *linears) = f"decoder/layers/{block}/", names
    assert tree[start + "wi_0"].shape == (5, 3, 24, width) and not any("/mlp/" in path for path in tree)
    for leaf, linear in zip(("wi_0", "wi_1", "wo"), linears, strict=True):
        weight = given[f"model.layers.2.{there}experts.3.{linear}.weight"]
        assert np.array_equal(tree[start + leaf][3, 2], weight.T)
    assert np.array_equal(tree[start + "gate/kernel"][:, 1], given[f"model.layers.1.{there}gate.weight"].T)
    query = given["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(tree["decoder/layers/self_attention/query/kernel"][:, 0, 1], query[16:32].T / scale)
    back = dict(layout.from_maxtext(tree, model, {}))
    assert back.keys() == given.keys() and all(np.array_equal(back[key], given[key]) for key in given)
    assert prunable_shapes(model) == decided_shapes(model)
    said = layout.settings(model)
    assert (said["decoder_block"], said["num_experts"], said["num_experts_per_tok"]) == (family, 5, 2)
    assert said["base_moe_mlp_dim"] == said["base_mlp_dim"] == width


@pytest.mark.parametrize("changes, what", [
    ({"mlp_only_layers": [1]}, "experts in some of its layers only"),
    ({"norm_topk_prob": False}, "experts whose gates do not add up to 1 .norm_topk_prob is false."),
])  # fmt: skip
def test_experts_that_maxtext_lacks(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        layout.check(FAMILIES["qwen3_moe"].from_hf(EXPERTS | changes))


@pytest.mark.parametrize("width, exact", [(64, True), (128, False), (10, False)])
def test_the_factor_is_undone_exactly_for_16_bits_or_powers_of_four(width: int, exact: bool) -> None:
    model = config(head_dim=width)
    given = weights(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    for dtype in (np.float32, np.float16):
        stored = {key: value.astype(dtype) for key, value in given.items()}
        back = dict(layout.from_maxtext(layout.to_maxtext(stored.__getitem__, model, {}), model, {}))[name]
        same = np.array_equal(back.astype(dtype), stored[name])
        assert same == (exact or dtype == np.float16)
        assert np.allclose(back, stored[name].astype(np.float32), rtol=4e-7, atol=0)


def test_zero_means_removed_in_masked_matrices() -> None:
    """A kept weight that is zero must not be taken for a removed one, and is zero again on the way back."""
    model = config()
    given = weights(model)
    masks = {name: np.random.default_rng(1).random(shape) < 0.5 for name, shape in prunable_shapes(model).items()}
    for name in masks:
        given[name][:, ::3] = -0.0
    tree = layout.to_maxtext(given.__getitem__, model, masks)
    removed = sum(int((~mask).sum()) for mask in masks.values())
    assert sum(int((tree[leaf.path] == 0).sum()) for leaf in layout.LEAVES if leaf.prunable) == removed
    assert not any(np.signbit(tree[leaf.path][tree[leaf.path] == 0]).any() for leaf in layout.LEAVES)
    back = dict(layout.from_maxtext(tree, model, masks))
    for name, mask in masks.items():
        assert np.array_equal(back[name], np.where(mask, given[name], 0)) and not np.signbit(back[name][~mask]).any()


def test_wrong_shapes_are_refused_both_ways() -> None:
    model = config()
    tree = layout.to_maxtext(weights(model).__getitem__, model, {})
    with pytest.raises(ValueError, match="gate_proj.weight has shape .40, 24.; the model has .44, 24."):
        layout.to_maxtext(weights(model).__getitem__, replace(model, ffn_hidden_size=44), {})
    with pytest.raises(UserError, match="wi_0/kernel in the MaxText checkpoint has shape .24, 3, 40.; the model has"):
        dict(layout.from_maxtext(tree, replace(model, ffn_hidden_size=44), {}))
    del tree["decoder/logits_dense/kernel"]
    with pytest.raises(UserError, match="lacks decoder/logits_dense/kernel"):
        dict(layout.from_maxtext(tree, model, {}))


@pytest.mark.parametrize("changes, what", [
    ({"rope_parameters": ROPE | {"factor": 32.0}}, "factor 32.0.* MaxText has factor 8"),
    ({"rope_parameters": {"rope_theta": 10000.5}}, "rope_theta 10000.5"),
])  # fmt: skip
def test_rotary_embeddings_that_maxtext_lacks(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        layout.check(config(**changes))


@pytest.mark.parametrize("model_type, what", [
    ("mistral", "sliding window of 7"), ("qwen2_moe", "experts of the qwen2_moe family: a shared one for all tokens"),
    ("olmoe", "experts whose gates do not add up to 1"), ("glm4_moe", "experts in some of its layers only"),
    ("nemotron", "layers of the nemotron family"), ("gpt2", "layers of the gpt2 family"),
])  # fmt: skip
def test_other_families_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str, what: str
) -> None:
    tiny_model(tmp_path / "hf", model_type)
    words = ["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "new"), "--format", "maxtext"]
    assert main(["export", *words]) == 2
    assert what in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_without_the_environment_or_with_another_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_blocks(tmp_path / "hf")
    monkeypatch.setenv(exporter.VARIABLE, str(tmp_path / "none"))
    words = ["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "new"), "--format", "maxtext"]
    assert main(["export", *words]) == 2
    assert "make it with tools/setup_maxtext.sh" in capsys.readouterr().err
    assert main(["export", *words, "--layers", "blocks"]) == 2
    assert "MaxText has layers of one size" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_directories_are_read_and_written_without_torch(tmp_path: Path) -> None:
    source = HFDirectory(byte_tokenizer(tiny_llama(tmp_path / "hf")))
    tensors = [(name, source.read(name)) for map in FAMILIES["llama"].weights(source.config) for name in map.hf]
    write_directory(tmp_path / "new", source.config, iter(tensors), tmp_path / "hf", max_shard_bytes=20_000)
    again = HFDirectory(tmp_path / "new")
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 2 and again.config == source.config
    assert all(np.array_equal(again.read(name), array) for name, array in tensors)


def test_an_output_layer_that_was_trained_is_no_longer_tied(tmp_path: Path) -> None:
    source = HFDirectory(byte_tokenizer(tiny_llama(tmp_path / "hf", tie_word_embeddings=True)))
    names = [name for map in FAMILIES["llama"].weights(source.config) for name in map.hf]
    head = source.read(names[0])
    for folder, output, tied in (("same", head, True), ("trained", head + 1, False)):
        tensors = [*((name, source.read(name)) for name in names), ("lm_head.weight", output)]
        write_directory(tmp_path / folder, source.config, iter(tensors), tmp_path / "hf")
        again = HFDirectory(tmp_path / folder)
        assert again.config.tie_word_embeddings is tied
        assert tied or np.array_equal(again.read("lm_head.weight"), output)


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    model = config()
    masks = {name: np.ones(shape, bool) for name, shape in prunable_shapes(model).items()}
    write_masks(tmp_path / "masks.npz", masks.items(), "2:4")
    read = PackedMasks(tmp_path / "masks.npz", model)
    assert read.pattern == "2:4" and all(np.array_equal(read[name], masks[name]) for name in masks)
    with pytest.raises(UserError, match="the weight is .44, 24."):
        PackedMasks(tmp_path / "masks.npz", replace(model, ffn_hidden_size=44))
    with pytest.raises(UserError, match="lacks the mask of model.layers.3.self_attn"):
        PackedMasks(tmp_path / "masks.npz", replace(model, num_layers=4))
    (tmp_path / "masks.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="is not a mask .npz"):
        PackedMasks(tmp_path / "masks.npz", model)


def test_nothing_here_needs_torch_or_jax() -> None:
    modules = "checkpoints convert distill folder hf keys layout learn masks model options record score train".split()
    code = "import sys; sys.modules.update(torch=None, jax=None, maxtext=None)\n"
    code += "\n".join(f"import megatron_prune.maxtext.{module}" for module in (*modules, "__main__"))
    subprocess.run([sys.executable, "-c", code], check=True)
