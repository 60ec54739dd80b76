"""Checkpoints as they are published: wrapped names of tensors, adapters beside a model, heads of classifiers.

What means the same is read the same; what is no language model by itself is refused with the step that makes it one.
Nothing here knows PyTorch.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_prune.errors import UserError, brief, shown
from megatron_prune.foreign import read_json
from megatron_prune.model import quantised
from megatron_prune.model.family import Family, WeightMap
from megatron_prune.model.sizes import ModelConfig
from megatron_prune.model.stored import Entry

ADAPTER = "adapter_config.json"
_ADAPTER_FILES = (ADAPTER, "adapter_model.safetensors", "adapter_model.bin")
_MERGE = "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW_DIR)"
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "language_model"}
"""Modules that stand between others in the names of a state dict: torch.compile, FSDP, activation checkpointing, and
the part of a model of several kinds of input that reads text."""
_AROUND = (("module",), ("base_model", "model"))
"""Modules that a whole model is in: data parallelism, PEFT."""
_FIRST = ("model", "_forward_module")
"""Attributes under which trainers such as Lightning's keep a whole model."""
_ADAPTER_PARTS = ("*.lora_A.*", "*.lora_B.*", "*.base_layer.*", "*.lora_embedding_*", "*.lora_magnitude_vector.*")
_HEADS = ("score.*", "classifier.*", "qa_outputs.*", "v_head.*", "multiple_choice_head.*", "*.v_head.*", "value_head.*")
"""Of classifiers, reward and question-answering models."""


def check_directory(directory: Path) -> None:
    """UserError for an adapter, alone or beside a model, and for what quantisers leave beside config.json."""
    check_adapter(directory)
    quantised.check_files(directory)


def check_adapter(directory: Path) -> None:
    """UserError for an adapter, alone or beside a model."""
    adapter = next((name for name in _ADAPTER_FILES if os.path.lexists(directory / name)), None)
    if adapter is not None:
        raise UserError(_adapter(directory, adapter))


def _adapter(directory: Path, file: str) -> str:
    about = read_json(directory / ADAPTER, "an adapter") if os.path.lexists(directory / ADAPTER) else {}
    kind, base = about.get("peft_type", "an unknown kind"), about.get("base_model_name_or_path")
    found = f"{directory} holds an adapter ({file}, {brief(kind, 20)} of {brief(base)})"
    if os.path.lexists(directory / "config.json"):
        return (
            f"{found} beside the model, and transformers would apply it: merge it first, {_MERGE}, or move the "
            "adapter_* files away to take the model without it"
        )
    return f"{found} and no model: merge it into its model first, {_MERGE}"


def plain_entries(
    directory: Path, entries: Mapping[str, Entry], family: Family, config: ModelConfig
) -> dict[str, Entry]:
    """The entries by the names that the family's table has, as far as they are known by another.

    Wrappers are taken off; what was saved from the bare transformer gets the start of its names; of a tied model the
    embedding may be stored as the output layer alone.
    """
    known = {name for map in family.weights(config) for name in map.hf}
    known |= {name for map in family.weights(config) if map.expert == 0 for name in _places_of_all(map)}
    tied = family.tied_names(config)
    plain: dict[str, Entry] = {}
    for name, entry in entries.items():
        short = full_name(unwrapped(name), {*known, *tied}, family)
        if short in plain:
            raise UserError(
                f"{directory} holds {shown(plain[short].name)} and {shown(name)}, both for {short}; keep one"
            )
        plain[short] = entry
    if config.num_moe_experts:
        plain = _experts_apart(directory, plain, family, config)
    embedding = next(iter(family.weights(config)[0].hf))
    for name in tied:
        if embedding not in plain and name in plain:
            plain[embedding] = plain.pop(name)
    return plain


def _in_one(map: WeightMap) -> set[str]:
    """Names that a tensor may have which has this weight of all experts of a layer."""
    start = map.hf[0].partition(".experts.")[0]
    names = {name for _, name, _ in map.fused()}
    return names | {f"{start}.experts.{name.rpartition('.')[2]}" for name in names}


def _places_of_all(map: WeightMap) -> set[str]:
    """The same, and of the router beside it."""
    return {name for one in _in_one(map) for name in (one, f"{one.rpartition('.experts.')[0]}.gate.weight")}


