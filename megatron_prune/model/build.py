"""A megatron-core GPTModel from a `ModelConfig` and a parallel layout.

Without Transformer Engine the norm is our own and attention is torch's scaled_dot_product_attention; with it
(on a GPU) both are Transformer Engine's. The linears are ours in both cases, so checkpoints and masks have the same
names everywhere. Vocabulary rows are padded only to a multiple of the tensor-parallel size, and padded logits are
minus infinity, so the loss is the same in every layout.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from megatron_prune.errors import UserError
from megatron_prune.log import say
from megatron_prune.model import blocks as block_list
from megatron_prune.model.attention import SDPACoreAttention
from megatron_prune.model.blocks import Block
from megatron_prune.model.config_json import yarn_mscale
from megatron_prune.model.experts import expert_fields, expert_spec
from megatron_prune.model.latent import LatentAttention
from megatron_prune.model.masked_linear import (
    MaskedColumnParallelLinear,
    MaskedGatedLinear,
    MaskedLinear,
    MaskedRowParallelLinear,
)
from megatron_prune.model.sizes import ModelConfig, rotary_channels

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Compute and parameter types a model may have here."""


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu2": squared_relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}
"""Activations by their names in transformers."""


@dataclass
class BlocksTransformerConfig(HeterogeneousTransformerConfig):
    """Megatron-core's configuration of a model whose layers differ, here in their number of heads too.

    With it megatron-core asks for each layer's own configuration and gives checkpoints a key for each layer.
    """

    blocks: tuple[Block, ...] = ()
    """Of the whole model."""

    def get_config_for_layer(self, layer_number: int) -> TransformerConfig:
        """The same configuration with the sizes of one layer, numbered from 1; those of absent halves stay."""
        config, block = copy.copy(self), self.blocks[layer_number - 1]
        if block.num_attention_heads:
            config.num_attention_heads, config.num_query_groups = block.num_attention_heads, block.num_query_groups
        if block.ffn_hidden_size:
            config.ffn_hidden_size = block.ffn_hidden_size
        return config


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm as LLaMA's reference has it: normalise in float32, round, then multiply by the gain, which
    may be stored minus one.

    `torch.nn.RMSNorm` rounds once less in bf16; here the released models' own rounding is kept, so that bf16 numbers
    are those of transformers. The gain is marked for the gradient all-reduce of sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        like = dict(dtype=config.params_dtype, device=backend.device())
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), 1.0 - self.offset, **like))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)

    kept: Tensor | None = None
    """Numbers of the channels that count, where the others are masked: see `training/masking.py`."""
    rounds_last = False

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` in and out."""
        wide = x.float()
        counted = wide if self.kept is None else wide.index_select(-1, self.kept)
        wide = wide * torch.rsqrt(counted.square().mean(-1, keepdim=True) + self.eps)
        if self.rounds_last:
            gain = self.weight.float() + self.offset if self.offset else self.weight
            return (gain * wide).to(x.dtype)
        return (self.weight + self.offset if self.offset else self.weight) * wide.to(x.dtype)


class LastRoundedRMSNorm(RMSNorm):
    """The same rounded once, after the gain, as gpt-oss and Gemma 3 have it."""

    rounds_last = True


class _ProjectionNorm(RMSNorm):
    """Root-mean-square norm over all heads of a projection together, as OLMoE has it.

    Every tensor-parallel rank has the whole gain and uses what belongs to its heads; megatron-core adds up the
    gradients of norms of queries and keys, so each gets the whole one.
    """

    heads = "num_attention_heads"

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """`hidden_size`: width of a head."""
        count = getattr(config, self.heads)
        super().__init__(config, count * hidden_size, eps)
        self.ranks = config.tensor_model_parallel_size
        self.width = count // self.ranks

    def forward(self, x: Tensor) -> Tensor:
        """`[s, b, heads of this rank, width]` in and out."""
        wide, gain = x.float(), self.weight.view(-1, x.shape[-1])
        total = wide.square().sum((-2, -1), keepdim=True)
        if self.ranks > 1:
            total = all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
            gain = gain.narrow(0, parallel_state.get_tensor_model_parallel_rank() * self.width, self.width)
        wide = wide * torch.rsqrt(total / self.weight.numel() + self.eps)
        return gain * wide.to(x.dtype)


class QueryNorm(_ProjectionNorm):
    """Of queries."""


class KeyNorm(_ProjectionNorm):
    """Of keys."""

    heads = "num_query_groups"


class LayerNorm(torch.nn.Module):
    """torch's layer norm, as GPT-2 has it, or with its gain stored minus one, as Nemotron-4 has it (LayerNorm1P).

    The stored gain gets its one in its own type before use, which is where transformers rounds too. Gain and bias are
    marked for the gradient all-reduce of sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        like = dict(dtype=config.params_dtype, device=backend.device())
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), 1.0 - self.offset, **like))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, **like))
        for parameter in self.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)

    kept: Tensor | None = None
    """As `RMSNorm.kept`."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` in and out."""
        gain = self.weight + self.offset if self.offset else self.weight
        if self.kept is None:
            return F.layer_norm(x, self.weight.shape, gain, self.bias, self.eps)
        narrow, gain, bias = (tensor.index_select(-1, self.kept) for tensor in (x, gain, self.bias))
        normal = F.layer_norm(narrow, gain.shape, gain, bias, self.eps)
        return torch.zeros_like(x).index_copy(-1, self.kept, normal)


def _te_modules() -> tuple[Any, Any] | None:
    """Transformer Engine's norm and attention when it is installed and a GPU is there."""
    if not backend.has_cuda():
        return None
    from megatron.core.extensions import transformer_engine  # importable, with hollow classes, where it is missing

    _tell_modules(transformer_engine.HAVE_TE)
    if not transformer_engine.HAVE_TE:
        return None
    return transformer_engine.TENorm, transformer_engine.TEDotProductAttention


