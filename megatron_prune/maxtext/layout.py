"""Hugging Face weights <-> MaxText's parameter tree: pure functions of numpy arrays; neither JAX nor PyTorch.

E = hidden, F = MLP width, H = query heads, K = key/value heads, D = width of a head, V = vocabulary, L = layers,
X = experts, M = width of an expert.
MaxText scans over layers, so a weight of all of them is one array, with the layers as its second dimension:

    q_proj [H * D, E] of every layer           ->  decoder/layers/self_attention/query/kernel [E, L, H, D]
    gate_proj [M, E] of every expert and layer ->  decoder/layers/moe_block/wi_0 [X, L, E, M]

Three things change beside the shape:
- MaxText's decoders for LLaMA and Mixtral do not divide by sqrt(D) when they attend: the query weight has the factor in
  it. Its decoders for Qwen2 (biases of query, key and value) and Qwen3 (norms of query and key) divide.
- Where the rotary embedding is the plain one, MaxText rotates the halves of a head against each other, as transformers
  does. With llama3 scaling it rotates neighbours, so the rows of every query and key head are interleaved:

      plain  a0 a1 a2 a3 b0 b1 b2 b3        llama3  a0 b0 a1 b1 a2 b2 a3 b3

  A wrong pairing loads without complaint and computes nonsense, so rows and configuration come from one function here.
- A tied output layer becomes one of its own: MaxText's tied one is rounded to bfloat16 whatever the type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_prune.errors import UserError
from megatron_prune.model.families import ModelConfig

Tree = dict[str, np.ndarray]
"""Parameters by their path below `params`, such as decoder/decoder_norm/scale."""
LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""The only llama3 scaling that MaxText has: the numbers are constants in its code."""
TINY = np.float32(2.0**-126)
"""What a kept weight that is exactly zero becomes while masks are trained: in a masked matrix, zero means removed."""


@dataclass(frozen=True)
class Leaf:
    """One array of the tree and the Hugging Face weight, of every layer where it says {layer}, that it is made of."""

    path: str
    hf: str
    shape: str
    """Of one layer, in the letters above; what the Hugging Face weight has transposed."""
    query: bool = False
    """Of the queries: in LLaMA's decoder it has the factor 1 / sqrt(D) in it."""
    rotated: bool = False

    @property
    def of_experts(self) -> bool:
        """Whether each expert has a weight of its own."""
        return "{expert}" in self.hf

    @property
    def matrix(self) -> bool:
        """Whether it is a linear's weight."""
        return self.of_experts or self.path.endswith("/kernel")

    @property
    def prunable(self) -> bool:
        """Whether masks apply to it: to all linears of the layers but routers."""
        return self.matrix and "{layer}" in self.hf and "X" not in self.shape


_LAYER = "model.layers.{layer}."
LEAVES = (
    Leaf("token_embedder/embedding", "model.embed_tokens.weight", "VE"),
    Leaf("decoder/layers/pre_self_attention_layer_norm/scale", _LAYER + "input_layernorm.weight", "E"),
    Leaf(
        "decoder/layers/self_attention/query/kernel",
        _LAYER + "self_attn.q_proj.weight",
        "EHD",
        query=True,
        rotated=True,
    ),
    Leaf("decoder/layers/self_attention/key/kernel", _LAYER + "self_attn.k_proj.weight", "EKD", rotated=True),
    Leaf("decoder/layers/self_attention/value/kernel", _LAYER + "self_attn.v_proj.weight", "EKD"),
    Leaf("decoder/layers/self_attention/out/kernel", _LAYER + "self_attn.o_proj.weight", "HDE"),
    Leaf("decoder/layers/post_self_attention_layer_norm/scale", _LAYER + "post_attention_layernorm.weight", "E"),
    Leaf("decoder/layers/mlp/wi_0/kernel", _LAYER + "mlp.gate_proj.weight", "EF"),
    Leaf("decoder/layers/mlp/wi_1/kernel", _LAYER + "mlp.up_proj.weight", "EF"),
    Leaf("decoder/layers/mlp/wo/kernel", _LAYER + "mlp.down_proj.weight", "FE"),
    Leaf("decoder/decoder_norm/scale", "model.norm.weight", "E"),
    Leaf("decoder/logits_dense/kernel", "lm_head.weight", "EV"),
)
_EMBEDDING, _HEAD = LEAVES[0], LEAVES[-1]
_ATTENTION = "decoder/layers/self_attention/"
BIASES = (
    Leaf(_ATTENTION + "query/bias", _LAYER + "self_attn.q_proj.bias", "HD"),
    Leaf(_ATTENTION + "key/bias", _LAYER + "self_attn.k_proj.bias", "KD"),
    Leaf(_ATTENTION + "value/bias", _LAYER + "self_attn.v_proj.bias", "KD"),
)
"""Of Qwen2's decoder."""
NORMS = (
    Leaf(_ATTENTION + "query_norm/scale", _LAYER + "self_attn.q_norm.weight", "D"),
    Leaf(_ATTENTION + "key_norm/scale", _LAYER + "self_attn.k_norm.weight", "D"),
)
"""Of Qwen3's decoder."""


