"""The `verify` verb: pattern, true zeros, density and equal logits, proved."""

from __future__ import annotations

from typing import Any

from megatron_prune.config import VerifyConfig
from megatron_prune.foreign import names
from megatron_prune.verbs import Verb, deliver

VERB = Verb(
    "verify",
    VerifyConfig,
    "prove pattern, zeros, density and equal logits",
    90,
    passed=lambda result: bool(result["holds"]),
)


def run(config: VerifyConfig) -> dict[str, Any]:
    """Check `config.input`, print and write the result; it `holds` when every check does."""
    from megatron_prune.evaluation.verify import verify

    result = verify(config)
    deliver(told(result), result, config.output)
    return result


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
    return [*lines, "verified" if result["holds"] else "NOT verified"]


def _of_the_decision(result: dict[str, Any]) -> list[str]:
    lines, pattern, shape = [], result.get("pattern"), result.get("shape")
    if pattern:
        broken, dense = sum(pattern["broken_groups"].values()), len(pattern["too_dense"])
        failure = f"BROKEN in {broken} groups, {dense} weights are too dense"
        lines.append(f"pattern {pattern['target']}: {'holds' if pattern['holds'] else failure}")
    elif shape is None:
        lines.append("pattern: none recorded and no --target given, not checked")
    if shape is not None:
        holds = "holds" if shape["holds"] else "BROKEN"
        lines.append(f"shape {shape['target']}: {holds}, {shape['parameters']} parameters")
    return lines
