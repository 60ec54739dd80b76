"""A model of others as transformers computes it: built from known settings, filled with weights that are read here.

A config.json decides more than sizes: which attention runs (kernels of any repository of the hub), which classes are
imported (`auto_map`), what the weights are turned into (quantizers). None of that is handed on. What is, are the keys
that a family's table knows, and what belongs to positions; the rest of a configuration is transformers' default, or
set here. Weights come from safetensors by our own reader: nothing else in the directory (adapters, pickles) counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import megatron_prune.backend as backend  # noqa: F401  # isort: skip  (before megatron.core)
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_prune.foreign import fenced
from megatron_prune.imports import without_triton
from megatron_prune.model.config_json import FULL_ATTENTION, WINDOW
from megatron_prune.model.convert import experts_together
from megatron_prune.model.families import ModelConfig, get_family
from megatron_prune.model.family import PATTERN, in_transformers

POSITIONS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rope_local_base_freq")
"""Keys of config.json about rotary positions, which `Family.from_hf` has checked."""
ROTARY = frozenset(
    "rope_type type factor low_freq_factor high_freq_factor original_max_position_embeddings rope_theta "
    "partial_rotary_factor beta_fast beta_slow truncate attention_factor mscale mscale_all_dim".split()
)
"""Keys inside of those."""
NOT_HANDED_ON = ("quantization_config",)


def settings(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that decide what a model of this shape computes, and nothing else of the file."""
    family = get_family(config.family)
    written = family.to_hf(config)
    known = {*family.keys.values(), *family.supported, *POSITIONS, "layer_types"} - set(NOT_HANDED_ON)
    known |= {*family.also.values(), "decoder_sparse_step", "mlp_only_layers", "first_k_dense_replace", PATTERN}
    return {key: _rotary(value) if key in POSITIONS else value for key, value in written.items() if key in known}


def _rotary(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _rotary(entry) for key, entry in value.items() if key in ROTARY or key in (FULL_ATTENTION, WINDOW)}


def transformers_config(config: ModelConfig) -> Any:
    """transformers' configuration of a model whose layers are alike."""
    with without_triton():
        from transformers import AutoConfig

        name = get_family(config.family).model_types[0]
        with fenced(
            f"a {name} model of these sizes is none that transformers builds", "correct config.json, or import it"
        ):
            return AutoConfig.for_model(name, **settings(config))


def empty_model(config: ModelConfig, dtype: torch.dtype) -> Module:
    """transformers' model, without memory for parameters, in evaluation mode. Attention is PyTorch's
    own, or transformers' where sinks take part in it.
    """
    hf_config = transformers_config(config)
    ways = {"attn_implementation": "eager" if config.attention_sinks else "sdpa"}
    if config.num_moe_experts and (config.hidden_size % 8 or (config.moe_ffn_hidden_size or 0) % 8):
        ways["experts_implementation"] = "eager"  # the grouped products that are usual take rows of 16 bytes only
    with without_triton():
        from transformers import AutoModelForCausalLM

        with (
            fenced("transformers does not build this model", "correct config.json, or import it"),
            _parameters_on_meta(),
        ):
            model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, trust_remote_code=False, **ways)
    return model.eval()


def filled_model(config: ModelConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Module:
    """The same with its weights, in `dtype`; `weights`: every name of the family's table once."""
    model: Any = empty_model(config, dtype)
    missing = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    wide = float32_ends(model)
    for name, tensor in experts_together(config, weights):
        place = in_transformers(name)
        if place in buffers:
            buffers[place].copy_(tensor)
            continue
        del missing[place]
        owner, _, field = place.rpartition(".")
        kind = torch.float32 if place.endswith(wide) else dtype
        setattr(model.get_submodule(owner), field, Parameter(tensor.to(kind, copy=True).contiguous()))
    assert not missing, f"the family's table and transformers name other weights: {sorted(missing)[:3]}"
    model.tie_weights()  # the parameters are others than those that were tied
    return model


def float32_ends(model: Any) -> tuple[str, ...]:
    """Ends of the names of parameters that transformers keeps in float32 in models of any type: routers, in some."""
    return tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made meanwhile have parameters without memory; their buffers, which no file has, are real."""
    register = Module.register_parameter

    def on_meta(module: Module, name: str, parameter: Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one is on the meta device already
            parameter = Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    setattr(Module, "register_parameter", on_meta)
    try:
        yield
    finally:
        setattr(Module, "register_parameter", register)