def _experts(block: str, there: str, gate: str, up: str, down: str) -> tuple[Leaf, ...]:
    start, router, expert = f"decoder/layers/{block}/", _LAYER + there, _LAYER + there + "experts.{expert}."
    return (
        Leaf(start + "gate/kernel", router + "gate.weight", "EX"),
        Leaf(start + "wi_0", f"{expert}{gate}.weight", "EM"),
        Leaf(start + "wi_1", f"{expert}{up}.weight", "EM"),
        Leaf(start + "wo", f"{expert}{down}.weight", "ME"),
    )


EXPERTS = {
    "mixtral": _experts("MoeBlock_0", "block_sparse_moe.", "w1", "w3", "w2"),
    "qwen3_moe": _experts("moe_block", "mlp.", "gate_proj", "up_proj", "down_proj"),
}
"""In place of the MLP, by MaxText's name of the decoder."""
MASKED = tuple(leaf for leaf in (*LEAVES, *EXPERTS["mixtral"], *EXPERTS["qwen3_moe"]) if leaf.prunable)
"""What masks apply to in any decoder."""


def leaves(config: ModelConfig) -> tuple[Leaf, ...]:
    """The arrays of the tree of a model, the output layer last."""
    experts = EXPERTS.get(decoder(config), ())
    usual = [leaf for leaf in LEAVES[:-1] if not (experts and "/mlp/" in leaf.path)]
    more = (BIASES if config.qkv_bias else ()) + (NORMS if config.qk_layernorm else ())
    return (*usual, *experts, *more, _HEAD)


def masked_leaves(config: ModelConfig) -> list[Leaf]:
    """Those of a model that masks apply to."""
    return [leaf for leaf in leaves(config) if leaf.prunable]


def decoder(config: ModelConfig) -> str:
    """MaxText's name of the decoder that computes what the model does; Mistral's is LLaMA's."""
    if config.num_moe_experts:
        return "qwen3_moe" if config.qk_layernorm else "mixtral"
    return "qwen2" if config.qkv_bias else "qwen3" if config.qk_layernorm else "llama2"


def factor(leaf: Leaf, config: ModelConfig) -> float:
    """By what an array is smaller than the weight, as the decoder divides by sqrt(D) or does not."""
    return math.sqrt(config.kv_channels) if leaf.query and decoder(config) in ("llama2", "mixtral") else 1.0


def check(config: ModelConfig) -> None:
    """UserError for a model that MaxText's decoders cannot be, before anything is read or written."""
    wrong = {
        f"layers of the {config.family} family": config.activation != "silu" or not config.gated,
        f"{config.normalization}": config.normalization != "RMSNorm",
        **_unlike(config),
        "norms over all heads of queries and keys": config.qk_layernorm_whole,
        "biases": config.linear_bias,
        "biases and normalised queries and keys": config.qkv_bias and config.qk_layernorm,
        "biases of queries, and experts": config.qkv_bias and config.num_moe_experts is not None,
        "learned positions": config.position_embedding != "rope",
        f"a rotation of {config.rotary_percent:.0%} of a head": config.rotary_percent != 1.0,
        f"a sliding window of {config.sliding_window} tokens": config.sliding_window is not None,
        "layers of different sizes (pad them: export --layers padded)": config.blocks is not None,
        "llama3 rope scaling without LLaMA's decoder": config.rope_scaling is not None and decoder(config) != "llama2",
        f"rope_theta {config.rotary_base} (MaxText's is a whole number)": config.rotary_base != int(config.rotary_base),
    }
    for what, present in wrong.items():
        if present:
            raise UserError(
                f"the model has {what}; MaxText export is for LLaMA, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE: use "
                "--format hf"
            )
    scaling = config.rope_scaling
    if scaling is not None and any(scaling[key] != value for key, value in LLAMA3.items()):
        given = ", ".join(f"{key} {scaling[key]}" for key in LLAMA3)
        allowed = ", ".join(f"{key} {value}" for key, value in LLAMA3.items())
        raise UserError(f"the model has llama3 rope scaling with {given}; MaxText has {allowed} only: use --format hf")


