"""Config mapping of the LLaMA family in both styles, what it refuses, and its weight table."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.errors import UserError
from megatron_prune.model.families import FAMILIES, ModelConfig, family_of, get_family
from tests.models import tiny_llama

LLAMA = FAMILIES["llama"]

LLAMA2_7B: dict[str, Any] = {  # the style of transformers 4
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31_8B = LLAMA2_7B | {
    "attention_bias": False,
    "mlp_bias": False,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_scaling": LLAMA31_ROPE,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def as_transformers5(config: dict[str, Any]) -> dict[str, Any]:
    """The same model in the style of transformers 5."""
    moved = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = {"rope_type": "default"} | (config.get("rope_scaling") or {})
    rope["rope_theta"] = config.get("rope_theta", 10000.0)
    return moved | {"rope_parameters": rope, "dtype": config["torch_dtype"]}


def test_llama2_sizes_without_rope_theta_or_head_dim() -> None:
    config = LLAMA.from_hf(LLAMA2_7B)
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (32, 4096, 11008)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (32, 32, 128)
    assert (config.rotary_base, config.rope_scaling, config.dtype) == (10000.0, None, "float16")


def test_old_config_without_key_value_heads_has_one_per_head() -> None:
    old = {key: value for key, value in LLAMA2_7B.items() if key != "num_key_value_heads"}
    assert LLAMA.from_hf(old).num_query_groups == 32
    assert LLAMA.to_hf(LLAMA.from_hf(old)) == old


@pytest.mark.parametrize("given", [LLAMA2_7B, LLAMA31_8B], ids=["llama2", "llama3.1"])
def test_both_config_styles_mean_the_same(given: dict[str, Any]) -> None:
    old, new = LLAMA.from_hf(given), LLAMA.from_hf(as_transformers5(given))
    assert replace(old, hf_config={}) == replace(new, hf_config={})
    assert old.fingerprint() == new.fingerprint()


@pytest.mark.parametrize("given", [LLAMA2_7B, LLAMA31_8B, as_transformers5(LLAMA31_8B)])
def test_unchanged_config_comes_back_verbatim(given: dict[str, Any]) -> None:
    before = copy.deepcopy(given)
    config = LLAMA.from_hf(given)
    assert LLAMA.to_hf(config) == before == given
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_llama31_keeps_its_rope_scaling() -> None:
    config = LLAMA.from_hf(LLAMA31_8B)
    assert config.rotary_base == 500000.0
    assert config.rope_scaling == LLAMA31_ROPE


def test_legacy_type_key_of_rope_scaling() -> None:
    scaling = {key: value for key, value in LLAMA31_ROPE.items() if key != "rope_type"} | {"type": "llama3"}
    assert LLAMA.from_hf(LLAMA31_8B | {"rope_scaling": scaling}) != LLAMA.from_hf(LLAMA2_7B)
    assert LLAMA.from_hf(LLAMA31_8B | {"rope_scaling": scaling}).rope_scaling == LLAMA31_ROPE


def test_changed_sizes_reach_config_json_and_come_back() -> None:
    config = LLAMA.from_hf(LLAMA2_7B)
    small = replace(
        config, hidden_size=3072, num_attention_heads=24, num_query_groups=24, num_layers=20, dtype="bfloat16"
    )
    written = LLAMA.to_hf(small)
    assert written["head_dim"] == 128, "3072 / 24 would be right by chance; heads of another width would not"
    assert written["torch_dtype"] == "bfloat16" and "dtype" not in written
    assert {key: written[key] for key in ("use_cache", "pretraining_tp", "bos_token_id")} == {
        "use_cache": True,
        "pretraining_tp": 1,
        "bos_token_id": 1,
    }
    assert replace(LLAMA.from_hf(written), hf_config={}) == replace(small, hf_config={})


def test_pruned_hidden_size_keeps_the_head_width() -> None:
    small = replace(LLAMA.from_hf(LLAMA2_7B), hidden_size=2048)
    assert LLAMA.from_hf(LLAMA.to_hf(small)).kv_channels == 128


def test_sizes_that_transformers_would_not_open_are_refused() -> None:
    config = replace(LLAMA.from_hf(LLAMA2_7B), hidden_size=2050)
    with pytest.raises(UserError, match="hidden_size 2050 is not a multiple of the 32 attention heads"):
        LLAMA.to_hf(config)


def test_changed_rotary_base_is_refused() -> None:
    config = LLAMA.from_hf(LLAMA2_7B)
    with pytest.raises(UserError, match="rotary"):
        LLAMA.to_hf(replace(config, rotary_base=5e5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias: True.*False"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'.*'silu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'.*'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "without low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"num_key_value_heads": 5}, "32 attention heads and 5"),
        ({"hidden_size": 4100}, "4100 and 32 attention heads but no head_dim"),
        ({"num_hidden_layers": 0}, "num_layers = 0"),
        ({"vocab_size": "32000"}, "vocab_size = '32000'"),
        ({"hidden_size": "4096"}, "hidden_size = '4096'"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"rms_norm_eps": "1e-5"}, "layernorm_epsilon = '1e-5'; it must be a number above 0"),
        ({"rope_theta": "10000"}, "rope_theta = '10000'"),
        ({"rope_scaling": "llama3"}, "'llama3' as rope parameters"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'; it must be true or false"),
        ({"head_dim": 127}, "head width of 127"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'.*bfloat16"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
    ],
)
def test_what_cannot_be_represented_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLAMA.from_hf(LLAMA2_7B | change)


def test_pretraining_tp_is_only_a_hint_and_ignored() -> None:
    assert LLAMA.from_hf(LLAMA2_7B | {"pretraining_tp": 4}).hidden_size == 4096


def test_unknown_model_type_and_family_list_the_known() -> None:
    with pytest.raises(UserError, match="'gpt_neox'; supported: .*llama"):
        family_of({"model_type": "gpt_neox"})
    with pytest.raises(UserError, match="did you mean 'llama'"):
        get_family("lama")


def test_from_dict_names_unknown_fields() -> None:
    values = LLAMA.from_hf(LLAMA2_7B).to_dict() | {"colour": "red"}
    with pytest.raises(UserError, match="colour"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize("tied", [True, False])
def test_table_covers_exactly_what_transformers_saves(tmp_path: Path, tied: bool) -> None:
    from safetensors import safe_open

    tiny_llama(tmp_path / "hf", tie_word_embeddings=tied, head_dim=16, vocab_size=131)
    config = LLAMA.from_hf(json.loads((tmp_path / "hf" / "config.json").read_text()))
    weights = LLAMA.weights(config)
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="np") as saved:
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    assert shapes == {name: shape for map in weights for name, shape in zip(map.hf, map.shapes, strict=True)}
    assert len({map.megatron for map in weights}) == len(weights)
    assert ("output_layer.weight" in {map.megatron for map in weights}) is not tied


def test_prunable_are_the_seven_projections_of_every_layer() -> None:
    config = LLAMA.from_hf(LLAMA2_7B)
    names = [name for map in LLAMA.weights(config) if map.prunable for name in map.hf]
    assert len(names) == 7 * 32
    assert {name.split(".")[-2] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert [map.layer for map in LLAMA.weights(config) if map.prunable] == sorted(4 * list(range(32)))
