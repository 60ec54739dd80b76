"""The `inspect` verb: what a checkpoint, a run folder, a decision or a mask file holds, without loading a model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from megatron_prune.config import InspectConfig
from megatron_prune.decision import run_folder
from megatron_prune.decision.mask_file import mask_npz_pattern
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.trimming import Trim, is_trim, read_record
from megatron_prune.log import say
from megatron_prune.model.description import is_checkpoint, read_description
from megatron_prune.model.given import wrong


def run(config: InspectConfig) -> None:
    """Print what `config.input` is."""
    path = config.input
    if is_checkpoint(path):
        _checkpoint(path)
    elif (path / run_folder.DESCRIPTION).is_file():
        _run(path)
    elif (path / "decision.json").is_file() or is_trim(path):
        _decision(path)
    elif path.suffix == ".npz" and path.is_file():
        say(f"{path}: mask file, pattern {mask_npz_pattern(path) or 'not stated'}")
    else:
        raise wrong(path, "ours")


def _checkpoint(path: Path) -> None:
    about = read_description(path)
    model = about.config.to_dict()
    say(f"{path}: Megatron checkpoint of a {model['family']} model, {model['dtype']}")
    sizes = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size".split()
    say("  " + ", ".join(f"{name} {model[name]}" for name in sizes))
    if about.config.blocks is not None:
        layers = [f"{x.num_attention_heads}/{x.num_query_groups}/{x.ffn_hidden_size}" for x in about.config.blocks]
        say(f"  the largest sizes; heads/groups/ffn of each layer: {' '.join(layers)}")
    for key, value in about.source.items():
        if value is not None:
            say(f"  {key}: {value}")


def _run(path: Path) -> None:
    about = run_folder.read_run(path)
    say(f"{path}: {about.kind} run of {about.input}, {about.state}")
    step = run_folder.latest_step(path)
    if step is not None:
        say(f"  newest checkpoint: step {step}")
    if about.state == "decided":
        _decision(path / "decision")


def _decision(path: Path) -> None:
    if is_trim(path):
        _trim(path)
        return
    masks = Masks.load(path)
    say(f"{path}: {masks.info.method} {masks.info.target}, density {masks.density:.6f}")
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in masks.summary():
        sums[row.projection][0] += row.kept
        sums[row.projection][1] += row.size
    for name, (kept, size) in sums.items():
        say(f"  {name:<10} {kept} of {size} kept ({kept / size:.6f})")


def _trim(path: Path) -> None:
    trim, about = Trim.load(path), read_record(path)
    say(f"{path}: {trim.info.method} {trim.info.target}, layers that stay: {' '.join(map(str, trim.units.layers))}")
    for name, after in asdict(about.after).items():
        say(f"  {name:<20} {getattr(about.before, name)} -> {after}")