def _unlike(config: ModelConfig) -> dict[str, bool]:
    """What experts may have that MaxText's decoders for Mixtral and Qwen3-MoE have not -> whether it is there.

    Their gates are the softmax over a token's own experts, whatever `norm_topk_prob` says.
    """
    if not config.num_moe_experts:
        return {}
    rule = config.moe_router_score_function != "softmax" or config.moe_router_expert_bias
    rule = rule or config.moe_router_num_groups is not None or config.moe_router_topk_scaling_factor is not None
    return {
        "experts in some of its layers only": config.moe_layers is not None,
        f"experts of the {config.family} family: a shared one for all tokens": config.shared_width > 0,
        f"experts of the {config.family} family: another rule of routing": rule,
        "experts whose gates do not add up to 1 (norm_topk_prob is false)": not config.moe_renormalize,
    }


def interleaved(config: ModelConfig) -> bool:
    """Whether MaxText rotates neighbours: see above. `settings` says the same to MaxText."""
    return config.rope_scaling is not None


def settings(config: ModelConfig) -> dict[str, Any]:
    """MaxText's configuration of the model, by its keys."""
    experts = {
        "num_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "base_moe_mlp_dim": config.moe_ffn_hidden_size,
        "norm_topk_prob": config.qk_layernorm,  # as MaxText's own configurations have it; the sum is 1 in any case
        "prefuse_moe_weights": False,
    }
    return {
        "model_name": "default",
        "decoder_block": decoder(config),
        "base_emb_dim": config.hidden_size,
        "base_mlp_dim": config.moe_ffn_hidden_size if config.num_moe_experts else config.ffn_hidden_size,
        "base_num_decoder_layers": config.num_layers,
        "base_num_query_heads": config.num_attention_heads,
        "base_num_kv_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "vocab_size": config.vocab_size,
        "mlp_activations": ["silu", "linear"],
        "normalization_layer_epsilon": config.layernorm_epsilon,
        "rope_type": "llama3.1" if interleaved(config) else "default",
        "rope_use_scale": interleaved(config),
        "rope_max_timescale": int(config.rotary_base),
        "logits_via_embedding": False,
        "normalize_embedding_logits": False,
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_layernorm,
        "fused_qkv": False,
        "fused_mlp": False,
        "scan_layers": True,
        "param_scan_axis": 1,
        "weight_dtype": "float32",
        **(experts if config.num_moe_experts else {}),
    }


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every array of the tree."""
    return {leaf.path: _stacked(leaf, config) for leaf in leaves(config)}


def places(leaf: Leaf, config: ModelConfig) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The Hugging Face name of every weight that an array is made of, and its place there as an index."""
    for layer in range(config.num_layers if "{layer}" in leaf.hf else 1):
        if leaf.of_experts:
            for expert in range(config.num_moe_experts or 0):
                yield leaf.hf.format(layer=layer, expert=expert), (expert, layer)
        else:
            yield leaf.hf.format(layer=layer), (slice(None), layer) if "{layer}" in leaf.hf else ()


def to_maxtext(
    read: Callable[[str], np.ndarray],
    config: ModelConfig,
    masks: Mapping[str, np.ndarray],
    dtype: str = "float32",
) -> Tree:
    """The tree of Hugging Face weights, which are read one at a time by name; stored as `dtype` (`stored_as`).

    `masks`: Hugging Face name -> bool in the weight's shape, True = kept, or empty. Removed weights become +0.0, and
    zeros that are kept become `TINY`. ValueError for a shape that is not the model's.
    """
    tree: Tree = {}
    for leaf in leaves(config):
        array = np.empty(_stacked(leaf, config), stored_as(leaf, config, dtype))
        for name, place in places(leaf, config):
            source = _EMBEDDING.hf if leaf is _HEAD and config.tie_word_embeddings else name
            values = positive_zeros(kernel(leaf, read(source), config))
            values = (values * np.float32(1 / factor(leaf, config))).astype(array.dtype)
            if name in masks:
                kept = kernel(leaf, masks[name], config)
                values = np.where(kept, np.where(values == 0, TINY, values), np.float32(0))
            array[place] = values
        tree[leaf.path] = array
    return tree


