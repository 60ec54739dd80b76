"""Config mapping and weight tables of the families beside LLaMA, what each refuses, and checkpoints as they come."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_prune.decision.masks import MaskInfo, MaskWriter
from megatron_prune.errors import UserError
from megatron_prune.model import convert
from megatron_prune.model.convert import HFReader
from megatron_prune.model.families import FAMILIES, ModelConfig, WeightMap, family_of
from tests.models import TINY_SIZES, edit_config, tiny_model

OTHERS = sorted(FAMILIES.keys() - {"llama"})
GPT2: dict[str, Any] = {  # the keys that GPT-2's own config.json has of those that matter
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_ctx": 1024,
    "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
}  # fmt: skip
QWEN2: dict[str, Any] = {  # transformers 4, as Qwen2.5-0.5B has it
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = QWEN2 | {"model_type": "qwen3", "head_dim": 128, "attention_bias": False}
MISTRAL: dict[str, Any] = {  # transformers 4, as Mistral-7B-v0.1 has it
    "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
NEMOTRON: dict[str, Any] = {  # transformers 4
    "model_type": "nemotron", "hidden_act": "relu2", "hidden_size": 3072, "intermediate_size": 9216, "head_dim": 128,
    "max_position_embeddings": 4096, "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "norm_eps": 1e-05, "partial_rotary_factor": 0.5, "rope_theta": 10000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 256000, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
PUBLISHED = [GPT2, QWEN2, QWEN3, MISTRAL, NEMOTRON]


def config_of(values: dict[str, Any]) -> ModelConfig:
    return family_of(values).from_hf(values)


@pytest.mark.parametrize("values", PUBLISHED, ids=lambda x: x["model_type"])
def test_published_configs_come_back_verbatim(values: dict[str, Any]) -> None:
    config = config_of(values)
    assert family_of(values).to_hf(config) == values
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_sets_the_families_apart() -> None:
    qwen2, qwen3, mistral, nemotron, gpt2 = map(config_of, (QWEN2, QWEN3, MISTRAL, NEMOTRON, GPT2))
    assert (qwen2.qkv_bias, qwen2.qk_layernorm, qwen2.kv_channels, qwen2.sliding_window) == (True, False, 64, None)
    assert (qwen3.qkv_bias, qwen3.qk_layernorm, qwen3.kv_channels) == (False, True, 128)
    assert (mistral.sliding_window, mistral.num_query_groups) == (4096, 8)
    assert (nemotron.rotary_percent, nemotron.activation, nemotron.gated) == (0.5, "relu2", False)
    assert nemotron.normalization == "LayerNorm1P"
    assert (gpt2.position_embedding, gpt2.linear_bias, gpt2.normalization) == ("learned", True, "LayerNorm")
    assert (gpt2.ffn_hidden_size, gpt2.num_query_groups, gpt2.tie_word_embeddings) == (3072, 12, True)


def test_defaults_of_keys_left_out() -> None:
    def without(values: dict[str, Any], *keys: str) -> ModelConfig:
        return config_of({key: value for key, value in values.items() if key not in keys})

    assert without(MISTRAL, "sliding_window").sliding_window == 4096
    assert config_of(MISTRAL | {"sliding_window": None}).sliding_window is None
    assert without(NEMOTRON, "partial_rotary_factor").rotary_percent == 0.5
    assert without(QWEN3, "head_dim").kv_channels == 128
    assert config_of(QWEN2 | {"num_key_value_heads": None}).num_query_groups == 14
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    assert config_of(NEMOTRON | {"rope_parameters": rope}).rotary_percent == 0.25


@pytest.mark.parametrize(
    ("values", "change", "message"),
    [
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights: False"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention: True"),
        (GPT2, {"activation_function": "quick_gelu"}, "'quick_gelu'.*'gelu_new'"),
        (GPT2, {"n_head": 7}, "768 and 7 attention heads"),
        (
            QWEN2,
            {"use_sliding_window": True, "max_window_layers": 20},
            "use_sliding_window: True for the layers from 20",
        ),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layers of type 'sliding_attention'"),
        (QWEN3, {"attention_bias": True}, "attention_bias: True"),
        (QWEN3, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        (QWEN2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5; the qwen2 family supports 1.0 only"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window = 0"),
        (MISTRAL, {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        (NEMOTRON, {"hidden_act": "silu"}, "hidden_act: 'silu'.*'relu2'"),
        (NEMOTRON, {"mlp_bias": True}, "mlp_bias: True"),
        (NEMOTRON, {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5; it must be at most 1"),
        (NEMOTRON, {"head_dim": 6}, "head width of 6"),
    ],
)
def test_what_would_change_the_logits_is_refused(values: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(values | change)


def test_smaller_sizes_reach_config_json() -> None:
    qwen2 = config_of(QWEN2 | {"layer_types": ["full_attention"] * 24})
    written = FAMILIES["qwen2"].to_hf(replace(qwen2, num_layers=20))
    assert written["layer_types"] == ["full_attention"] * 20, "transformers refuses a list of another length"
    small = replace(config_of(GPT2), ffn_hidden_size=1024)
    assert FAMILIES["gpt2"].to_hf(small)["n_inner"] == 1024


@pytest.mark.parametrize("change", [{"num_attention_heads": 6}, {"num_query_groups": 6}, {"linear_bias": False}])
def test_sizes_without_a_key_are_refused(change: dict[str, Any]) -> None:
    """GPT-2 has no key for the width of a head: half the heads would be read as heads of twice the width."""
    with pytest.raises(UserError, match="cannot express this one's shape.*n_embd"):
        FAMILIES["gpt2"].to_hf(replace(config_of(GPT2), **change))


def test_checkpoints_of_an_earlier_version_mean_llama() -> None:
    values = config_of(GPT2).to_dict()
    new = ["activation", "gated", "normalization", "linear_bias", "qkv_bias", "qk_layernorm", "position_embedding",
           "rotary_percent", "sliding_window"]  # fmt: skip
    old = ModelConfig.from_dict({key: value for key, value in values.items() if key not in new})
    assert (old.activation, old.gated, old.normalization, old.rotary_percent) == ("silu", True, "RMSNorm", 1.0)


def test_sequences_beyond_the_learned_positions_are_refused() -> None:
    config_of(GPT2).check_length(1024)
    config_of(MISTRAL).check_length(10**6)
    with pytest.raises(UserError, match="1025 tokens.*learned positions for 1024: use 1024 or less"):
        config_of(GPT2).check_length(1025)


@pytest.mark.parametrize("model_type", OTHERS)
@pytest.mark.parametrize("tied", [True, False])
def test_table_covers_exactly_what_transformers_saves(tmp_path: Path, model_type: str, tied: bool) -> None:
    reader = HFReader(tiny_model(tmp_path / "hf", model_type, vocab_size=131, tie_word_embeddings=tied))
    weights = FAMILIES[model_type].weights(reader.model_config)
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="np") as saved:
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    assert shapes == {name: shape for map in weights for name, shape in zip(map.hf, map.shapes, strict=True)}
    assert ("output_layer.weight" in {map.megatron for map in weights}) is not tied
    prunable = {map.megatron.split(".", 3)[-1] for map in weights if map.prunable}
    assert prunable == {
        "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight",
        "mlp.linear_fc1.weight", "mlp.linear_fc2.weight",
    }  # fmt: skip


@pytest.mark.parametrize("model_type", OTHERS)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_round_trip_is_bit_equal(tmp_path: Path, model_type: str, tensor_parallel: int) -> None:
    reader = HFReader(tiny_model(tmp_path / "hf", model_type, vocab_size=131))
    config = reader.model_config
    for map in FAMILIES[model_type].weights(config):
        tensors = [reader.read(name) for name in map.hf]
        merged = convert.merge(map, tensors, config)
        assert tuple(merged.shape) == map.shape
        shards = [convert.shard(map, merged, rank, tensor_parallel) for rank in range(tensor_parallel)]
        back = convert.split(map, convert.unshard(map, shards, config), config)
        assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(tensors, back, strict=True))


def gpt2_weight(name: str, hidden: int = 4, heads: int = 2) -> tuple[ModelConfig, WeightMap]:
    config = config_of(GPT2 | {"n_embd": hidden, "n_head": heads, "n_layer": 1})
    return config, next(map for map in FAMILIES["gpt2"].weights(config) if map.megatron.endswith(name))


def test_fused_and_transposed_weight_is_interleaved_per_head() -> None:
    config, map = gpt2_weight("linear_qkv.weight")
    stored = torch.arange(4 * 12).reshape(4, 12)  # [in, q0 q1 q2 q3 k0 ... v3]
    merged = convert.merge(map, [stored], config)
    assert (merged[:, 0]).tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    assert torch.equal(merged[:, 1], merged[:, 0] + 12), "inputs are columns"
    assert torch.equal(convert.row_blocks(map, config)[map.hf[0]][:4], torch.tensor([0, 1, 6, 7]))
    assert convert.row_ids(map, config, 1, 2).tolist() == [6, 7, 8, 9, 10, 11]


def test_masks_of_transposed_weights_are_checked_along_their_inputs(tmp_path: Path) -> None:
    info = MaskInfo("magnitude", "2:4", {}, "gpt2", config_of(GPT2).fingerprint())
    along_inputs = torch.tensor([True, True, False, False])[:, None].expand(4, 12)
    with MaskWriter(tmp_path / "right", info) as writer:
        writer.add_layer(0, {"transformer.h.0.attn.c_attn.weight": along_inputs})
    with pytest.raises(UserError, match="2:4 keeps exactly 2"), MaskWriter(tmp_path / "wrong", info) as writer:
        writer.add_layer(0, {"transformer.h.0.attn.c_attn.weight": along_inputs.reshape(12, 4).t()})


def test_gpt2_as_its_authors_published_it(tmp_path: Path) -> None:
    """Names without `transformer.`, causal masks among the weights, no dtype in config.json."""
    tiny_model(tmp_path / "hf", "gpt2")
    named = HFReader(tmp_path / "hf")
    expected = {name: named.read(name) for name in named.names()}
    bare = {name.removeprefix("transformer."): tensor for name, tensor in expected.items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 8, 8).tril()}, tmp_path / "hf" / "model.safetensors")
    edit_config(tmp_path / "hf", dtype=None)
    reader = HFReader(tmp_path / "hf")
    assert reader.model_config.dtype == "float32"
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in expected.items())


def test_a_lost_bias_is_noticed(tmp_path: Path) -> None:
    tiny_model(tmp_path / "hf", "qwen2")
    file = tmp_path / "hf" / "model.safetensors"
    name = "model.layers.1.self_attn.k_proj.bias"
    save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file)
    with pytest.raises(UserError, match=f"no tensor {name}"):
        HFReader(tmp_path / "hf")


def test_tiny_models_are_of_every_family() -> None:
    assert TINY_SIZES.keys() == FAMILIES.keys()
