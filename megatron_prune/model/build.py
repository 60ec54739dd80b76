"""A megatron-core GPTModel from a `ModelConfig` and a parallel layout.

Without Transformer Engine the norm is our own and attention is torch's scaled_dot_product_attention; with it
(on a GPU) both are Transformer Engine's. The linears are ours in both cases, so checkpoints and masks have the same
names everywhere. Vocabulary rows are padded only to a multiple of the tensor-parallel size, and padded logits are
minus infinity, so the loss is the same in every layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.kernels.processor import has_bf16_products
from megatron_prune.model.family import ModelConfig, rotary_channels
from megatron_prune.model.masked_linear import (
    MaskedColumnParallelLinear,
    MaskedGatedLinear,
    MaskedRowParallelLinear,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Compute and parameter types a model may have here."""


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu2": squared_relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
"""Activations by their names in transformers."""


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm as LLaMA's reference has it: normalise in float32, round, then multiply by the gain.

    `torch.nn.RMSNorm` rounds once less in bf16; here the released models' own rounding is kept, so that bf16 numbers
    are those of transformers. The gain is marked for the gradient all-reduce of sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=backend.device()))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` in and out."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


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

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` in and out."""
        gain = self.weight + self.offset if self.offset else self.weight
        return F.layer_norm(x, self.weight.shape, gain, self.bias, self.eps)


ATTENTION_BLOCK = 64
"""Queries whose scores are in memory at a time in `blockwise_attention`."""


def _blockwise(query: Tensor) -> bool:
    """Whether bf16 matrix products are what attention on this processor should be made of: inference only."""
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return on_cpu and not torch.is_grad_enabled() and has_bf16_products()


def blockwise_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention `[b, heads, s, d]` of query `[b, heads, s, d]`, key and value `[b, groups, s, d]`.

    Plain matrix products over the keys that a block of queries can see; scores are rounded as transformers' "eager"
    attention rounds them. Two to three times faster than the fused kernel, which ignores a CPU's bf16 instructions.
    """
    batch, heads, length, width = query.shape
    groups = batch * key.shape[1]
    queries = (query * (width**-0.5 if scale is None else scale)).reshape(groups, -1, length, width)
    keys = key.reshape(groups, length, width).transpose(1, 2).contiguous()
    values = value.reshape(groups, length, width)
    context = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for start in range(0, length, ATTENTION_BLOCK):
        rows = queries[:, :, start : start + ATTENTION_BLOCK]
        seen = start + rows.shape[2]
        scores = (rows.flatten(1, 2) @ keys[:, :, :seen]).unflatten(1, rows.shape[1:3])
        future = torch.ones(rows.shape[2], rows.shape[2], dtype=torch.bool, device=query.device).triu(1)
        scores[..., start:].masked_fill_(future, -math.inf)
        weights = torch.softmax(scores, dim=-1)
        context[:, :, start:seen] = (weights.flatten(1, 2) @ values[:, :seen]).unflatten(1, rows.shape[1:3])
    return context.view(batch, heads, length, width)


class SDPACoreAttention(torch.nn.Module):
    """Causal attention of this rank's heads by torch's fused kernel; `[s, b, heads, d]` in, `[s, b, heads * d]` out.

    With a sliding window `w` a token sees itself and the `w - 1` tokens before it.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, softmax_scale: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise UserError(
                f"context-parallel-size {config.context_parallel_size} was given; without Transformer Engine attention "
                "sees only its own part of the sequence: use 1"
            )
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout
        self.window = config.window_size[0] + 1 if config.window_size else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention over the whole (causal) sequence; any mask argument must be None."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if _blockwise(query) and self.window is None:
            return blockwise_attention(query, key, value, self.softmax_scale).permute(2, 0, 1, 3).flatten(2)
        mask = self._window_mask(query.shape[2], query.device)
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _window_mask(self, length: int, device: torch.device) -> Tensor | None:
        """Bool `[length, length]`, True = seen; None when no token has the window's length before it."""
        if self.window is None or length <= self.window:
            return None
        seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return seen.triu(1 - self.window)


def _te_modules() -> tuple[Any, Any] | None:
    """Transformer Engine's norm and attention when it is installed and a GPU is there."""
    if not backend.has_cuda():
        return None
    try:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
    except ImportError:
        return None
    return TENorm, TEDotProductAttention


