"""Whether a model can be exported, asked before work is done on it.

Transformers reads the config.json that an export would have, and what it makes of it is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_prune.decision.target import Shape, StructuredTarget, Target
from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import fenced
from megatron_prune.imports import without_triton
from megatron_prune.log import say
from megatron_prune.model.config_json import FULL_ATTENTION, WINDOW, read_rope
from megatron_prune.model.families import ModelConfig, get_family

_ADVICE = "correct that key, as the model's source has it, or import the model again"
_NEAR = 3
"""Targets that a message names."""


def check_export(config: ModelConfig) -> None:
    """UserError when no export of the model, padded or not, would be opened by transformers as the same model."""
    family = get_family(config.family)
    wide = family.uniform(config)
    written = family.to_hf(wide)
    with fenced("transformers does not open the model's config.json", _ADVICE), without_triton():
        from transformers import AutoConfig

        read = AutoConfig.for_model(**written)
    for key, value, meant in _differences(wide, family.keys, read):
        raise UserError(
            f"transformers reads {key} {brief(value)} from the model's config.json where {brief(meant)} is meant; "
            + _ADVICE
        )
    pad = getattr(read, "pad_token_id", None)
    if pad is not None and not -config.vocab_size <= pad < config.vocab_size:
        raise UserError(
            f"config.json has pad_token_id {brief(pad)} and a vocabulary of {config.vocab_size}, which transformers "
            "does not open; set pad_token_id to null"
        )


def _differences(config: ModelConfig, keys: Mapping[str, str], read: Any) -> Iterator[tuple[str, Any, Any]]:
    """Key, what transformers has and what is meant, where that is not the same."""
    for name, key in keys.items():
        meant = getattr(config, name)
        if name in ("ffn_hidden_size", "kv_channels") and getattr(read, key, None) is None:
            continue  # follows from the hidden size
        if (value := getattr(read, key, meant)) != meant:
            yield key, value, meant
    if config.position_embedding == "rope":
        rope = {"rope_theta": config.rotary_base, **(config.rope_scaling or {"rope_type": "default"})}
        given = read.rope_parameters
        if config.window_rotary_base is not None:
            local = given[WINDOW].get("rope_theta")
            if local != config.window_rotary_base:
                yield "rope_local_base_freq", local, config.window_rotary_base
            given = given[FULL_ATTENTION]
        if given.get("rope_type") == "yarn":  # what is left out follows from the rest
            latent = config.kv_lora_rank is not None
            given = {**given, **(read_rope({"rope_parameters": given}, ("yarn",), latent)[1] or {})}
        for key, meant in rope.items():
            if (value := given.get(key)) != meant:
                yield key, value, meant


def check_result(config: ModelConfig, target: Target | StructuredTarget) -> None:
    """UserError when what is left of a model pruned to a shape has no export; a line where only a padded one has."""
    if not isinstance(target, Shape):
        return
    family, smaller = get_family(config.family), _smaller(config, target)
    try:
        family.uniform(smaller)
    except UserError as error:
        near = _near(config, target)
        raise UserError(f"target {target}: the result could not be exported ({error}); allowed: {near}") from error
    if not family.opens(smaller, smaller.num_attention_heads):
        say(
            f"target {target}: transformers opens no model of {smaller.num_attention_heads} heads and hidden_size "
            f"{smaller.hidden_size}: export the result with --layers padded, or prune to {_near(config, target)}"
        )


def _smaller(config: ModelConfig, target: Shape) -> ModelConfig:
    """The model that a target asks for; groups keep their heads where it names no number of heads."""
    sizes: dict[str, Any] = dict(target.given())
    groups = sizes.get("num_query_groups", config.num_query_groups)
    sizes.setdefault("num_attention_heads", groups * (config.num_attention_heads // config.num_query_groups))
    if "num_query_groups" not in get_family(config.family).keys:
        sizes["num_query_groups"] = sizes["num_attention_heads"]
    return replace(config, **sizes, blocks=None)


def _near(config: ModelConfig, target: Shape) -> str:
    """Targets like this one whose results transformers opens as they are."""
    family, smaller = get_family(config.family), _smaller(config, target)
    heads = range(smaller.num_query_groups, config.num_attention_heads + 1, smaller.num_query_groups)
    if "num_query_groups" not in family.keys:
        heads = range(1, config.num_attention_heads + 1)
    found = [replace(target, num_attention_heads=count) for count in heads if family.opens(smaller, count)]
    for hidden in range(config.hidden_size, 0, -1):
        other = replace(smaller, hidden_size=hidden)
        if family.opens(other, other.num_attention_heads):
            found.append(replace(target, hidden_size=hidden))
    found.sort(key=lambda one: _distance(smaller, _smaller(config, one)))
    return " or ".join(str(one) for one in found[:_NEAR]) or "another shape"


def _distance(one: ModelConfig, other: ModelConfig) -> float:
    """How far apart two shapes are in heads and width."""
    heads = abs(one.num_attention_heads - other.num_attention_heads) / one.num_attention_heads
    return heads + abs(one.hidden_size - other.hidden_size) / one.hidden_size