@functools.cache
def _tell_modules(engine: bool) -> None:
    """Say once what layers are made of on this GPU; loudly when an installed Transformer Engine is left out."""
    names = "Transformer Engine's norm and attention" if engine else "own norm, torch's attention"
    say(f"layers: {names}; linears: own")
    if not engine and importlib.util.find_spec("transformer_engine") is not None:
        logger.warning(
            "transformer_engine is installed and megatron-core %s cannot use it: rounding and speed are those of plain "
            "PyTorch; install the version that `pip install 'megatron-prune[gpu]'` names",
            ".".join(map(str, backend.core_version())),
        )


def _norm_and_attention(config: TransformerConfig, model: ModelConfig) -> tuple[Any, Any]:
    """The machine's best modules for the norm of `config` and for attention.

    Transformer Engine's attention has no kernel for a shared sequence with a sliding window or in float32.
    """
    norm, attention = _te_modules() or (own_norm(model), SDPACoreAttention)
    if config.context_parallel_size > 1 and (config.window_size or config.params_dtype == torch.float32):
        attention = SDPACoreAttention
    return norm, attention


def own_norm(model: ModelConfig) -> type[RMSNorm | LayerNorm]:
    """The package's own norm of a model."""
    if model.centred_norm:
        return LayerNorm
    return LastRoundedRMSNorm if model.norm_rounds_last else RMSNorm


class NormedRowParallelLinear(MaskedRowParallelLinear):
    """A row-parallel linear without a bias whose output `[s, b, hidden]` is normalised, as Gemma 3 has it."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        norm, _ = _te_modules() or (LastRoundedRMSNorm, None)
        self.post_layernorm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output and no bias, in the form of megatron-core's linears."""
        output, bias = super().forward(x)
        assert bias is None
        return self.post_layernorm(output), None


