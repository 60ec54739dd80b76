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
from transformers import AutoModelForCausalLM

from megatron_prune.decision.masks import MaskInfo, MaskWriter
from megatron_prune.errors import UserError
from megatron_prune.model import convert
from megatron_prune.model.convert import HFReader
from megatron_prune.model.cost import active_parameters, parameters
from megatron_prune.model.families import FAMILIES, ModelConfig, WeightMap, family_of
from megatron_prune.model.prunable import attention_linears
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
QWEN3_MOE = QWEN3 | {  # transformers 4, as Qwen3-30B-A3B has it
    "model_type": "qwen3_moe", "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 6144,
    "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "output_router_logits": False, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = MISTRAL | {  # as Mixtral-8x7B-v0.1 has it
    "model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
}  # fmt: skip
OLMOE: dict[str, Any] = {  # as OLMoE-1B-7B-0924 has it
    "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 50304,
}  # fmt: skip
QWEN2_MOE = QWEN2 | {  # as Qwen1.5-MoE-A2.7B has it
    "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632,
    "max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632, "tie_word_embeddings": False,
}  # fmt: skip
GLM4_MOE: dict[str, Any] = {  # as GLM-4.5-Air has it
    "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072, "moe_intermediate_size": 1408,
    "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96,
    "num_experts_per_tok": 8, "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1, "torch_dtype": "bfloat16",
    "use_qk_norm": False, "vocab_size": 151552,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {  # as gpt-oss-20b has it, without its quantization_config
    "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "num_local_experts": 32, "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                     "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {  # as DeepSeek-V3 has it, without its quantization_config
    "model_type": "deepseek_v3", "attention_bias": False, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
DEEPSEEK_V2: dict[str, Any] = {  # as DeepSeek-V2-Lite has it
    "model_type": "deepseek_v2", "attention_bias": False, "aux_loss_alpha": 0.001, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
GEMMA3: dict[str, Any] = {  # as gemma-3-1b has it
    "model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None, "cache_implementation":
    "hybrid", "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
    "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "vocab_size": 262144,
}  # fmt: skip
SPARSE = [QWEN3_MOE, MIXTRAL, OLMOE, QWEN2_MOE, GLM4_MOE, GPT_OSS, DEEPSEEK_V3, DEEPSEEK_V2]
PUBLISHED = [GPT2, QWEN2, QWEN3, MISTRAL, NEMOTRON, GEMMA3, *SPARSE]


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


def test_experts_of_published_models() -> None:
    for values, total, active in zip(
        SPARSE,
        (30.5, 46.7, 6.92, 14.3, 107, 20.9, 671, 15.7),
        (3.35, 12.9, 1.28, 2.69, 13.42, 4.19, 37.6, 2.66),
        strict=True,
    ):
        config = config_of(values)
        assert parameters(config) / 1e9 == pytest.approx(total, rel=5e-3)
        assert active_parameters(config) / 1e9 == pytest.approx(active, rel=5e-3)
    assert config_of(QWEN3_MOE).moe_renormalize and not config_of(OLMOE).moe_renormalize
    assert config_of(MIXTRAL).moe_renormalize and config_of(OLMOE).qk_layernorm_whole
    mixed = config_of(QWEN3_MOE | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert mixed.moe_layers == (False, True, False, False, False, True)
    assert [mixed.block(layer).ffn_hidden_size for layer in (0, 1)] == [6144, 768]


def test_both_names_of_the_number_of_experts_are_read_and_written() -> None:
    other = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"} | {"num_local_experts": 128}
    assert config_of(other).num_moe_experts == 128
    smaller = replace(config_of(other), num_moe_experts=64)
    written = family_of(other).to_hf(smaller)
    assert written["num_experts"] == written["num_local_experts"] == 64


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_experts_per_tok": 129}, "has 128 experts and sends each token to 129"),
        ({"num_experts_per_tok": 1}, "sends each token to 1 expert with a gate of 1"),
        ({"num_local_experts": 64}, "num_experts 128 and num_local_experts 64: keep one"),
        ({"mlp_only_layers": [48]}, "mlp_only_layers = \\[48\\]; it must be a list of layers, from 0 to 47"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0; it must be a whole number"),
        ({"decoder_sparse_step": 49}, "has experts in 0 layers of 48"),
        ({"norm_topk_prob": 1}, "moe_renormalize = 1; it must be true or false"),
        ({"num_experts": 0}, "num_moe_experts = 0; it must be a whole number"),
        ({"num_experts": 2**13}, "num_moe_experts = 8192; it must be a whole number of at least 1 and at most 4096"),
        ({"num_experts": 4096}, "has 48 layers of 4096 experts; allowed: 131072 of all layers together"),
        ({"attention_bias": True}, "has attention_bias: True"),
    ],
)
def test_routing_that_is_not_represented_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        config_of(QWEN3_MOE | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"norm_topk_prob": False}, "has norm_topk_prob: False"),
        ({"n_group": 8, "topk_group": 2}, "chooses 8 of 128 experts from 2 of 8 groups"),
        ({"n_group": 3}, "from 1 of 3 groups"),
        ({"first_k_dense_replace": 46}, "first_k_dense_replace = 46; it must be a whole number from 0 to 45"),
        ({"routed_scaling_factor": 0}, "moe_router_topk_scaling_factor = 0; it must be a number above 0"),
    ],
)
def test_sigmoid_routing_that_is_not_represented_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        config_of(GLM4_MOE | changes)


