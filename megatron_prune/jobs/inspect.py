"""What a checkpoint, a run folder, a decision or a mask file holds, in words, without loading a model."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from megatron_prune.decision import run_folder
from megatron_prune.decision.mask_file import mask_npz_pattern
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.trimming import Trim, is_trim, read_record
from megatron_prune.model.cost import active_parameters, parameters
from megatron_prune.model.description import is_checkpoint, read_description
from megatron_prune.model.given import wrong


def described(path: Path) -> list[str]:
    """Lines on what `path` is; UserError when it is nothing of ours."""
    if is_checkpoint(path):
        return _checkpoint(path)
    if (path / run_folder.DESCRIPTION).is_file():
        return _run(path)
    if (path / "decision.json").is_file() or is_trim(path):
        return _decision(path)
    if path.suffix == ".npz" and path.is_file():
        return [f"{path}: mask file, pattern {mask_npz_pattern(path) or 'not stated'}"]
    raise wrong(path, "ours")


def _checkpoint(path: Path) -> list[str]:
    about = read_description(path)
    model = about.config.to_dict()
    sizes = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size".split()
    lines = [
        f"{path}: Megatron checkpoint of a {model['family']} model, {model['dtype']}",
        "  " + ", ".join(f"{name} {model[name]}" for name in sizes),
    ]
    if about.config.num_moe_experts:
        names = "num_moe_experts moe_ffn_hidden_size moe_router_topk moe_shared_expert_intermediate_size".split()
        experts = [f"{name} {model[name]}" for name in names if name in model]
        experts.append(f"{active_parameters(about.config)} of {parameters(about.config)} parameters for each token")
        if about.config.moe_layers is not None:
            dense = [str(layer) for layer, sparse in enumerate(about.config.moe_layers) if not sparse]
            experts.append(f"layers without experts: {' '.join(dense)}")
        lines.append("  " + ", ".join(experts))
    if about.config.blocks is not None:
        layers = [f"{x.num_attention_heads}/{x.num_query_groups}/{x.ffn_hidden_size}" for x in about.config.blocks]
        lines.append(f"  the largest sizes; heads/groups/ffn of each layer: {' '.join(layers)}")
    return lines + [f"  {key}: {value}" for key, value in about.source.items() if value is not None]


def _run(path: Path) -> list[str]:
    about = run_folder.read_run(path)
    lines = [f"{path}: {about.kind} run of {about.input}, {about.state}"]
    step = run_folder.latest_step(path)
    if step is not None:
        lines.append(f"  newest checkpoint: step {step}")
    return lines + (_decision(run_folder.decision_of(path)) if about.state == "decided" else [])


def _decision(path: Path) -> list[str]:
    if is_trim(path):
        return _trim(path)
    masks = Masks.load(path)
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in masks.summary():
        sums[row.projection][0] += row.kept
        sums[row.projection][1] += row.size
    kept = [f"  {name:<10} {kept} of {size} kept ({kept / size:.6f})" for name, (kept, size) in sums.items()]
    return [f"{path}: {masks.info.method} {masks.info.target}, density {masks.density:.6f}", *kept]


def _trim(path: Path) -> list[str]:
    trim, about = Trim.load(path), read_record(path)
    changes = [f"  {name:<20} {getattr(about.before, name)} -> {after}" for name, after in about.after.given().items()]
    layers = " ".join(map(str, trim.units.layers))
    return [f"{path}: {trim.info.method} {trim.info.target}, layers that stay: {layers}", *changes]