def _norm_and_attention(config: TransformerConfig) -> tuple[Any, Any]:
    """The machine's best modules for the norm of `config` and for attention."""
    return _te_modules() or (RMSNorm if config.normalization == "RMSNorm" else LayerNorm, SDPACoreAttention)


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One decoder layer: unfused norms, masked linears, the machine's best attention."""
    norm, attention = _norm_and_attention(config)
    head_norm = norm if config.qk_layernorm else None
    fc1 = MaskedGatedLinear if config.gated_linear_unit else MaskedColumnParallelLinear
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=MaskedColumnParallelLinear,
                    core_attention=attention,
                    linear_proj=MaskedRowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=MaskedRowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm."""
    norm, _ = _norm_and_attention(config)
    return TransformerBlockSubmodules(layer_specs=[layer_spec(config)] * layers_here(config), layer_norm=norm)


def layers_here(config: TransformerConfig) -> int:
    """Number of decoder layers this pipeline rank holds."""
    return config.num_layers // config.pipeline_model_parallel_size


def check_divisible(config: ModelConfig, layout: backend.Layout) -> None:
    """Refuse a layout that the model's shape does not allow, naming both."""
    for what, count, parts, flag in (
        ("attention heads", config.num_attention_heads, layout.tensor, "tensor-model-parallel-size"),
        ("query groups", config.num_query_groups, layout.tensor, "tensor-model-parallel-size"),
        ("ffn channels", config.ffn_hidden_size, layout.tensor, "tensor-model-parallel-size"),
        ("layers", config.num_layers, layout.pipeline, "pipeline-model-parallel-size"),
    ):
        if count % parts:
            allowed = [p for p in range(1, count + 1) if count % p == 0]
            raise UserError(
                f"{flag} {parts} was given and the model has {count} {what}; allowed are the divisors of {count}: "
                f"{', '.join(map(str, allowed[:12]))}"
            )


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
        normalization="RMSNorm" if config.normalization == "RMSNorm" else "LayerNorm",
        layernorm_zero_centered_gamma=config.normalization == "LayerNorm1P",
        layernorm_epsilon=config.layernorm_epsilon,
        qk_layernorm=config.qk_layernorm,
        gated_linear_unit=config.gated,
        activation_func=ACTIVATIONS[config.activation],
        add_bias_linear=config.linear_bias,
        add_qkv_bias=config.qkv_bias,
        window_size=(config.sliding_window - 1, 0) if config.sliding_window else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not backend.has_cuda(),
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=backend.has_cuda(),
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        cuda_graph_scope=[],
        deallocate_pipeline_outputs=backend.has_cuda(),
    )
    return TransformerConfig(**{**fields, **extra})


def inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """RoPE frequencies `[rotated channels / 2]` (float32), with LLaMA-3.1's scaling by wavelength where config asks.

    Wavelengths longer than `original / low_freq_factor` are slowed by `factor`, those shorter than
    `original / high_freq_factor` are kept, and between the two the change is linear in `original / wavelength`.
    """
    channels = rotary_channels(config)
    exponent = torch.arange(0, channels, 2, dtype=torch.int64).float() / channels
    frequencies = 1.0 / (config.rotary_base**exponent)
    scaling = config.rope_scaling
    if not scaling:
        return frequencies.to(device)
    original = float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    slowed = frequencies / float(scaling["factor"])
    blend = (original * frequencies / (2 * math.pi) - low) / (high - low)
    smooth = (1 - blend) * slowed + blend * frequencies
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > original / low, slowed, smooth)
    return torch.where(wavelength < original / high, frequencies, scaled).to(device)


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


def build_model(
    config: ModelConfig,
    layout: backend.Layout,
    dtype: torch.dtype,
    **extra: Any,
) -> GPTModel:
    """This rank's part of the model, weights not initialised (load them next). Process groups must exist."""
    check_divisible(config, layout)
    core = transformer_config(config, layout, dtype, **extra)
    model = GPTModel(
        config=core,
        transformer_layer_spec=block_spec(core),
        vocab_size=padded_vocab_size(config.vocab_size, layout.tensor),
        max_sequence_length=config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        position_embedding_type="rope" if config.position_embedding == "rope" else "learned_absolute",
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        parallel_output=True,
    )
    if config.position_embedding == "rope":
        model.rotary_pos_emb.inv_freq = inverse_frequencies(config, backend.device())
    elif model.pre_process:
        model.embedding.position_embeddings.to(dtype)  # megatron-core makes them float32
    _hide_padding(model, config.vocab_size, layout)
    return model.to(backend.device())


def whole_layer(config: ModelConfig, dtype: torch.dtype) -> TransformerLayer:
    """One decoder layer, unsharded on this rank by itself, whatever the model's layout. Collective on first use."""
    core = transformer_config(config, backend.Layout(), dtype)
    layer = TransformerLayer(core, layer_spec(core).submodules, layer_number=1, pg_collection=backend.alone())
    return layer.to(backend.device()).eval()