def _experts_apart(directory: Path, entries: dict[str, Entry], family: Family, config: ModelConfig) -> dict[str, Entry]:
    """The same with the experts of a layer one by one, where a tensor holds them all, as transformers 5 does in memory.

    `...experts.gate_up_proj` and `...experts.down_proj`, of which each is a `Part`.
    """
    found = dict(entries)
    for map in family.weights(config):
        if map.expert is None:
            if map.hf[0].endswith(".block_sparse_moe.gate.weight"):
                other = map.hf[0].replace(".block_sparse_moe.", ".mlp.")
                found |= {map.hf[0]: found.pop(other)} if other in found and map.hf[0] not in found else {}
            continue
        for place in _in_one(map) & entries.keys():
            whole = entries[place]
            (shape_of_all,) = set(map.fused_shapes(config).values())
            if whole.shape != shape_of_all:
                raise UserError(
                    f"{shown(whole.name)} in {whole.file} has shape {brief(list(whole.shape))}; config.json asks for "
                    f"{list(shape_of_all)}: one of the two is of another model, fetch both again"
                )
            found.pop(place, None)
            for (name, _, part), shape in zip(map.fused(), map.shapes, strict=True):
                if name in found:
                    raise UserError(
                        f"{directory} holds {shown(whole.name)} and {shown(name)}, one in the other; keep one"
                    )
                found[name] = replace(whole, shape=shape, part=part)
    return found


def unwrapped(name: str) -> str:
    """A tensor's name without the modules that were put around the model or its parts."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while around := next((one for one in _AROUND if tuple(parts[: len(one)]) == one and len(parts) > len(one)), None):
        parts = parts[len(around) :]
    return ".".join(parts)


def full_name(name: str, known: Collection[str], family: Family) -> str:
    """The name with the start that a bare transformer's lacks, or without a trainer's: the one that is the family's."""
    first, _, rest = name.partition(".")
    names = [name, family.prefix + name, *([rest] if first in _FIRST else [])]
    return next((one for one in names if one in known or is_ignored(one, family)), name)


def is_ignored(name: str, family: Family) -> bool:
    """Whether a tensor carries no weight: masks and rotary tables that older versions saved."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in family.ignored)


def check_names(entries: Mapping[str, Entry], known: Collection[str], family: Family) -> None:
    """UserError for a tensor that a model of the family does not have."""
    for name in sorted(set(entries) - set(known)):
        if not is_ignored(name, family):
            raise UserError(_unknown(name, entries[name], known, family))


def _unknown(name: str, entry: Entry, known: Iterable[str], family: Family) -> str:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in _HEADS):
        return (
            f"{entry.file} holds {shown(entry.name)}: the model is a classifier, a reward model or another one with a "
            "head of its own, and not a language model; give the language model that it was made from"
        )
    return (
        f"{entry.file} holds {shown(entry.name)}, which a {family.name} model of this config.json does not have"
        f"{nearest(name, known)}; it would be lost"
    )


def missing(
    directory: Path, name: str, entries: Mapping[str, Entry], family: Family, hf_config: Mapping[str, Any]
) -> str:
    """Why a model lacks a tensor that config.json asks for, and what to do."""
    heads = [other for other in entries if any(fnmatch.fnmatchcase(other, pattern) for pattern in _HEADS)]
    if heads:
        return _unknown(heads[0], entries[heads[0]], entries, family)
    told = f"{directory} has no tensor {name}, which config.json asks for"
    if name in [hf for row in family.table if row.untied_only for hf in row.hf]:
        classes = hf_config.get("architectures")
        return (
            f"{told}: it was saved without its output layer (architectures {brief(classes)}); if that is the "
            "embedding, set tie_word_embeddings to true, else save the model by its language model's class "
            f"(*{family.head})"
        )
    return f"{told}; is the checkpoint complete?"


def check_tensors(directory: Path, entries: Mapping[str, Entry]) -> None:
    """UserError for the tensors of a quantised model or of an adapter that is not merged."""
    quantised.check_tensors(directory, {name: entry.dtype for name, entry in entries.items()})
    for name in entries:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _ADAPTER_PARTS):
            raise UserError(
                f"{directory} holds {shown(name)}, a part of an adapter that is not merged; merge it and save the "
                "model again: model.merge_and_unload().save_pretrained(NEW_DIR)"
            )


def nearest(name: str, names: Iterable[str]) -> str:
    """` (nearest: NAME)` for a misspelt one."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (nearest: {near[0]})" if near else ""