class MixedRotaryAttention(SelfAttention):
    """Attention in a model whose layers with windows turn queries and keys by angles of their own."""

    def __init__(self, *args: Any, windowed: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.windowed = windowed

    def forward(self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        """As the base class; `rotary_pos_emb [s, b, 1, 2 d]` has the angles of other layers first, then its own."""
        parts = rotary_pos_emb.chunk(4, dim=-1)  # each twice: what a head has in its halves is turned together
        own = torch.cat(parts[1::2] if self.windowed else parts[::2], dim=-1)
        return super().forward(hidden_states, *args, rotary_pos_emb=own, **kwargs)


def layer_spec(config: TransformerConfig, model: ModelConfig, layer: int) -> ModuleSpec:
    """One decoder layer: unfused norms, masked linears, the machine's best attention; absent halves are identities."""
    block = model.block(layer)
    halves = (_attention_half(config, model, layer) if block.num_attention_heads else {}) | (
        _mlp_half(config, model, block) if block.ffn_hidden_size else {}
    )
    return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**halves))


def _attention_half(config: TransformerConfig, model: ModelConfig, layer: int) -> dict[str, Any]:
    norm, attention = _norm_and_attention(config, model)
    if model.kv_lora_rank is not None:
        latent = ModuleSpec(module=LatentAttention, params={"sizes": model, "norm": norm})
        return {"input_layernorm": norm, "self_attention": latent, "self_attn_bda": get_bias_dropout_add}
    if model.attention_sinks or model.window_layers is not None:
        own = {"window": model.window(layer), "sinks": model.attention_sinks}
        attention = ModuleSpec(module=SDPACoreAttention, params=own)
    own_angles = None if model.window_rotary_base is None else {"windowed": model.window(layer) is not None}
    head_norm = norm if config.qk_layernorm else None
    query_norm, key_norm = (QueryNorm, KeyNorm) if model.qk_layernorm_whole else (head_norm, head_norm)
    return {
        "input_layernorm": norm,
        "self_attention": ModuleSpec(
            module=SelfAttention if own_angles is None else MixedRotaryAttention,
            params={"attn_mask_type": AttnMaskType.causal, **(own_angles or {})},
            submodules=SelfAttentionSubmodules(
                linear_qkv=MaskedColumnParallelLinear,
                core_attention=attention,
                linear_proj=_writer(model),
                q_layernorm=query_norm,
                k_layernorm=key_norm,
            ),
        ),
        "self_attn_bda": get_bias_dropout_add,
    }


def _writer(model: ModelConfig) -> type[MaskedRowParallelLinear]:
    """The class of linears that write to the residual stream."""
    return NormedRowParallelLinear if model.post_layernorm else MaskedRowParallelLinear


def _mlp_half(config: TransformerConfig, model: ModelConfig, block: Block) -> dict[str, Any]:
    norm, _ = _norm_and_attention(config, model)
    fc1 = MaskedGatedLinear if config.gated_linear_unit else MaskedColumnParallelLinear
    dense = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=_writer(model)))
    return {
        "pre_mlp_layernorm": norm,
        "mlp": expert_spec() if block.num_moe_experts else dense,
        "mlp_bda": get_bias_dropout_add,
    }


