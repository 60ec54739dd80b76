"""Proof of what a pruned model is, read from its weights alone.

Five checks, each with its figures: the pattern holds in every group, every zero is +0.0, every number is finite, the
density of each layer, and the logits equal those of another form of the same model (`--against`). Exit status 1 when
one of them fails, and when no pattern, no sizes and no logits were there to check: that proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.config import VerifyConfig
from megatron_prune.decision import pruned, run_folder
from megatron_prune.decision.masks import prunable_shapes
from megatron_prune.decision.target import (
    LATENCY,
    NM,
    Budget,
    Shape,
    StructuredTarget,
    Target,
    Unstructured,
    parse_any_target,
    title,
)
from megatron_prune.decision.tiles import broken_groups
from megatron_prune.errors import UserError
from megatron_prune.exporting.padding import in_transformers
from megatron_prune.foreign import names
from megatron_prune.methods.fit import check_target
from megatron_prune.model.checkpoint import load_model
from megatron_prune.model.convert import HFReader
from megatron_prune.model.cost import cost, parameters
from megatron_prune.model.description import is_checkpoint, read_description
from megatron_prune.model.families import ModelConfig, get_family
from megatron_prune.model.forward import logits
from megatron_prune.model.layout import layout_of
from megatron_prune.model.packed import open_reader
from megatron_prune.model.pruning import read_pruning
from megatron_prune.ranks import by_leader, from_leader

TOLERANCE = 1e-5
TOLERANCE_GPU = 1e-4
"""By the largest logit. On a CPU both softwares use the same float32 kernels; on a GPU their attention and norms differ
in the last digits, layer after layer. Rounding of weights or products (bfloat16, TF32) is ten times that.
"""
NAMED = 3
"""Weights that a line names."""
ROOM_FOR_ACTIVATIONS = 1.2
NOTHING = (
    "NOT verified: nothing was checked, for no pattern is recorded here; give --target 2:4 (or what it was pruned "
    "to) or --against MODEL"
)
CHECKS = ("pattern", "shape", "logits")
"""What proves something of the pruning; zeros stored as +0.0 and finite numbers any dense model has, too."""


@dataclass
class ZeroCount:
    """Zeros of one prunable weight."""

    size: int
    zeros: int
    negative_zeros: int
    broken_groups: int
    """Groups with more weights than the pattern keeps."""
    rounding: int
    """Weights by which a method may keep more than the sparsity asked for: one for each row or column."""


@dataclass
class Source:
    """A model in any of its three forms."""

    path: Path
    kind: str
    """`checkpoint`, `run` or `hugging face`."""
    config: ModelConfig
    target: str | None
    """The pattern recorded with it."""
    parameters: int | None = None
    """The number recorded with a model that was made smaller."""
    reader: HFReader | None = field(default=None, repr=False)


def open_source(given: str | Path) -> Source:
    """Find out what a path (or hub id) is; UserError when it is no model."""
    path = Path(given)
    if is_checkpoint(path):
        about = read_description(path)
        return Source(path, "checkpoint", about.config, about.source.get("target"), about.source.get("parameters"))
    if run_folder.is_run(path):
        model = pruned.open_source(path)
        return Source(path, "run", model.config, model.history.get("target"), model.history.get("parameters"))
    reader = open_reader(str(given))
    said = read_pruning(reader.directory)
    return Source(path, "hugging face", reader.model_config, said.get("target"), said.get("parameters"), reader)


def count_zeros(weight: Tensor, target: Target | None) -> ZeroCount:
    """Zeros, negative zeros and broken groups of a weight `[out, in]`."""
    zero = weight == 0
    broken = 0
    if isinstance(target, NM):
        broken = int(broken_groups(~zero, target).sum())
    rounding = 0 if target is None or isinstance(target, NM) else max(weight.shape)
    return ZeroCount(weight.numel(), int(zero.sum()), int((zero & torch.signbit(weight)).sum()), broken, rounding)


def watched(weights: Iterator[tuple[str, Tensor]], found: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """The same weights; how many elements of each are NaN or infinite, where any is, is noted in `found`."""
    for name, weight in weights:
        if weight.numel() and not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
            found[name] = int((~torch.isfinite(weight)).sum())
        yield name, weight


def projections(
    weights: Iterator[tuple[str, Tensor]], config: ModelConfig, target: Target | None
) -> dict[str, ZeroCount]:
    """The counts of every prunable weight, by Hugging Face name."""
    wanted, family = prunable_shapes(config), get_family(config.family)
    return {
        name: count_zeros(family.as_rows(weight), None if target is None or target.leaves(name) else target)
        for name, weight in weights
        if name in wanted
    }


def _weights(source: Source, model: Any) -> Iterator[tuple[str, Tensor]]:
    if source.reader is not None:
        return ((name, source.reader.read(name)) for name in source.reader.names())
    return model.hf_weights()


def _load(source: Source, layout: backend.Layout, dtype: str | None) -> Any:
    if source.kind == "checkpoint":
        return load_model(source.path, layout, dtype)
    if source.kind == "run":
        return pruned.load_pruned(source.path, layout, dtype)[0]
    return None


def _logits(source: Source, layout: backend.Layout, tokens: Tensor) -> Tensor | None:
    """Logits `[b, s, vocab]` in float32 of a source's own software, megatron-core or transformers; rank 0 has them.

    transformers' model is whole, so one rank has it. Collective.
    """
    reader, found = source.reader, list[Tensor]()
    if reader is None:
        return logits(_load(source, layout, "float32"), tokens).cpu()
    by_leader(lambda: found.append(_logits_of_transformers(reader, tokens)))
    return found[0] if found else None


@torch.no_grad()
def _logits_of_transformers(reader: HFReader, tokens: Tensor) -> Tensor:
    place = device_for(parameters(reader.model_config))
    model = in_transformers(reader, torch.float32).eval().to(place)
    return model(tokens.to(place)).logits.float().cpu()


def device_for(parameters: int) -> torch.device:
    """Where a whole float32 model is run: on this process's device, or on the CPU when the GPU has no room for it."""
    place = backend.device()
    if place.type == "cpu":
        return place
    torch.cuda.empty_cache()  # what megatron-core's model has left
    free, needed = torch.cuda.mem_get_info(place)[0], 4 * ROOM_FOR_ACTIVATIONS * parameters
    return place if needed <= free else torch.device("cpu")


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Every check of `config.input`, and whether there were some and all hold. Collective."""
    source = open_source(config.input)
    recorded = config.target or source.target
    asked = parse_any_target(recorded) if recorded else None
    target = None if isinstance(asked, (Shape, Budget)) else asked
    if target is not None:
        target.check_named()
        check_target(source.config, target)
    layout = layout_of(config.parallelism)
    with backend.running(layout):
        strange: dict[str, int] = {}
        counts = projections(watched(_weights(source, _load(source, layout, None)), strange), source.config, target)
        result = _zero_checks(source, target, counts)
        result["finite"] = {"not_finite": strange, "holds": not strange}
        if isinstance(asked, (Shape, Budget)) and (shape := _shape_check(source, asked)):
            result["shape"] = shape
        if config.against is not None:
            result["logits"] = _compare(source, open_source(config.against), layout, config)
    result["checked"] = [name for name in CHECKS if name in result]
    holds = all(check["holds"] for check in result.values() if isinstance(check, dict) and "holds" in check)
    result["holds"] = bool(result["checked"]) and holds
    return result


def _zero_checks(source: Source, target: Target | None, counts: dict[str, ZeroCount]) -> dict[str, Any]:
    size = sum(c.size for c in counts.values())
    zeros = sum(c.zeros for c in counts.values())
    negative = sum(c.negative_zeros for c in counts.values())
    broken = {name: c.broken_groups for name, c in counts.items() if c.broken_groups}
    touched = {name: c for name, c in counts.items() if target is not None and not target.leaves(name)}
    dense = [name for name, c in touched.items() if target is not None and _kept_too_many(c, target)]
    if isinstance(target, Unstructured) and _kept_too_many(_sum(touched.values()), replace(target, spread=0.0)):
        dense.append("all weights together")
    density = 1 - zeros / size
    result: dict[str, Any] = {"input": str(source.path), "kind": source.kind}
    if target is not None:
        # a kept weight may itself be zero, so the density may lie below the target's but not above it
        result["pattern"] = {
            "target": str(target),
            "broken_groups": broken,
            "too_dense": dense,
            "left_dense": len(counts) - len(touched),
            "holds": not broken and not dense,
        }
    result["zeros"] = {"zeros": zeros, "negative_zeros": negative, "holds": negative == 0}
    result["density"] = {"weights": size, "density": density, "per_weight": _densities(counts)}
    return result


def _shape_check(source: Source, target: StructuredTarget) -> dict[str, Any] | None:
    """Whether a model has the sizes, or the number of parameters, that it was pruned to.

    Weights do not tell a latency: a model pruned to one has the number of parameters that was recorded; None where none
    was.
    """
    config = source.config
    found = {"parameters": parameters(config)}
    if isinstance(target, Budget) and target.measure == LATENCY:
        if source.parameters is None:
            return None
        found["recorded"] = source.parameters
        holds = found["parameters"] == source.parameters
    elif isinstance(target, Shape):
        found |= {name: getattr(config, name) for name in target.given()}
        holds = all(found[name] == wanted for name, wanted in target.given().items())
    else:
        holds = cost(config, target.measure) <= target.limit
    return {"target": str(target), **found, "holds": holds}


def _kept_too_many(count: ZeroCount, target: Target) -> bool:
    """Whether one weight is denser than the target; kept weights that are zero themselves make it sparser."""
    spread = target.spread if isinstance(target, Unstructured) else 0.0
    return count.size - count.zeros > (target.density + spread) * count.size + count.rounding + 1e-6


def _sum(counts: Iterable[ZeroCount]) -> ZeroCount:
    """Of several weights together."""
    return ZeroCount(*(sum(column) for column in zip(*map(astuple, counts), strict=True)))


def _densities(counts: dict[str, ZeroCount]) -> dict[str, float]:
    return {name: round(1 - c.zeros / c.size, 6) for name, c in counts.items()}


def _compare(source: Source, other: Source, layout: backend.Layout, config: VerifyConfig) -> dict[str, Any]:
    if source.config.vocab_size != other.config.vocab_size:
        raise UserError(
            f"--against {other.path} has a vocabulary of {other.config.vocab_size} and {source.path} one of "
            f"{source.config.vocab_size}: they are different models"
        )
    for model in (source, other):
        model.config.check_length(config.seq_length)
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(0, source.config.vocab_size, (2, config.seq_length), generator=generator)
    a, b = _logits(source, layout, tokens), _logits(other, layout, tokens)
    found = None if a is None or b is None else difference_of(a, b, allowed(config))
    return from_leader({"against": str(other.path), **(found or {})})


def allowed(config: VerifyConfig) -> float:
    """The share of the largest logit by which logits may differ."""
    if config.tolerance is not None:
        return config.tolerance
    return TOLERANCE_GPU if backend.has_cuda() else TOLERANCE


def difference_of(a: Tensor, b: Tensor, tolerance: float) -> dict[str, Any]:
    """How far logits `a` `[b, s, vocab]` are from `b`, the reference; they hold within `tolerance` of its largest."""
    difference, largest = float((a - b).abs().max()), float(b.abs().max())
    return {
        "max_absolute_difference": difference,
        "largest_logit": largest,
        "same_argmax": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        "tolerance": tolerance,
        "holds": math.isfinite(difference) and difference <= tolerance * largest,
    }


def told(result: dict[str, Any]) -> list[str]:
    """The result in words."""
    zeros, density = result["zeros"], result["density"]
    lines = [*_of_the_decision(result)]
    strange = result["finite"]["not_finite"]
    if strange:
        count = f"{sum(strange.values())} numbers of {names(list(strange))} are NaN or infinite"
        lines.append(f"finite: NOT, {count}: the model is damaged or its training overflowed")
    lines.append(f"zeros: {zeros['zeros']} of {density['weights']}, {zeros['negative_zeros']} of them stored as -0.0")
    lines.append(f"density: {density['density']:.6f} over {len(density['per_weight'])} weights")
    if "logits" in result:
        x = result["logits"]
        lines.append(
            f"logits against {x['against']}: largest difference {x['max_absolute_difference']:.3g} (largest logit "
            f"{x['largest_logit']:.3g}), same argmax {x['same_argmax']:.4f}: {'equal' if x['holds'] else 'DIFFERENT'}"
        )
    if not result["checked"]:
        return [*lines, NOTHING]
    return [*lines, "verified" if result["holds"] else "NOT verified"]


def _which(names: list[str]) -> str:
    """The first of some, in brackets."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f" ({', '.join(names[:NAMED])}{more})" if names else ""


def _of_the_decision(result: dict[str, Any]) -> list[str]:
    lines, pattern, shape = [], result.get("pattern"), result.get("shape")
    if pattern:
        broken, dense = pattern["broken_groups"], pattern["too_dense"]
        most = [f"{broken[name]} of {name}" for name in sorted(broken, key=lambda name: -broken[name])]
        failure = (
            f"BROKEN in {sum(broken.values())} groups{_which(most)}, {len(dense)} weights are too dense{_which(dense)}"
        )
        left = f", {pattern['left_dense']} weights are left dense" if pattern["left_dense"] else ""
        lines.append(f"pattern {title(pattern['target'])}: {'holds' if pattern['holds'] else failure}{left}")
    elif shape is None:
        lines.append("pattern: none recorded and no --target given, not checked")
    if shape is not None:
        holds = "holds" if shape["holds"] else "BROKEN"
        lines.append(f"shape {shape['target']}: {holds}, {shape['parameters']} parameters")
    return lines
