"""Sizes and constants of one model, in Megatron's names.

Symbolic sizes of the families' tables (``dimensions`` gives the numbers):
``vocab``, ``positions``, ``hidden``, ``ffn``, ``experts``, ``shared_ffn``, ``heads``, ``head`` = kv_channels,
``query`` = heads * kv_channels, ``key_value`` = groups * kv_channels, ``qkv`` = query + 2 * key_value,
``group_heads`` = heads of one query group,
``group_rows`` = rows of one query group in linear_qkv, ``group_inputs`` = inputs of one query group in linear_proj.
With latent attention kv_channels is the width of a head's values, and ``query_rank``, ``latent`` are the widths that
queries, keys and values are made from, ``latent_rope`` the second with the rotated channels of keys, ``query_head`` and
``up_head`` rows of a head in the linears that make queries, keys and values, ``latent_query`` and ``latent_key_value``
those of all heads.
Those of a layer are that layer's own: its ``ffn`` is the width of an expert where the layer has experts.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Literal

from megatron_prune.errors import UserError
from megatron_prune.foreign import strict
from megatron_prune.model.blocks import Block, widest

LATER = (
    *("blocks", "num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_renormalize", "moe_layers"),
    *("moe_shared_expert_intermediate_size", "moe_num_shared_experts", "moe_shared_expert_gate"),
    *("moe_router_score_function", "moe_router_expert_bias", "moe_router_topk_scaling_factor"),
    *("moe_router_num_groups", "moe_router_group_topk", "qk_layernorm_whole"),
    *("window_layers", "attention_sinks", "glu_linear_offset", "activation_func_clamp_value", "norm_rounds_last"),
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim"),
    *("window_rotary_base", "post_layernorm", "scaled_embedding", "query_pre_attn_scalar"),
)
"""Fields that are written where they are not as usual: descriptions of other models stay what they always were."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model, in Megatron's names, with the config.json they came from."""

    __pydantic_config__ = strict()

    family: str
    """Name of the family in ``FAMILIES``."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the MLP (of one of gate and up when it is gated)."""
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads; divides num_attention_heads."""
    kv_channels: int
    """Width of one head; need not be hidden_size / num_attention_heads."""
    vocab_size: int
    """Without padding."""
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    """0 when positions are learned."""
    rope_scaling: dict[str, Any] | None = field(hash=False)
    """None, or the keys of Hugging Face plus ``rope_type``: the four of ``llama3``, or those of ``yarn``."""
    tie_word_embeddings: bool
    dtype: str
    """One of bfloat16, float16, float32."""
    hf_config: dict[str, Any] = field(hash=False, repr=False)
    """The config.json this came from, verbatim."""
    activation: str = "silu"
    """Of the MLP, by its name in transformers."""
    gated: bool = True
    """The MLP multiplies activation(gate) with up."""
    normalization: Literal["RMSNorm", "RMSNorm1P", "LayerNorm", "LayerNorm1P"] = "RMSNorm"
    """Those with 1P store their gain minus one."""
    norm_rounds_last: bool = False
    """RMSNorm is rounded to the model's type after its gain, not before."""
    linear_bias: bool = False
    """Every linear layer of the decoder has a bias."""
    qkv_bias: bool = False
    """The query, key and value projections have one."""
    qk_layernorm: bool = False
    """Queries and keys are normalised, head by head, before the rotation."""
    qk_layernorm_whole: bool = False
    """They are so over all heads together, before the rotation."""
    position_embedding: Literal["rope", "learned"] = "rope"
    rotary_percent: float = 1.0
    """Share of a head, from its first channel on, that is rotated."""
    sliding_window: int | None = None
    """Tokens that a token sees, itself included; None: all before it."""
    window_layers: tuple[bool, ...] | None = None
    """Which layers see so few, where not all do."""
    attention_sinks: bool = False
    """Each head has a learned score that takes part in the softmax and adds nothing."""
    window_rotary_base: float | None = None
    """Of the layers with windows, where it is another than that of the rest, and not scaled."""
    post_layernorm: bool = False
    """What attention and MLP give is normalised before it is added to the residual stream."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size) on their way in."""
    query_pre_attn_scalar: float | None = None
    """Scores are divided by its root; None: by that of the width of a head."""
    q_lora_rank: int | None = None
    """Width that queries are made from, behind a norm, in latent attention; None: from the hidden state."""
    kv_lora_rank: int | None = None
    """Width that keys and values of all heads are made from, behind a norm: attention is latent; None: it is not."""
    qk_head_dim: int | None = None
    """Then the channels of a head's queries and keys that are not rotated; those of its values are `kv_channels`."""
    qk_pos_emb_head_dim: int | None = None
    """And those that are rotated, in pairs of neighbours; all heads have the same in their keys."""
    glu_linear_offset: float = 0.0
    """What is added to up before it is multiplied with activation(gate)."""
    activation_func_clamp_value: float | None = None
    """Gate is at most so large, and up between its negative and it; None: not limited."""
    num_moe_experts: int | None = None
    """Of every layer that has experts in place of one MLP; None: no layer has."""
    moe_ffn_hidden_size: int | None = None
    """Width of one expert (of one of gate and up)."""
    moe_router_topk: int | None = None
    """Experts that a token goes to."""
    moe_renormalize: bool = True
    """The gates of a token's experts add up to 1; else they are their share of the softmax over all."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Of the router's logits; sigmoids are divided by their sum over a token's experts."""
    moe_router_expert_bias: bool = False
    """The router has a bias, in float32, by which experts are chosen and which gates do not have."""
    moe_router_topk_scaling_factor: float | None = None
    """Of the gates."""
    moe_router_num_groups: int | None = None
    """Experts stand in so many groups."""
    moe_router_group_topk: int | None = None
    """Groups that a token's experts are chosen from: those with the highest two experts together."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of the MLP that all tokens go through besides; None: there is none, or the next field says."""
    moe_num_shared_experts: int | None = None
    """The same as a number of experts of the others' width, which are one MLP."""
    moe_shared_expert_gate: bool = False
    """It has a gate of its own."""
    moe_layers: tuple[bool, ...] | None = None
    """Which layers have experts, where not all have."""
    blocks: tuple[Block, ...] | None = None
    """Sizes of each layer where they differ, as `with_blocks` sets them; then the heads, groups and ffn above are those
    of the smallest layer that holds them all. None: they are every layer's."""

    def __post_init__(self) -> None:
        if self.blocks is None:
            return
        if len(self.blocks) != self.num_layers or self._layer_sizes() != widest(self.blocks):
            raise ValueError("the sizes of the layers contradict those of the model; set them by with_blocks")

    def _layer_sizes(self, layer: int | None = None) -> Block:
        heads, groups = self.num_attention_heads, self.num_query_groups
        if not self.has_experts(layer):
            return Block(heads, groups, self.ffn_hidden_size)
        assert self.num_moe_experts and self.moe_ffn_hidden_size
        return Block(heads, groups, self.moe_ffn_hidden_size, self.num_moe_experts)

    def has_experts(self, layer: int | None = None) -> bool:
        """Whether a layer has experts in place of one MLP; without its number, whether any has."""
        if not self.num_moe_experts:
            return False
        return self.moe_layers is None or layer is None or self.moe_layers[layer]

    def window(self, layer: int) -> int | None:
        """Tokens that a token sees in a layer, itself included; None: all before it."""
        return self.sliding_window if self.window_layers is None or self.window_layers[layer] else None

    @property
    def moe_router_float32(self) -> bool:
        """Whether the router multiplies in float32: those of sigmoids do, and DeepSeek's."""
        return self.moe_router_score_function == "sigmoid" or self.kv_lora_rank is not None

    @property
    def query_channels(self) -> int:
        """Width of a head's queries and keys."""
        return self.kv_channels if self.kv_lora_rank is None else (self.qk_head_dim or 0) + self.rotated_keys

    @property
    def rotated_keys(self) -> int:
        """Channels of keys that all heads share; 0 without latent attention."""
        return self.qk_pos_emb_head_dim or 0

    @property
    def direct_queries(self) -> bool:
        """Whether latent attention makes queries from the hidden state."""
        return self.kv_lora_rank is not None and self.q_lora_rank is None

    @property
    def gain_offset(self) -> float:
        """What a norm adds to its stored gain before use."""
        return 1.0 if self.normalization.endswith("1P") else 0.0

    @property
    def centred_norm(self) -> bool:
        """Whether norms take off the mean of their channels, and divide by the standard deviation."""
        return not self.normalization.startswith("RMSNorm")

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by on their way in."""
        return math.sqrt(self.hidden_size) if self.scaled_embedding else 1.0

    @property
    def shared_width(self) -> int:
        """Width of the MLP that all tokens go through beside their experts; 0 without one."""
        return self.moe_shared_expert_intermediate_size or (
            (self.moe_num_shared_experts or 0) * (self.moe_ffn_hidden_size or 0)
        )

    def block(self, layer: int | None) -> Block:
        """Sizes of a layer; without a number of the widest, or of one with experts."""
        return self._layer_sizes(layer) if self.blocks is None or layer is None else self.blocks[layer]

    def with_layers(self, layers: Sequence[int]) -> ModelConfig:
        """The model with these layers of its own, whose sizes `with_blocks` sets."""
        windows = self.window_layers and tuple(self.window_layers[layer] for layer in layers)
        windows = None if windows and all(windows) else windows
        return replace(self, num_layers=len(layers), window_layers=windows, blocks=None)

    def with_blocks(self, blocks: Sequence[Block]) -> ModelConfig:
        """The model with these layers, one entry for each; ``blocks`` stays None when all are alike and whole.

        UserError when no layer keeps its attention, or none its MLP, and where layers with experts differ.
        """
        if self.num_moe_experts:
            return self._with_expert_layers(blocks)
        most = widest(blocks)
        for what, count in (("attention", most.num_attention_heads), ("MLP", most.ffn_hidden_size)):
            if not count:
                raise UserError(f"no layer keeps its {what}; at least one of the {len(blocks)} must")
        sizes = {name: getattr(most, name) for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")}
        different = None if set(blocks) == {most} else tuple(blocks)
        return replace(self, num_layers=len(blocks), blocks=different, **sizes)

    def _with_expert_layers(self, blocks: Sequence[Block]) -> ModelConfig:
        """As `with_blocks`, of a model with experts: software has one size for all of its layers of a kind."""
        kinds = {bool(block.num_moe_experts): block for block in blocks}
        heads = {(block.num_attention_heads, block.num_query_groups) for block in blocks}
        if len(set(blocks)) != len(kinds) or len(heads) != 1 or not all(block.ffn_hidden_size for block in blocks):
            raise UserError(
                "layers of a model with experts would come out with different sizes, and no software opens that: "
                "choose a method and a target that keep as many heads, experts and neurons in every layer"
            )
        if True not in kinds:
            raise UserError("no layer with experts would stay; at least one must")
        ((heads_kept, groups_kept),) = heads
        sizes: dict[str, Any] = {"num_attention_heads": heads_kept, "num_query_groups": groups_kept}
        sizes |= {"num_moe_experts": kinds[True].num_moe_experts, "moe_ffn_hidden_size": kinds[True].ffn_hidden_size}
        if False in kinds:
            sizes["ffn_hidden_size"] = kinds[False].ffn_hidden_size
        elif self.ffn_hidden_size == self.moe_ffn_hidden_size:
            sizes["ffn_hidden_size"] = sizes["moe_ffn_hidden_size"]
        which = tuple(bool(block.num_moe_experts) for block in blocks)
        return replace(self, num_layers=len(blocks), moe_layers=None if all(which) else which, blocks=None, **sizes)

    def check_length(self, length: int) -> None:
        """UserError when a sequence is longer than the learned position embeddings."""
        if self.position_embedding == "learned" and length > self.max_position_embeddings:
            raise UserError(
                f"sequences of {length} tokens were asked for and the model has learned positions for "
                f"{self.max_position_embeddings}: use {self.max_position_embeddings} or less"
            )

    def check_expert_parts(self, parts: int) -> None:
        """UserError when `parts` processes would share each expert, and experts have biases."""
        if self.num_moe_experts and self.linear_bias and parts > 1:
            raise UserError(
                f"experts have biases, and megatron-core does not split such experts, here over {parts} processes: add "
                "--expert-tensor-parallel-size 1"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; ``from_dict`` inverts it."""
        values = copy.deepcopy(asdict(self))
        for block in values["blocks"] or ():
            del block["num_moe_experts"]
        usual = {item.name: item.default for item in fields(self) if item.name in LATER}
        return {key: value for key, value in values.items() if key not in usual or value != usual[key]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The config that ``to_dict`` wrote; UserError names missing and unknown fields."""
        names = {item.name for item in fields(cls)}
        needed = {item.name for item in fields(cls) if item.default is MISSING}
        if not needed <= set(values) <= names:
            raise UserError(
                f"model config has unknown fields {sorted(set(values) - names)} and lacks "
                f"{sorted(needed - set(values))}; was it written by another version?"
            )
        given = copy.deepcopy(dict(values))
        for name in ("moe_layers", "window_layers"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])
        if given.get("blocks") is not None:
            given["blocks"] = tuple(Block(**block) for block in given["blocks"])
        return cls(**given)

    def fingerprint(self) -> str:
        """sha256 of the sizes and constants (not of hf_config): equal for models whose tensors are
        interchangeable.
        """
        values = {key: value for key, value in self.to_dict().items() if key != "hf_config"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def dimensions(config: ModelConfig, layer: int | None = None) -> dict[str, int]:
    """Numbers for the symbolic sizes of the tables, in a layer, or without its number in the widest one."""
    block = config.block(layer)
    up_head = (config.qk_head_dim or 0) + config.kv_channels
    return {
        "one": 1,
        "vocab": config.vocab_size,
        "positions": config.max_position_embeddings,
        "hidden": config.hidden_size,
        "ffn": block.ffn_hidden_size,
        "experts": block.num_moe_experts,
        "shared_ffn": config.shared_width,
        "head": config.kv_channels,
        "heads": block.num_attention_heads,
        "group_heads": block.group_heads,
        "query": block.num_attention_heads * config.kv_channels,
        "key_value": block.num_query_groups * config.kv_channels,
        "qkv": (block.num_attention_heads + 2 * block.num_query_groups) * config.kv_channels,
        "group_rows": (block.group_heads + 2) * config.kv_channels,
        "group_inputs": block.group_heads * config.kv_channels,
        "query_rank": config.q_lora_rank or 0,
        "latent": config.kv_lora_rank or 0,
        "latent_rope": (config.kv_lora_rank or 0) + config.rotated_keys,
        "query_head": config.query_channels,
        "up_head": up_head,
        "latent_query": block.num_attention_heads * config.query_channels,
        "latent_key_value": block.num_attention_heads * up_head,
    }


def channels_with_sink(width: int) -> int:
    """Channels of a head that is `width` wide and has one more for its sink: kernels that save memory want a multiple
    of 8.
    """
    return width // 8 * 8 + 8


def rotary_channels(config: ModelConfig) -> int:
    """Channels of a head that are rotated."""
    return config.qk_pos_emb_head_dim or int(config.kv_channels * config.rotary_percent)
