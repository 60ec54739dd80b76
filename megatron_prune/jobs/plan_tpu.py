"""Whether a model divides over the chips of a TPU slice, and what training and mask learning in MaxText take on each.

Counted from the arrays of MaxText's tree; nothing is loaded and no TPU is asked. All chips of a slice share the weights
(ici_fsdp_parallelism=-1), as examples/tpu/run.sh has it: MaxText shards the hidden size, so that must divide.

    train    12 bytes a weight: float32, with Adam's two means in float32
    learn    2 bytes a weight (bfloat16) and 2 for its masked copy, and for each group of a masked weight its logits
             and their two means in float32; every chip has those of a linear whose outputs do not divide over all

Activations are not counted: MaxText recomputes as it is told to (remat_policy).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.decision.target import NM
from megatron_prune.errors import UserError, brief
from megatron_prune.exporting.forms import form_of
from megatron_prune.jobs.plan import GIB, read_config
from megatron_prune.kernels.definition import pattern_table
from megatron_prune.maxtext import layout
from megatron_prune.model.families import ModelConfig, get_family


@dataclass(frozen=True)
class Kind:
    """A generation of TPUs; Google's tables of its machine types."""

    gib: int
    """High-bandwidth memory of a chip."""
    per_chip: int
    """Of what the name of a slice counts: cores, of which a chip has two, or chips."""
    per_host: int
    """Chips of a host in a slice of several."""


KINDS = {
    "v4": Kind(32, 2, 4),
    "v5litepod": Kind(16, 1, 4),
    "v5p": Kind(95, 2, 4),
    "v6e": Kind(32, 1, 4),
}


@dataclass(frozen=True)
class Slice:
    """Chips that share the weights."""

    name: str
    chips: int
    hosts: int
    bytes: int
    """High-bandwidth memory of a chip."""


@dataclass(frozen=True)
class TpuPlan:
    """What a slice has to hold."""

    tpu: Slice
    fsdp: int
    """Chips over which the weights can be shared: the most that divide the hidden size and the slice."""
    train: int
    """Bytes on a chip of weights and optimizer."""
    learn: int
    """Bytes on a chip of weights, masked weights, logits and optimizer."""


def slice_of(name: str) -> Slice:
    """The slice of a name such as v5p-64; UserError for another name."""
    found = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]{0,4})", name)
    kind = KINDS.get(found[1]) if found else None
    if found is None or kind is None or int(found[2]) % kind.per_chip:
        raise UserError(f"--tpu {brief(name)} is not known; allowed: {', '.join(KINDS)} and its size, such as v5p-64")
    chips = int(found[2]) // kind.per_chip
    return Slice(name, chips, math.ceil(chips / kind.per_host), kind.gib * GIB)


def plan_tpu(path: Path, target: NM, name: str) -> TpuPlan:
    """For a Megatron checkpoint or a Hugging Face directory, of which config.json is enough."""
    tpu, config = slice_of(name), read_config(path)
    if target.share != 1:
        raise UserError(
            f"--target {target} was given with --tpu {name}; MaxText learns masks of whole weights: leave "
            f"@{target.share} out, or learn with megatron-core (--processes)"
        )
    if target.dense:
        raise UserError(
            f"--target {target.title} was given with --tpu {name}; MaxText learns masks of all linears: leave dense= "
            "out, or learn with megatron-core (--processes)"
        )
    if form_of(config, None) == "padded":
        config = get_family(config.family).uniform(config)
    if config.num_moe_experts:
        raise UserError("a model with experts was given; --tpu counts others: give --processes, or another model")
    layout.check(config)
    fsdp = math.gcd(config.hidden_size, tpu.chips)
    weights = sum(math.prod(shape) for shape in layout.shapes(config).values())
    logits = sum(_logits(leaf, config, target, tpu.chips) for leaf in layout.LEAVES if leaf.prunable)
    return TpuPlan(tpu, fsdp, _up(12 * weights, fsdp), _up(4 * weights, fsdp) + 12 * logits)


def _logits(leaf: layout.Leaf, config: ModelConfig, target: NM, chips: int) -> int:
    """Logits on a chip of all layers' weights of one kind."""
    out, inputs = layout.weight_shape(leaf, config)
    target.check(inputs, leaf.hf)
    count = config.num_layers * out * (inputs // target.m) * len(pattern_table(target.n, target.m))
    return count // chips if out % chips == 0 else count


def _up(number: int, parts: int) -> int:
    return -(-number // parts)


def told(plan: TpuPlan, target: NM) -> list[str]:
    """Lines for the user."""
    tpu = plan.tpu
    lines = [f"{tpu.name}: {tpu.chips} chips on {tpu.hosts} hosts, {tpu.bytes // GIB} GiB each"]
    if plan.fsdp < tpu.chips:
        lines.append(
            f"the hidden size does not divide over {tpu.chips} chips: give --settings ici_fsdp_parallelism={plan.fsdp} "
            f"ici_data_parallelism={tpu.chips // plan.fsdp}, with which {plan.fsdp} chips share the weights"
        )
    for what, size in (("train", plan.train), (f"learn {target}", plan.learn)):
        fits = "fits, with what is left for activations" if size < tpu.bytes else "does not fit: take a larger slice"
        lines.append(f"{what}: {size / GIB:.2f} GiB a chip without activations; {fits}")
    return lines