def block_spec(
    config: ModelConfig, core: TransformerConfig, virtual_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of one chunk of this pipeline stage, and the final norm."""
    norm, _ = _norm_and_attention(core, config)
    first = get_transformer_layer_offset(core, virtual_stage)
    here = range(first, first + layers_in_chunk(core))
    layers = [layer_spec(core, config, number) for number in here]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def layers_in_chunk(config: TransformerConfig) -> int:
    """Number of consecutive decoder layers that a pipeline rank holds: all of its own, or of each virtual stage."""
    stages = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    return config.num_layers // stages


def check_divisible(config: ModelConfig, layout: backend.Layout) -> None:
    """Refuse a layout that the model's shape does not allow, naming both."""
    for what, count, parts, flag in (
        *(
            (f"{what}{where}", count, layout.tensor, "tensor-model-parallel-size")
            for where, block in _different_blocks(config)
            for what, count in (
                ("attention heads", block.num_attention_heads),
                ("query groups", block.num_query_groups),
                ("ffn channels", 0 if block.num_moe_experts else block.ffn_hidden_size),
            )
        ),
        *_expert_sizes(config, layout),
        ("layers", config.num_layers, layout.pipeline, "pipeline-model-parallel-size"),
        (
            "layers",
            config.num_layers,
            layout.pipeline * layout.chunks,
            "pipeline-model-parallel-size x virtual-pipeline-model-parallel-size",
        ),
    ):
        if count % parts:
            allowed = [p for p in range(1, count + 1) if count % p == 0]
            raise UserError(
                f"{flag} {parts} was given and the model has {count} {what}; allowed are the divisors of {count}: "
                f"{', '.join(map(str, allowed[:12]))}"
            )


def _expert_sizes(config: ModelConfig, layout: backend.Layout) -> list[tuple[str, int, int, str]]:
    """What of experts must divide by what, and the flag; UserError for expert parallelism without experts."""
    if not config.num_moe_experts:
        if layout.expert > 1 or layout.expert_tensor:
            raise UserError(
                "expert-model-parallel-size or expert-tensor-parallel-size was given and the model has no experts: "
                "drop it"
            )
        return []
    assert config.moe_ffn_hidden_size
    config.check_expert_parts(layout.expert_tensor_size)
    parts, flag = layout.expert_tensor_size, "expert-tensor-parallel-size (tensor-model-parallel-size without it)"
    return [
        ("experts", config.num_moe_experts, layout.expert, "expert-model-parallel-size"),
        ("channels of an expert", config.moe_ffn_hidden_size, parts, flag),
        ("channels of the shared expert", config.shared_width, layout.tensor, "tensor-model-parallel-size"),
    ]


def _different_blocks(config: ModelConfig) -> list[tuple[str, Block]]:
    """The sizes that layers have, and words for where the first layer of these sizes is."""
    blocks = [config.block(layer) for layer in range(config.num_layers)]
    different = list(dict.fromkeys(blocks))
    return [(f" in layer {blocks.index(block)}" if len(different) > 1 else "", block) for block in different]


def transformer_config(
    config: ModelConfig, layout: backend.Layout, dtype: torch.dtype, **extra: Any
) -> TransformerConfig:
    """Megatron-core's configuration of `config` in `layout`; `extra` overrides single fields."""
    fields: dict[str, Any] = dict(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        normalization="LayerNorm" if config.centred_norm else "RMSNorm",
        layernorm_zero_centered_gamma=config.gain_offset != 0.0,
        layernorm_epsilon=config.layernorm_epsilon,
        qk_layernorm=config.qk_layernorm,
        gated_linear_unit=config.gated,
        activation_func=ACTIVATIONS[config.activation],
        add_bias_linear=config.linear_bias,
        add_qkv_bias=config.qkv_bias,
        glu_linear_offset=config.glu_linear_offset,
        activation_func_clamp_value=config.activation_func_clamp_value,
        softmax_scale=_softmax_scale(config),
        window_size=(config.sliding_window - 1, 0) if config.sliding_window and config.window_layers is None else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not backend.has_cuda(),
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=backend.has_cuda(),
        # One kernel, and three tensors of the MLP's width kept for its backward pass instead of five.
        bias_activation_fusion=backend.has_cuda() and config.gated and config.activation == "silu",
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        cuda_graph_scope=[],
        # Interleaved stages: batched sends between two ranks that are neighbours twice go astray, and gloo sends after
        # the output has been released. Neither is noticed: the loss is wrong.
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        batch_p2p_comm=layout.virtual_pipeline is None,
        deallocate_pipeline_outputs=backend.has_cuda(),
        deterministic_mode=backend.is_deterministic(),
        **expert_fields(config, layout),
    )
    fields |= extra
    if config.blocks is None:
        return TransformerConfig(**fields)
    listed = json.dumps({block_list.KEY: block_list.to_list(config.blocks)})
    return BlocksTransformerConfig(**fields, blocks=config.blocks, heterogeneous_layers_config_encoded_json=listed)


def _softmax_scale(config: ModelConfig) -> float | None:
    """Of the attention scores; None: 1 / sqrt(width of a head). YaRN multiplies rotated queries and keys by a factor,
    and whole heads are rotated; in latent attention it multiplies those parts of them, and scores by another factor.
    """
    if config.kv_lora_rank is not None:
        scaling = config.rope_scaling or {}
        of_scores = yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) if "mscale_all_dim" in scaling else 1.0
        return of_scores**2 / math.sqrt(config.query_channels)
    if config.query_pre_attn_scalar is not None:
        return 1 / math.sqrt(config.query_pre_attn_scalar)
    factor = (config.rope_scaling or {}).get("attention_factor", 1.0)
    return None if factor == 1.0 else factor**2 / math.sqrt(config.kv_channels)


def inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """RoPE frequencies `[rotated channels / 2]` (float32), scaled by wavelength as LLaMA-3.1 or YaRN have it where
    config asks; behind them those of layers with windows, where they have others.

    Wavelengths longer than `original / low_freq_factor` are slowed by `factor`, those shorter than
    `original / high_freq_factor` are kept, and between the two the change is linear in `original / wavelength`.
    """
    channels = rotary_channels(config)
    exponent = torch.arange(0, channels, 2, dtype=torch.int64).float() / channels
    frequencies = _scaled(config, 1.0 / (config.rotary_base**exponent))
    if config.window_rotary_base is not None:
        frequencies = torch.cat([frequencies, 1.0 / (config.window_rotary_base**exponent)])
    return frequencies.to(device)


def _scaled(config: ModelConfig, frequencies: Tensor) -> Tensor:
    """As `rope_scaling` says."""
    scaling = config.rope_scaling
    if not scaling:
        return frequencies
    if scaling["rope_type"] == "yarn":
        return _yarn(frequencies, config.rotary_base, scaling)
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    original = float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    slowed = frequencies / float(scaling["factor"])
    blend = (original * frequencies / (2 * math.pi) - low) / (high - low)
    smooth = (1 - blend) * slowed + blend * frequencies
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > original / low, slowed, smooth)
    return torch.where(wavelength < original / high, frequencies, scaled)


def _yarn(frequencies: Tensor, base: float, scaling: dict[str, Any]) -> Tensor:
    """YaRN's `h(theta)` (arXiv:2309.00071, definition 2): those that turn more than `beta_fast` times within the
    original length are kept, those that turn less than `beta_slow` times slowed by `factor`, and between the two the
    change is linear in their number.
    """
    count = len(frequencies)

    def number(turns: float) -> float:
        return count * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / math.log(base)

    first, last = number(scaling["beta_fast"]), number(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    slowed = ((torch.arange(count).float() - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies / scaling["factor"] * slowed + frequencies * (1 - slowed)


def rotary(config: ModelConfig, length: int, cp_group: Any) -> Tensor | None:
    """Rotary embedding of positions 0 to `length`, for layers run outside a GPTModel; None with learned positions."""
    if config.position_embedding != "rope":
        return None
    module = RotaryEmbedding(
        kv_channels=config.kv_channels,
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        use_cpu_initialization=not backend.has_cuda(),
        cp_group=cp_group,
    )
    module.inv_freq = inverse_frequencies(config, backend.device())
    return module(length)


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor-parallel size."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def _hide_padding(model: GPTModel, vocab_size: int, layout: backend.Layout) -> None:
    """Make the logits of padded vocabulary rows minus infinity: they take no probability in any layout."""
    width = padded_vocab_size(vocab_size, layout.tensor) // layout.tensor
    start = parallel_state.get_tensor_model_parallel_rank() * width
    valid = max(0, min(width, vocab_size - start))
    if valid == width or not model.post_process:
        return
    padding = torch.arange(width, device=backend.device()) >= valid

    def hook(_module: Any, _inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min), bias

    model.output_layer.register_forward_hook(hook)


def _scale_embedding(model: GPTModel, scale: float) -> None:
    """Multiply embeddings by `scale`, rounded to their type, on their way in."""
    if scale == 1.0 or not model.pre_process:
        return

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(scale, dtype=output.dtype)

    model.embedding.word_embeddings.register_forward_hook(hook)


def _mark_shards(model: GPTModel, layout: backend.Layout) -> None:
    """Say which weights tensor parallelism splits; megatron-core does so only where it also initialises them.

    Unmarked ones count once, as replicated ones do, in the gradient norm: it comes out too small, and nothing says so.
    Gradients of experts are added up over other processes than those of the rest as soon as they are shared otherwise;
    megatron-core 0.16 sees that only with expert parallelism.
    """
    own_replicas = layout.expert > 1 or layout.expert_tensor_size != layout.tensor
    for module in model.modules():
        if isinstance(module, MaskedLinear) and module.is_expert:
            for parameter in module.parameters():
                parameter.allreduce = not own_replicas  # type: ignore[attr-defined]
                # A bias is not split where an expert is on one rank, which has all of its tokens.
                parameter.sequence_parallel = False  # type: ignore[attr-defined]
        axis = 1 if isinstance(module, RowParallelLinear) else 0
        weight = getattr(module, "weight", None)
        split = isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding))
        if split and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, axis, 1)


