"""Checkpoints as they are published: config.json of every family over the years, weights under their many names.

The configs have the keys and spellings of the models named, in tiny sizes. Each goes through import and export: logits
are transformers' own, transformers opens the export, and it is imported again as the same model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.decision.source import read_hf
from megatron_prune.errors import LONGEST, UserError
from megatron_prune.exporting.huggingface import write_hf
from megatron_prune.exporting.padding import in_transformers
from megatron_prune.exporting.preflight import check_export
from megatron_prune.model.convert import HFReader
from megatron_prune.model.families import FAMILIES, family_of
from megatron_prune.model.forward import logits
from megatron_prune.model.published import unwrapped
from tests.models import byte_tokenizer, edit_config, tiny_llama, tiny_model

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
MHA = SIZES | {"num_key_value_heads": 4}
LLAMA3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 2048, "model_type": "llama", "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
LLAMA3 = LLAMA | SIZES | {
    "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 131072, "mlp_bias": False,
    "pretraining_tp": 1, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "transformers_version": "4.43.0.dev0",
}  # fmt: skip
MISTRAL: dict[str, Any] = LLAMA | SIZES | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "max_position_embeddings": 32768,
    "rope_theta": 10000.0, "sliding_window": 7, "tie_word_embeddings": False, "transformers_version": "4.34.0.dev0",
}  # fmt: skip
QWEN2: dict[str, Any] = SIZES | {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 3, "eos_token_id": 3,
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768, "max_window_layers": 24,
    "model_type": "qwen2", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
    "use_mrope": False, "use_sliding_window": False,
}  # fmt: skip
QWEN3 = {key: value for key, value in QWEN2.items() if key != "use_mrope"} | {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 16, "max_position_embeddings": 40960,
    "max_window_layers": 28, "model_type": "qwen3", "rope_scaling": None, "sliding_window": None,
    "transformers_version": "4.51.0",
}  # fmt: skip
NEMOTRON: dict[str, Any] = SIZES | {
    "architectures": ["NemotronForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 3, "head_dim": 12, "hidden_act": "relu2", "initializer_range": 0.0134,
    "max_position_embeddings": 4096, "mlp_bias": False, "model_type": "nemotron", "norm_eps": 1e-05,
    "partial_rotary_factor": 0.5, "rope_theta": 10000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0.dev0", "use_cache": True,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 127,
    "embd_pdrop": 0.1, "eos_token_id": 127, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "resid_pdrop": 0.1,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 128,
}  # fmt: skip


EXPERTS = {"decoder_sparse_step": 1, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
    "output_router_logits": False, "router_aux_loss_coef": 0.001}  # fmt: skip
QWEN3_MOE = QWEN3 | EXPERTS | {
    "architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [], "model_type": "qwen3_moe", "norm_topk_prob": True,
}  # fmt: skip
QWEN2_MOE = {key: value for key, value in QWEN2.items() if key != "use_mrope"} | EXPERTS | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "norm_topk_prob": False,
    "shared_expert_intermediate_size": 40, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = MISTRAL | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 4,
    "output_router_logits": False, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
}  # fmt: skip
OLMOE: dict[str, Any] = SIZES | {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
    "eos_token_id": 3, "hidden_act": "silu", "initializer_range": 0.02, "intermediate_size": 24,
    "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False, "num_experts": 4,
    "num_experts_per_tok": 2, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True,
}  # fmt: skip
GLM4_MOE: dict[str, Any] = SIZES | {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": [3, 4],
    "first_k_dense_replace": 1, "head_dim": 16, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 131072, "model_type": "glm4_moe", "moe_intermediate_size": 24, "n_group": 1,
    "n_routed_experts": 4, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1, "pad_token_id": 5, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 2.5, "tie_word_embeddings": False,
    "topk_group": 1, "torch_dtype": "bfloat16", "transformers_version": "4.54.0", "use_cache": True,
    "use_qk_norm": True,
}  # fmt: skip
GPT_OSS: dict[str, Any] = SIZES | {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 4,
    "experts_per_token": 2, "head_dim": 16, "hidden_act": "silu", "initial_context_length": 4096,
    "initializer_range": 0.02, "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_experts_per_tok": 2, "num_local_experts": 4,
    "output_router_logits": False, "pad_token_id": 5, "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0,
        "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": False}, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 8,
    "swiglu_limit": 7.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0.dev0", "use_cache": True,
}  # fmt: skip

GEMMA3: dict[str, Any] = SIZES | {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 4],
    "final_logit_softcapping": None, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02, "max_position_embeddings": 32768, "model_type": "gemma3_text", "pad_token_id": 0,
    "query_pre_attn_scalar": 32, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 8, "sliding_window_pattern": 2, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0", "use_cache": True,
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = SIZES | {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "initializer_range": 0.02, "kv_lora_rank": 16,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 24, "moe_layer_freq": 1,
    "n_group": 4, "n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 4,
    "num_key_value_heads": 4, "num_nextn_predict_layers": 1, "q_lora_rank": 24, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40,
        "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 2, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 16,
}  # fmt: skip
DEEPSEEK_V2: dict[str, Any] = DEEPSEEK_V3 | {
    "architectures": ["DeepseekV2ForCausalLM"], "aux_loss_alpha": 0.001, "model_type": "deepseek_v2", "n_group": 1,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 3, "num_nextn_predict_layers": None,
    "q_lora_rank": None, "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.5},
    "routed_scaling_factor": 1.5, "scoring_func": "softmax", "seq_aux": True, "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip


def in_style_of_5(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The same model as transformers 5 writes it."""
    old = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype")
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]} | (config.get("rope_scaling") or {})
    if "partial_rotary_factor" in config:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    kept = {key: value for key, value in config.items() if key not in old}
    return kept | {"dtype": "bfloat16", "rope_parameters": rope, "transformers_version": "5.0.0"} | more


PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-7b": LLAMA | {key: value for key, value in MHA.items() if key != "num_key_value_heads"}
    | {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048, "pad_token_id": -1, "rms_norm_eps": 1e-06}
    | {"torch_dtype": "float16", "transformers_version": "4.27.0.dev0"},
    "Llama-2-7b": LLAMA | MHA | {"_name_or_path": "meta-llama/Llama-2-7b-hf", "pretraining_tp": 1,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16"},
    "Llama-2-70b": LLAMA | SIZES | {"max_position_embeddings": 4096, "pretraining_tp": 8, "rope_scaling": None},
    "CodeLlama-7b": LLAMA | MHA | {"max_position_embeddings": 16384, "rope_scaling": None, "rope_theta": 1000000},
    "TinyLlama": LLAMA | SIZES | {"attention_bias": False, "pretraining_tp": 1, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32"},
    "Meta-Llama-3-8B": LLAMA | SIZES | {"attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1,
        "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False},
    "Llama-3.1-8B-Instruct": LLAMA3 | {"eos_token_id": [101, 108, 109]},
    "Llama-3.2-1B": LLAMA3 | {"head_dim": 8, "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
        "tie_word_embeddings": True, "transformers_version": "4.45.0.dev0"},
    "Llama-3.3 of transformers 4.56": LLAMA3 | {"dtype": "bfloat16", "head_dim": 8},
    "Llama-3.1 of transformers 5": in_style_of_5(LLAMA3, head_dim=8, pad_token_id=None),
    "Llama-3.1-Minitron-Width": LLAMA3 | {"head_dim": 16, "num_attention_heads": 4},
    "SmolLM2-135M": LLAMA | SIZES | {"attention_bias": False, "is_llama_config": True, "mlp_bias": False,
        "num_attention_heads": 4, "pretraining_tp": 1, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "transformers.js_config": {"kv_cache_dtype": {"q4": "x"}}},
    "Yi-6B": LLAMA | SIZES | {"pad_token_id": 0, "rope_theta": 5000000.0, "tie_word_embeddings": False},
    "Mistral-7B-v0.1": MISTRAL,
    "Mistral-7B-v0.3": MISTRAL | {"attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None},
    "Mistral-Nemo-Base-2407": MISTRAL | {"head_dim": 16, "rope_theta": 1000000.0, "sliding_window": None},
    "Mistral of transformers 5": in_style_of_5(MISTRAL, head_dim=None),
    "Qwen1.5-0.5B": QWEN2 | {"num_key_value_heads": 4, "max_window_layers": 21},
    "Qwen2-0.5B": QWEN2,
    "Qwen2.5-7B": QWEN2 | {"tie_word_embeddings": False, "max_window_layers": 28, "sliding_window": 131072},
    "Qwen2.5 with windows of no layer": QWEN2 | {"use_sliding_window": True, "max_window_layers": 2},
    "Qwen2.5 of transformers 4.56": QWEN2 | {"dtype": "bfloat16", "layer_types": ["full_attention"] * 2},
    "Qwen2.5 of transformers 5": in_style_of_5(QWEN2, layer_types=["full_attention"] * 2, sliding_window=None),
    "Qwen3-0.6B": QWEN3,
    "Qwen3-8B": QWEN3 | {"tie_word_embeddings": False, "head_dim": 8},
    "Qwen3 of transformers 5": in_style_of_5(QWEN3, layer_types=["full_attention"] * 2),
    "Qwen3-30B-A3B": QWEN3_MOE,
    "Qwen3-30B-A3B of transformers 5": in_style_of_5(
        {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"}, num_local_experts=4),
    "Qwen1.5-MoE-A2.7B": QWEN2_MOE,
    "Mixtral-8x7B-v0.1": MIXTRAL,
    "OLMoE-1B-7B-0924": OLMOE,
    "GLM-4.5": GLM4_MOE,
    "GLM-4.5-Air": GLM4_MOE | {"routed_scaling_factor": 1.0, "use_qk_norm": False},
    "gpt-oss-20b, dequantised": GPT_OSS,
    "gemma-3-1b": GEMMA3,
    "text of gemma-3-4b": GEMMA3 | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 6},
    "gemma-3 of transformers 5": {key: value for key, value in GEMMA3.items() if not key.startswith(("rope", "torch"))}
    | {"dtype": "bfloat16", "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
        "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}}},
    "DeepSeek-V3, dequantised": DEEPSEEK_V3,
    "DeepSeek-V3 of transformers 5": in_style_of_5(DEEPSEEK_V3, head_dim=8, qk_head_dim=24, rope_interleave=True),
    "Moonlight-16B-A3B": DEEPSEEK_V3 | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "q_lora_rank": None,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0},
    "DeepSeek-V2-Lite": DEEPSEEK_V2,
    "gpt-oss of transformers 5": in_style_of_5(GPT_OSS, swiglu_alpha=1.702),
    "Minitron-4B": NEMOTRON,
    "Nemotron of transformers 5": in_style_of_5(NEMOTRON),
    "gpt2": GPT2,
    "distilgpt2": GPT2 | {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "n_layer": 1},
    "Cerebras-GPT": GPT2 | {"activation_function": "gelu", "n_inner": 64, "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "torch_dtype": "float32"},
    "gpt2 of transformers 5": GPT2 | {"add_cross_attention": False, "dtype": "float32", "pad_token_id": None,
        "tie_word_embeddings": True, "n_inner": None},
}  # fmt: skip
TOKENS = torch.randint(5, 120, (2, 24), generator=torch.Generator().manual_seed(1))


def published(path: Path, config: dict[str, Any]) -> Path:
    """A directory with this config.json, word for word, and random weights of what transformers makes of it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, indent=2))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.uniform_(0.5, 1.5) if gain else parameter.normal_(std=0.2)
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    weights = {name: weight.to(dtype).contiguous() for name, weight in model.state_dict().items()}
    tied = name_of_output(model)
    save_file({n: w for n, w in weights.items() if n != tied}, path / "model.safetensors", metadata={"format": "pt"})
    return path


def name_of_output(model: Any) -> str | None:
    """The output layer's weight, where it is the embedding's."""
    return "lm_head.weight" if model.config.tie_word_embeddings else None


def transformers_logits(directory: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of the model that transformers opens; fails when a weight is missing or left over."""
    from transformers import AutoModelForCausalLM

    model, about = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), about
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture(scope="module")
def layout() -> Iterator[backend.Layout]:
    """One process, joined."""
    layout = backend.Layout()
    with backend.running(layout):
        yield layout


def round_trip(directory: Path, export: Path, layout: backend.Layout) -> Tensor:
    """Import in float32 and export; the logits in between."""
    model = read_hf(HFReader(directory), layout, "float32")
    write_hf(export, model.config, model.hf_weights(), None)
    return logits(model, TOKENS).cpu()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_goes_all_the_way(tmp_path: Path, layout: backend.Layout, name: str) -> None:
    directory = published(tmp_path / "hf", PUBLISHED[name])
    found, expected = round_trip(directory, tmp_path / "new", layout), transformers_logits(directory)
    assert float((found - expected).abs().max()) < 1e-4
    assert torch.equal(transformers_logits(tmp_path / "new"), expected)
    check_export(HFReader(directory).model_config)
    before, after = HFReader(directory).model_config, HFReader(tmp_path / "new").model_config
    assert replace(after, hf_config={}) == replace(before, hf_config={}, dtype="float32")
    kept, source = after.hf_config, PUBLISHED[name]
    changed = {key for key in source if kept[key] != source[key]}
    assert changed <= {"dtype", "torch_dtype"} and kept.keys() - source.keys() <= {"dtype"}


def test_all_families_are_published() -> None:
    assert {family_of(config).name for config in PUBLISHED.values()} == FAMILIES.keys()


def test_both_names_of_the_type_are_written(tmp_path: Path) -> None:
    config = family_of(LLAMA3).from_hf(LLAMA3 | {"dtype": "bfloat16"})
    written = FAMILIES["llama"].to_hf(replace(config, dtype="float32"))
    assert written["dtype"] == written["torch_dtype"] == "float32"
    assert family_of(LLAMA3).from_hf(LLAMA3 | {"dtype": "float32"}).dtype == "float32", "as in transformers"


NOT_REPRESENTED: list[tuple[dict[str, Any], str]] = [
    (LLAMA3 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'.*take rope_scaling out"),
    (LLAMA3 | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    (QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'.*put it into the export again"),
    (LLAMA3 | {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope type 'longrope'"),
    (LLAMA3 | {"rope_scaling": {"rope_type": ["llama3"]}}, r"rope type \['llama3'\]"),
    (LLAMA3 | {"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_scaling": None}, "each type of"),
    (LLAMA3 | {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "first must be below the second"),
    (LLAMA3 | {"is_causal": False}, "is_causal: False"),
    (LLAMA3 | {"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config"),
    (LLAMA3 | {"transformers_weights": "other.safetensors"}, "transformers_weights: 'other.safetensors'"),
    (LLAMA3 | {"attention_bias": 1}, "attention_bias: 1"),
    (QWEN2 | {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window: True for the layers from 1 on"),
    (LLAMA3 | {"dtype": {"": "bfloat16"}}, "config.json has dtype .*save the model in one"),
    (LLAMA3 | {"dtype": "float64"}, "dtype 'float64'.*save the model in one"),
    ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, "text_config is of a mistral model: save"),
    ({"model_type": ["llama"]}, r"model_type \['llama'\]; supported: deepseek_v2, deepseek_v3, gemma3_text, glm4"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), NOT_REPRESENTED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_another_model_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        family_of(config).from_hf(config)


WRONG: list[tuple[str, Any]] = [
    ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**39), ("num_hidden_layers", 2.0), ("hidden_size", 10**9),
    ("intermediate_size", 10**12), ("num_attention_heads", 10**7), ("num_key_value_heads", [2]), ("head_dim", 10**39),
    ("vocab_size", 10**9), ("max_position_embeddings", 10**39), ("rope_theta", 10**39), ("rope_theta", float("inf")),
    ("rms_norm_eps", 10**39), ("rms_norm_eps", 2), ("rms_norm_eps", float("nan")), ("layer_types", 5),
    ("layer_types", [5]), ("layer_types", {"a": 1}), ("architectures", "LlamaForCausalLM"), ("architectures", [5]),
    ("rope_scaling", [1]), ("rope_scaling", LLAMA3_ROPE | {"factor": 10**39}), ("tie_word_embeddings", None),
    ("rope_scaling", LLAMA3_ROPE | {"original_max_position_embeddings": "8192"}), ("dtype", ["bfloat16"]),
    ("hidden_act", ["silu"]), ("hidden_act", {"silu": 1}), ("attention_bias", [False]), ("block_configs", 5),
    ("block_configs", [[]]), ("quantization_config", 5), ("num_labels", 10**9), ("torch_dtype", 16),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_values_of_config_json_have_types_and_bounds(key: str, value: Any) -> None:
    config = {name: v for name, v in LLAMA3.items() if name != "torch_dtype"} | {key: value}
    if (key, value) == ("tie_word_embeddings", None):
        assert family_of(config).from_hf(config).tie_word_embeddings is False, "the family's default"
        return
    end = "_blocks" if key == "block_configs" else ""
    config["model_type"] += end
    with pytest.raises(UserError) as caught:
        family_of(config).from_hf(config)
    assert len(str(caught.value)) <= LONGEST and str(caught.value).startswith("config.json")


# --- names of tensors ---

Renamed = Callable[[str], str]
FORMS: dict[str, Renamed] = {
    "compiled": lambda name: "_orig_mod." + name,
    "data parallel": lambda name: "module." + name,
    "compiled in data parallel": lambda name: "module._orig_mod." + name,
    "data parallel compiled": lambda name: "_orig_mod.module." + name,
    "merged by PEFT": lambda name: "base_model.model." + name,
    "merged by PEFT in data parallel, twice": lambda name: "module.module.base_model.model." + name,
    "compiled layers": lambda name: name.replace(".1.", ".1._orig_mod."),
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(".0.", ".0._fsdp_wrapped_module."),
    "checkpointed layers": lambda name: name.replace(".0.", ".0._checkpoint_wrapped_module."),
    "reader of a model of several inputs": lambda name: "language_model." + name,
    "Lightning": lambda name: "model." + name,
    "bare": lambda name: name.removeprefix("model.").removeprefix("transformer."),
    "bare, compiled": lambda name: "_orig_mod." + name.removeprefix("model.").removeprefix("transformer."),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_names_of_wrappers_are_read_through(tmp_path: Path, form: str, model_type: str, tied: bool) -> None:
    directory = tiny_model(tmp_path / "hf", model_type, tie_word_embeddings=tied)
    file = directory / "model.safetensors"
    weights = load_file(file)
    save_file({FORMS[form](name): weight for name, weight in weights.items()}, file)
    reader = HFReader(directory)
    assert sorted(reader.names()) == sorted(weights)
    assert all(torch.equal(reader.read(name), weight) for name, weight in weights.items())


def test_transformers_gets_renamed_weights_where_it_evaluates(tmp_path: Path) -> None:
    """By itself it would overlook them and make up others."""
    directory = tiny_llama(tmp_path / "hf", tie_word_embeddings=True)
    expected, file = transformers_logits(directory), directory / "model.safetensors"
    save_file({"module._orig_mod." + name: weight for name, weight in load_file(file).items()}, file)
    with torch.no_grad():
        assert torch.equal(in_transformers(HFReader(directory), torch.float32)(TOKENS).logits, expected)


def test_the_language_model_within_a_model() -> None:
    assert unwrapped("model.language_model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert unwrapped("language_model.model.norm.weight") == "model.norm.weight"
    assert unwrapped("module") == "module" and unwrapped("base_model.model") == "base_model.model"


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path / "hf")
    weights = load_file(directory / "model.safetensors")
    save_file(weights | {"module.model.norm.weight": torch.ones(32)}, directory / "model.safetensors")
    with pytest.raises(UserError, match="module.model.norm.weight, both for model.norm.weight; keep one"):
        HFReader(directory)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_a_tied_weight_under_the_name_of_the_output_layer(tmp_path: Path, model_type: str) -> None:
    """What safetensors' own save_model leaves of the two names."""
    from transformers import AutoModelForCausalLM

    directory = tiny_model(tmp_path / "hf", model_type, tie_word_embeddings=True)
    embedding = HFReader(directory).names()[0]
    expected = HFReader(directory).read(embedding)
    save_model(AutoModelForCausalLM.from_pretrained(directory), str(directory / "model.safetensors"))
    assert embedding not in load_file(directory / "model.safetensors")
    assert torch.equal(HFReader(directory).read(embedding), expected)
    bare = {"lm_head.weight": expected} | {
        name.removeprefix("model.").removeprefix("transformer."): weight
        for name, weight in load_file(directory / "model.safetensors").items()
    }
    save_file(bare, directory / "model.safetensors")
    assert torch.equal(HFReader(directory).read(embedding), expected)


def test_buffers_of_old_versions_are_named_as_left_behind(tmp_path: Path) -> None:
    tables = [(kind, "layers.0.self_attn.rotary_emb.inv_freq") for kind in sorted(FAMILIES.keys() - {"gpt2"})]
    for model_type, name in [*tables, ("llama", "rotary_emb.inv_freq"), ("gpt2", "h.0.attn.masked_bias")]:
        directory = tiny_model(tmp_path / (model_type + name), model_type)
        weights = load_file(directory / "model.safetensors")
        bare = {key.removeprefix("model.").removeprefix("transformer."): value for key, value in weights.items()}
        for given in (weights, bare):
            save_file(given | {name: torch.ones(4)}, directory / "model.safetensors")
            left = HFReader(directory).left_behind() or ""
            assert "1 tensors that no weight of the model is in, such as" in left and name in left


def test_types_may_be_mixed(tmp_path: Path, layout: backend.Layout) -> None:
    directory = tiny_llama(tmp_path / "hf", dtype=torch.bfloat16)
    weights = load_file(directory / "model.safetensors")
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    mixed = {name: weight.to(kinds[number % 3]) for number, (name, weight) in enumerate(weights.items())}
    save_file(mixed, directory / "model.safetensors", metadata={"format": "pt"})
    assert float((round_trip(directory, tmp_path / "new", layout) - transformers_logits(directory)).abs().max()) < 1e-4


# --- files ---


def test_one_file_counts_where_shards_are_beside_it(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path / "hf", max_shard_size="20KB")
    whole = tiny_llama(tmp_path / "whole", seed=1)
    (whole / "model.safetensors").rename(directory / "model.safetensors")
    weights = load_file(directory / "model.safetensors")
    reader = HFReader(directory)
    assert all(torch.equal(reader.read(name), weight) for name, weight in weights.items())
    assert "model-00001-of-00007.safetensors" in (reader.left_behind() or "")


def test_a_snapshot_of_the_hub_is_made_of_links(tmp_path: Path) -> None:
    directory = byte_tokenizer(tiny_llama(tmp_path / "blobs"))
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in directory.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    assert torch.equal(HFReader(snapshot).read("model.norm.weight"), HFReader(directory).read("model.norm.weight"))
    assert HFReader(snapshot).left_behind() is None


def adapter(directory: Path) -> Path:
    """The files of a PEFT adapter in a directory."""
    directory.mkdir(exist_ok=True)
    about = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B", "r": 4}
    (directory / "adapter_config.json").write_text(json.dumps(about))
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(1)}, directory / "adapter_model.safetensors")
    return directory


def with_tensors(directory: Path, **more: Tensor) -> None:
    """More tensors, `__` standing for a dot, in the directory's file."""
    file = directory / "model.safetensors"
    save_file(load_file(file) | {name.replace("__", "."): tensor for name, tensor in more.items()}, file)


def without(directory: Path, *names: str) -> None:
    """The directory's file without some tensors."""
    file = directory / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name not in names}, file)


def replaced(directory: Path, name: str) -> None:
    """The weights under another name of a file."""
    (directory / "model.safetensors").rename(directory / name)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345678\n"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapter beside the model": (adapter, "an adapter .*'LORA' of 'meta-llama/Llama-3.2-1B'.*beside.*merge_and_unload"),
    "adapter alone": (
        lambda d: (adapter(d), (d / "config.json").unlink()),
        "an adapter .*and no model: merge it into its model first.*merge_and_unload",
    ),
    "adapter not merged": (
        lambda d: with_tensors(d, model__layers__0__self_attn__q_proj__lora_A__default__weight=torch.ones(4, 32)),
        "lora_A.default.weight, a part of an adapter that is not merged.*merge_and_unload",
    ),
    "bitsandbytes": (
        lambda d: edit_config(d, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"quantised \(bitsandbytes\).*give the unquantised model.*dequantise it: .*dequantize\(\)",
    ),
    "fp8": (
        lambda d: edit_config(d, quantization_config={"quant_method": "fp8"}),
        r"quantised \(fp8\).*FineGrainedFP8Config\(dequantize=True\)",
    ),
    "gptq": (lambda d: edit_config(d, quantization_config={"quant_method": "gptq", "bits": 4}), "gptq.*unquantised"),
    "awq": (lambda d: edit_config(d, quantization_config={"quant_method": "awq"}), "awq.*unquantised model"),
    "mxfp4": (lambda d: edit_config(d, quantization_config={"quant_method": "mxfp4"}), "Mxfp4Config"),
    "compressed-tensors": (
        lambda d: edit_config(d, quantization_config={"quant_method": "compressed-tensors", "format": "x"}),
        r"compressed-tensors\).*CompressedTensorsConfig\(dequantize=True\)",
    ),
    "a method without a name": (lambda d: edit_config(d, quantization_config={"bits": 4}), "unnamed.*unquantised"),
    "gptq of old": (lambda d: (d / "quantize_config.json").write_text("{}"), "quantize_config.json.*quantised .gptq"),
    "ModelOpt": (lambda d: (d / "hf_quant_config.json").write_text("{}"), "hf_quant_config.json.*modelopt"),
    "packed weights": (
        lambda d: with_tensors(d, model__layers__0__mlp__up_proj__qweight=torch.ones(4, dtype=torch.int32)),
        "up_proj.qweight: the model is quantised .gptq or awq.*unquantised",
    ),
    "weights of bitsandbytes": (
        lambda d: with_tensors(d, model__layers__0__mlp__up_proj__weight__absmax=torch.ones(4)),
        "weight.absmax: the model is quantised .bitsandbytes",
    ),
    "weights in fp8": (
        lambda d: with_tensors(d, model__norm__weight=torch.ones(32).to(torch.float8_e4m3fn)),
        "model.norm.weight in F8_E4M3: the model is quantised .fp8.",
    ),
    "int8": (lambda d: with_tensors(d, model__norm__weight=torch.ones(32, dtype=torch.int8)), "dtype I8.*unquantised"),
    "float64": (lambda d: with_tensors(d, model__norm__weight=torch.ones(32).double()), "dtype F64; supported.*save"),
    "classifier": (
        lambda d: (without(d, "lm_head.weight"), with_tensors(d, score__weight=torch.ones(2, 32))),
        "score.weight: the model is a classifier.*give the language model",
    ),
    "classifier with an output layer": (lambda d: with_tensors(d, score__weight=torch.ones(2, 32)), "a classifier"),
    "reward model": (lambda d: with_tensors(d, v_head__summary__weight=torch.ones(1, 32)), "a reward model"),
    "bare model": (
        lambda d: (without(d, "lm_head.weight"), edit_config(d, architectures=["LlamaModel"])),
        "no tensor lm_head.weight.*saved without its output layer .*'LlamaModel'.*set tie_word_embeddings to true",
    ),
    "authors' form": (lambda d: replaced(d, "consolidated.safetensors"), "form of the model's authors; give"),
    "another name": (lambda d: replaced(d, "model.fp16.safetensors"), "name one file model.safetensors"),
    "pickles": (lambda d: replaced(d, "pytorch_model.bin"), "can run code.*save_pretrained"),
    "pointer": (lambda d: (d / "model.safetensors").write_text(POINTER), "pointer of Git LFS.*git lfs pull"),
    "pointer of config.json": (lambda d: (d / "config.json").write_text(POINTER), "config.json is a pointer of Git"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_language_model_is_refused_with_the_next_step(tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    directory = tiny_llama(tmp_path / "hf")
    change(directory)
    with pytest.raises(UserError, match=message) as caught:
        HFReader(directory)
    assert len(str(caught.value)) < LONGEST, "nothing of it was cut"


def index_of(**weight_map: Any) -> Callable[[Path], object]:
    """Makes the directory's file a shard that this index names."""

    def change(directory: Path) -> None:
        replaced(directory, "a.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def header(text: str, data: bytes = b"") -> Callable[[Path], object]:
    """Makes the directory's file one with this header."""
    head = text.encode()
    return lambda d: (d / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)


def one(**changes: Any) -> str:
    """A header with one tensor of four bytes, changed."""
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes})


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "above": (index_of(a="../a.safetensors"), r"names the file '\.\./a.safetensors'; allowed: files in its own"),
    "absolute": (index_of(a="/etc/passwd"), "names the file '/etc/passwd'"),
    "the folder itself": (index_of(a="."), r"names the file '\.'"),
    "no name": (index_of(a=""), "names the file ''"),
    "NUL": (index_of(a="a\0.safetensors"), "a NUL in"),
    "surrogate": (index_of(a="a\ud800.safetensors"), "not Unicode text"),
    "a list": (index_of(a=["a.safetensors"]), "no weight_map of file names"),
    "long": (index_of(a="a" * 10**5), "does not exist"),
    "unknown": (index_of(a="b.safetensors"), "b.safetensors does not exist, but .*index.json names it"),
    "index twice": (
        lambda d: (replaced(d, "a"), (d / "model.safetensors.index.json").write_text('{"a": 1, "a": 2}')),
        "given twice",
    ),
    "config of digits": (lambda d: (d / "config.json").write_text('{"a": ' + "9" * 5000 + "}"), "5000 digits"),
    "config nested": (lambda d: (d / "config.json").write_text("[" * 10**5), "config.json is damaged"),
    "header nested": (header("[" * 10**5), "header of .*model.safetensors is damaged"),
    "dtype a list": (header(one(dtype=["F32"]), b"1234"), "key 'a.dtype'.*fetch it again"),
    "shape negative": (header(one(shape=[-1]), b"1234"), "key 'a.shape.0': -1 given"),
    "shape of text": (header(one(shape="1"), b"1234"), "key 'a.shape'"),
    "shape huge": (header(one(shape=[10**30]), b"1234"), "key 'a.shape.0'"),
    "shape of many": (header(one(shape=[1] * 100), b"1234"), "key 'a.shape'"),
    "more keys": (header(one(more=1), b"1234"), "key 'a.more'"),
    "offsets of three": (header(one(data_offsets=[0, 4, 4]), b"1234"), "key 'a.data_offsets'"),
    "offsets backwards": (header(one(data_offsets=[4, 0]), b""), "damaged"),
    "too few bytes": (header(one(shape=[2]), b"1234"), r"'F32' \[2\], has 4 bytes"),
    "hole": (header(one(data_offsets=[4, 8]), b"12345678"), "a begins at byte 4, not at 0"),
    "overlap": (
        header(one()[:-1] + ', "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}', b"123456"),
        "b begins at byte 2, not at 4",
    ),
    "twice": (header('{"a": 1, "a": 2}'), "given twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_short_line(tmp_path: Path, name: str) -> None:
    change, message = HOSTILE[name]
    directory = tiny_llama(tmp_path / "hf")
    change(directory)
    with pytest.raises(UserError, match=message) as caught:
        HFReader(directory)
    assert len(str(caught.value)) <= LONGEST and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json", "a.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
def test_only_ordinary_files_are_opened(tmp_path: Path, file: str, kind: str) -> None:
    """A pipe would be waited for, and a device read, for ever."""
    directory = tiny_llama(tmp_path / "hf")
    if file in ("model.safetensors.index.json", "a.safetensors"):
        index_of(a="a.safetensors")(directory)
    (directory / file).unlink()
    make: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(directory / file),
        "device": lambda: (directory / file).symlink_to("/dev/zero"),
        "loop": lambda: (directory / file).symlink_to(file),
        "folder": lambda: (directory / file).mkdir(),
    }
    make[kind]()
    with pytest.raises(UserError, match="no ordinary file|does not exist|cannot be opened|holds neither|but neither"):
        HFReader(directory)


# --- what comes along ---


def test_what_stays_behind_is_told_once_and_the_rest_comes_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}, attn_implementation="evil/kernel")
    for name in (
        "README.md",
        "modeling_mine.py",
        "LICENSE.txt",
        "USE_POLICY.md",
        ".gitattributes",
        "training_args.bin",
    ):
        (directory / name).write_text(name)
    for name in ("original", "additional_chat_templates"):
        (directory / name).mkdir()
        (directory / name / "tool_use.jinja").write_text("{{ messages }}")
    assert main(["import", "--input", str(directory), "--output", str(tmp_path / "ck")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "not carried along" in line]
    assert len(lines) == 1 and len(lines[0]) < 500
    told = lines[0].partition(str(directory))[2]
    assert all(name in told for name in ("README.md", "modeling_mine.py", "original/", "training_args.bin"))
    assert "of config.json auto_map, attn_implementation: the model is transformers' own" in told
    assert not any(name in told for name in ("LICENSE", "USE_POLICY", "additional", "tokenizer", "gitattributes"))
    assert main(["export", "--input", str(tmp_path / "ck"), "--output", str(tmp_path / "new")]) == 0
    exported = {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert exported >= {"LICENSE.txt", "USE_POLICY.md", "additional_chat_templates/tool_use.jinja", "tokenizer.json"}
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert not {"auto_map", "attn_implementation"} & config.keys() and "modeling_mine.py" not in exported


def test_the_class_of_the_export_is_a_language_model() -> None:
    def classes(values: dict[str, Any], *given: str) -> list[str]:
        changed = values | {"architectures": list(given)}
        family = family_of(changed)
        return family.to_hf(family.from_hf(changed))["architectures"]

    assert classes(LLAMA3, "LlamaModel") == classes(LLAMA3, "LlamaForSequenceClassification") == ["LlamaForCausalLM"]
    assert classes(GPT2, "GPT2Model") == ["GPT2LMHeadModel"]
    assert classes(LLAMA3, "LLaMAForCausalLM") == ["LLaMAForCausalLM"], "as it was published"