def test_layers_that_predict_further_tokens_are_told_and_left_out(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "hf", "glm4_moe")
    weights = load_file(path / "model.safetensors")
    save_file(weights | {"model.layers.3.eh_proj.weight": torch.ones(4, 8)}, path / "model.safetensors")
    reader = HFReader(path)
    told = reader.left_behind()
    assert told is not None and "model.layers.3.eh_proj.weight" in told
    for name in ("model.layers.2.eh_proj.weight", "model.layers.4.eh_proj.weight"):
        save_file(weights | {name: torch.ones(4, 8)}, path / "model.safetensors")
        with pytest.raises(UserError, match="does not have"):
            HFReader(path)
    save_file(weights, path / "model.safetensors")
    edit_config(path, num_hidden_layers=2, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match=r"model\.layers\.2\..* does not have"):
        HFReader(path)


def test_clipped_queries_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="has clip_qkv: 8.0; the olmoe family supports None only"):
        config_of(OLMOE | {"clip_qkv": 8.0})


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_in_one_tensor_are_read_as_those_one_by_one(tmp_path: Path, family: str) -> None:
    """As transformers 5 has them in memory, and as who saves a state dict finds them in the file."""
    apart, fused = (tiny_model(tmp_path / name, family) for name in ("apart", "fused"))
    model = AutoModelForCausalLM.from_pretrained(fused)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    save_file(state, fused / "model.safetensors", metadata={"format": "pt"})
    one, other = HFReader(apart), HFReader(fused)
    assert one.names() == other.names()
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    save_file(
        bare | {"lm_head.weight": state["lm_head.weight"]}, fused / "model.safetensors", metadata={"format": "pt"}
    )
    assert HFReader(fused).names() == one.names()
    save_file(state, fused / "model.safetensors", metadata={"format": "pt"})
    for name in one.names():
        assert torch.equal(one.read(name), other.read(name)), name
        assert torch.equal(one.read_rows(name, 1, 5), other.read_rows(name, 1, 5)), name
    name = next(name for name in state if name.endswith("experts.down_proj"))
    save_file(state | {name: state[name][:-1].contiguous()}, fused / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="down_proj in .* has shape .*config.json asks for"):
        HFReader(fused)


def test_a_router_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "hf", "qwen3_moe")
    weights = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.gate.weight"
    save_file(weights | {name: weights[name][:-1].contiguous()}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="mlp.gate.weight in .* has shape .7, 32.; config.json asks for .8, 32."):
        HFReader(path)


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
    stored = [map.stored(reader.model_config) for map in weights]
    assert shapes == {name: shape for tensors in stored for name, shape in tensors.items()}
    assert ("output_layer.weight" in {map.megatron for map in weights}) is not tied
    prunable = {map.megatron.split(".", 3)[-1] for map in weights if map.prunable}
    attention = {f"{path}.weight" for path in attention_linears(reader.model_config)}
    assert attention == {name for name in prunable if name.startswith("self_attention.")}
    mlps = {name.rsplit(".", 2)[0] for name in prunable if ".linear_fc" in name}
    experts = {f"mlp.experts.local_experts.{n}" for n in range(reader.model_config.num_moe_experts or 0)}
    dense = {"mlp"} if FAMILIES[model_type].sparse_layers == "first_dense" else set()
    assert mlps - {"mlp.shared_experts"} - dense == (experts or {"mlp"})
    assert len(prunable) == len(attention) + 2 * len(mlps)


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
