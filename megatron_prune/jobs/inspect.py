"""What a checkpoint, a run folder, a decision or a mask file holds, in words, without loading a model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prune.decision import run_folder
from megatron_prune.decision.mask_file import mask_npz_kept, mask_npz_pattern
from megatron_prune.decision.masks import Masks, prunable_shapes
from megatron_prune.decision.target import title
from megatron_prune.decision.trimming import Trim, is_trim, read_record
from megatron_prune.log import left_start, read_metrics
from megatron_prune.model.cost import active_parameters, parameters
from megatron_prune.model.description import ZEROS, is_checkpoint, read_description
from megatron_prune.model.families import ModelConfig
from megatron_prune.model.given import wrong
from megatron_prune.model.packed import open_reader
from megatron_prune.model.pruning import read_pruning
from megatron_prune.model.summary import Zeros, summary


def described(path: Path) -> list[str]:
    """Lines on what `path` is; UserError when it is nothing of ours."""
    if is_checkpoint(path):
        return _checkpoint(path)
    if run_folder.is_run(path):
        return _run(path)
    if (path / "decision.json").is_file() or is_trim(path):
        return _decision(path)
    if path.suffix == ".npz" and path.is_file():
        kept, size = mask_npz_kept(path)
        pattern = title(mask_npz_pattern(path) or "not stated")
        return [f"{path}: mask file, pattern {pattern}, {kept:,} of {size:,} weights kept ({kept / max(1, size):.6f})"]
    if (path / "config.json").is_file():
        return _hugging_face(path)
    raise wrong(path, "ours")


def _checkpoint(path: Path) -> list[str]:
    about = read_description(path)
    zeros = about.zeros()
    return [
        f"{path}: Megatron checkpoint, {summary(about.config, path)}",
        *([f"  {zeros.told()}"] if zeros is not None else []),
        *_sizes(about.config),
        *_history(about.source),
    ]


def _hugging_face(path: Path) -> list[str]:
    reader = open_reader(path)
    wanted, zeros = prunable_shapes(reader.model_config), 0
    for name in wanted:
        weight = reader.read(name)
        zeros += weight.numel() - int(weight.count_nonzero())
    told = Zeros(zeros, sum(math.prod(shape) for shape in wanted.values())).told()
    about = f"{path}: Hugging Face directory, {summary(reader.model_config, path)}"
    return [about, f"  {told}", *_sizes(reader.model_config), *_history(read_pruning(path))]


WORDS = {"weights": "weights of a run, its decision not applied", "parameters": "parameters after pruning"}
"""Keys of a history that do not say by themselves what they are."""


def _history(source: Mapping[str, Any]) -> list[str]:
    found = {key: value for key, value in source.items() if value is not None and key != ZEROS}
    return [f"  {WORDS.get(key, key)}: {value}" for key, value in found.items()]


def _sizes(config: ModelConfig) -> list[str]:
    model = config.to_dict()
    sizes = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size".split()
    lines = ["  " + ", ".join(f"{name} {model[name]}" for name in sizes)]
    if config.num_moe_experts:
        names = "num_moe_experts moe_ffn_hidden_size moe_router_topk moe_shared_expert_intermediate_size".split()
        experts = [f"{name} {model[name]}" for name in names if name in model]
        experts.append(f"{active_parameters(config)} of {parameters(config)} parameters for each token")
        if config.moe_layers is not None:
            dense = [str(layer) for layer, sparse in enumerate(config.moe_layers) if not sparse]
            experts.append(f"layers without experts: {' '.join(dense)}")
        lines.append("  " + ", ".join(experts))
    if config.blocks is not None:
        layers = [f"{x.num_attention_heads}/{x.num_query_groups}/{x.ffn_hidden_size}" for x in config.blocks]
        lines.append(f"  the largest sizes; heads/groups/ffn of each layer: {' '.join(layers)}")
    return lines


def _run(path: Path) -> list[str]:
    about = run_folder.read_run(path)
    lines = [f"{path}: {about.kind} run of {about.input}, {about.state}"]
    step = run_folder.latest_step(path)
    if step is not None:
        lines.append(f"  newest checkpoint: step {step}")
    moved = left_start(read_metrics(path))
    if moved is not None:
        lines.append(f"  {moved:.2%} of the groups have left their start")
    return lines + (_decision(run_folder.decision_of(path)) if about.state == "decided" else [])


def _decision(path: Path) -> list[str]:
    if is_trim(path):
        return _trim(path)
    masks = Masks.load(path)
    rows = masks.summary()
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        sums[row.projection][0] += row.kept
        sums[row.projection][1] += row.size
    kept = [f"  {name:<10} {kept} of {size} kept ({kept / size:.6f})" for name, (kept, size) in sums.items()]
    kept_of_all, size = sum(row.kept for row in rows), sum(row.size for row in rows)
    whole = f"{kept_of_all:,} of {size:,} weights kept, density {masks.density:.6f}"
    return [f"{path}: {masks.info.method} {title(masks.info.target)}, {whole}", *kept]


def _trim(path: Path) -> list[str]:
    trim, about = Trim.load(path), read_record(path)
    changes = [f"  {about.parameters:,} parameters stay"]
    changes += [f"  {name:<20} {getattr(about.before, name)} -> {after}" for name, after in about.after.given().items()]
    layers = " ".join(map(str, trim.units.layers))
    return [f"{path}: {trim.info.method} {trim.info.target}, layers that stay: {layers}", *changes]
