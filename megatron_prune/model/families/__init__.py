"""The model families, as data: which config.json keys and Hugging Face tensors make which ModelConfig and Megatron
tensors. One table per family serves both directions and every parallel layout; adding a family means adding a file
here with a ``FAMILY``. What its fields mean is in ``family``; rows that many tables share are in ``rows``.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prune.errors import UserError, brief
from megatron_prune.model.blocks import KEY, SUFFIX, Block
from megatron_prune.model.family import Family, WeightMap, WeightPattern
from megatron_prune.model.sizes import ModelConfig, dimensions

__all__ = [
    "FAMILIES",
    "Block",
    "Family",
    "ModelConfig",
    "WeightMap",
    "WeightPattern",
    "check_exportable",
    "dimensions",
    "family_of",
    "get_family",
]


def get_family(name: str) -> Family:
    """The family called ``name``; UserError names the nearest and lists all."""
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown model family {name!r}; {hint}allowed: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its ``model_type``; UserError lists the supported ones."""
    model_type = hf_config.get("model_type")
    end = SUFFIX if KEY in hf_config else ""
    for family in FAMILIES.values():
        if model_type in [name + end for name in family.model_types]:
            return family
    allowed = sorted(name for family in FAMILIES.values() for name in family.model_types)
    raise UserError(
        f"config.json has model_type {brief(model_type)}; supported: {', '.join(allowed)}{_inside(hf_config, allowed)}"
    )


def _inside(hf_config: Mapping[str, Any], allowed: Sequence[str]) -> str:
    """What to do about a model that wraps a language model of a supported family."""
    inner = hf_config.get("text_config")
    kind = inner.get("model_type") if isinstance(inner, Mapping) else None
    if kind not in allowed:
        return ""
    return (
        f"; its text_config is of a {kind} model: save that alone, with text_config as its config.json, "
        "by model.language_model.save_pretrained(NEW_DIR)"
    )


def check_exportable(config: ModelConfig) -> None:
    """UserError when no config.json can say what ``config`` is, or transformers would not open it: before work starts.

    A model whose layers differ is exportable when it can be padded to an ordinary one.
    """
    get_family(config.family).to_hf(config)


def _discovered() -> dict[str, Family]:
    """The tables of all modules of this package, by name: a family is known once its file exists."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.FAMILY.name: module.FAMILY for module in modules}


FAMILIES = _discovered()