def build_model(
    config: ModelConfig,
    layout: backend.Layout,
    dtype: torch.dtype,
    **extra: Any,
) -> list[GPTModel]:
    """This rank's part of the model, weights not initialised (load them next). Process groups must exist.

    One chunk, or as many as the layout has virtual pipeline stages.
    """
    check_divisible(config, layout)
    core = transformer_config(config, layout, dtype, **extra)
    return [_build_chunk(config, layout, dtype, core, number) for number in range(layout.chunks)]


def _build_chunk(
    config: ModelConfig, layout: backend.Layout, dtype: torch.dtype, core: TransformerConfig, number: int
) -> GPTModel:
    virtual_stage = number if layout.virtual_pipeline else None
    model = GPTModel(
        config=core,
        transformer_layer_spec=block_spec(config, core, virtual_stage),
        vocab_size=padded_vocab_size(config.vocab_size, layout.tensor),
        max_sequence_length=config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        position_embedding_type="rope" if config.position_embedding == "rope" else "learned_absolute",
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        parallel_output=True,
        vp_stage=virtual_stage,
    )
    if config.position_embedding == "rope":
        model.rotary_pos_emb.inv_freq = inverse_frequencies(config, backend.device())
    elif model.pre_process:
        model.embedding.position_embeddings.to(dtype)  # megatron-core makes them float32
    _hide_padding(model, config.vocab_size, layout)
    _scale_embedding(model, config.embedding_scale)
    _mark_shards(model, layout)
    return model.to(backend.device())


def whole_layer(config: ModelConfig, dtype: torch.dtype, layer: int = 0) -> TransformerLayer:
    """A decoder layer, unsharded on this rank by itself, whatever the model's layout. Collective on first use.

    `layer` matters only where layers differ.
    """
    core = transformer_config(config, backend.Layout(), dtype)
    spec = layer_spec(core, config, layer)
    if config.blocks is not None:
        core = core.get_config_for_layer(layer + 1)
    module = TransformerLayer(core, spec.submodules, layer_number=1, pg_collection=backend.alone())
    return module.to(backend.device()).eval()


def whole_norm(config: ModelConfig, dtype: torch.dtype) -> torch.nn.Module:
    """A norm over the residual stream as the layers of `whole_layer` have it, gain not filled."""
    core = transformer_config(config, backend.Layout(), dtype)
    norm, _ = _norm_and_attention(core, config)
    return norm(config=core, hidden_size=config.hidden_size, eps=config.layernorm_epsilon).to(backend.device())