def stored_as(leaf: Leaf, config: ModelConfig, dtype: str) -> Any:
    """numpy's type of an array that is asked for as float32 or bfloat16.

    Queries stay in float32 where their factor is no power of two: with it they would be rounded once more.
    """
    if dtype == "float32" or not math.log2(factor(leaf, config)).is_integer():
        return np.dtype(np.float32)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def from_maxtext(
    tree: Mapping[str, np.ndarray], config: ModelConfig, masks: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face names and float32 weights of a tree, one at a time; inverse of `to_maxtext`.

    The output layer comes whether it was tied or not. UserError when the tree is not that of the model.
    """
    check_tree(tree, config)
    for leaf in leaves(config):
        for name, place in places(leaf, config):
            values = np.array(tree[leaf.path][place], np.float32)
            if name in masks:
                values[np.abs(values) <= TINY] = 0.0
            values *= np.float32(factor(leaf, config))
            yield name, positive_zeros(weight(leaf, values, config))


def check_tree(tree: Mapping[str, Any], config: ModelConfig) -> None:
    """UserError unless the arrays of `tree` (anything with a shape) are those of the model."""
    expected = shapes(config)
    for path in sorted(set(expected) ^ set(tree)):
        problem = "lacks" if path in expected else "holds"
        raise UserError(f"the MaxText checkpoint {problem} {path}: it is not of this model, or not of scanned layers")
    for path, shape in expected.items():
        if tuple(tree[path].shape) != shape:
            raise UserError(
                f"{path} in the MaxText checkpoint has shape {list(tree[path].shape)}; the model has {list(shape)}"
            )


def kernel(leaf: Leaf, weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A Hugging Face weight (float32) or mask (bool) as one layer of the tree's array, not scaled; ValueError for a
    wrong shape.
    """
    shape = _shape(leaf, config)
    expected = weight_shape(leaf, config)
    if weight.shape != expected:
        raise ValueError(f"{leaf.hf} has shape {list(weight.shape)}; the model has {list(expected)}")
    array = weight.astype(bool if weight.dtype == bool else np.float32).T if leaf is not _EMBEDDING else weight
    array = np.ascontiguousarray(array, dtype=bool if weight.dtype == bool else np.float32).reshape(shape)
    if leaf.rotated and interleaved(config):
        halves = array.reshape(*shape[:-1], 2, shape[-1] // 2)
        array = halves.swapaxes(-1, -2).reshape(shape)
    return array


def weight(leaf: Leaf, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Inverse of `kernel`."""
    shape = _shape(leaf, config)
    if leaf.rotated and interleaved(config):
        pairs = array.reshape(*shape[:-1], shape[-1] // 2, 2)
        array = pairs.swapaxes(-1, -2).reshape(shape)
    if leaf is _EMBEDDING:
        return array
    if not leaf.matrix:
        return array.reshape(-1)
    return np.ascontiguousarray(array.reshape(weight_shape(leaf, config)[::-1]).T)


def weight_shape(leaf: Leaf, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the Hugging Face weight: the inputs last."""
    shape = _shape(leaf, config)
    if leaf is _EMBEDDING:
        return shape
    if not leaf.matrix:
        return (math.prod(shape),)
    inputs = shape[0] if leaf.shape[0] == "E" else math.prod(shape[:-1])
    return (math.prod(shape) // inputs, inputs)


def positive_zeros(array: np.ndarray) -> np.ndarray:
    """The same with every zero as +0.0."""
    return array + np.float32(0) if array.dtype == np.float32 else array


def _shape(leaf: Leaf, config: ModelConfig) -> tuple[int, ...]:
    sizes = {
        "E": config.hidden_size,
        "F": config.ffn_hidden_size,
        "H": config.num_attention_heads,
        "K": config.num_query_groups,
        "D": config.kv_channels,
        "V": config.vocab_size,
        "X": config.num_moe_experts or 0,
        "M": config.moe_ffn_hidden_size or 0,
    }
    return tuple(sizes[letter] for letter in leaf.shape)


def _stacked(leaf: Leaf, config: ModelConfig) -> tuple[int, ...]:
    shape = _shape(leaf, config)
    shape = (config.num_moe_experts or 0, *shape) if leaf.of_experts else shape
    return (shape[0], config.num_layers, *shape[1:]) if "{layer}" in leaf.hf else shape
