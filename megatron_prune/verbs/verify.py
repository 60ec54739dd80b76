"""The `verify` verb: pattern, true zeros, density and equal logits, proved."""

from __future__ import annotations

from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from megatron_prune.claims import refuse_existing
from megatron_prune.config import VerifyConfig
from megatron_prune.evaluation.verify import verify
from megatron_prune.files import write_result
from megatron_prune.foreign import names
from megatron_prune.log import say


def run(config: VerifyConfig) -> int:
    """Check `config.input`, print and write the result; 0 when every check holds."""
    if config.output is not None:
        refuse_existing(config.output)
    result = verify(config)
    if backend.rank() == 0:
        _print(result)
        if config.output is not None:
            write_result(config.output, result)
    return 0 if result["holds"] else 1


def _print(result: dict[str, Any]) -> None:
    pattern, zeros, density = result.get("pattern"), result["zeros"], result["density"]
    if pattern:
        broken, dense = sum(pattern["broken_groups"].values()), len(pattern["too_dense"])
        failure = f"BROKEN in {broken} groups, {dense} weights are too dense"
        say(f"pattern {pattern['target']}: {'holds' if pattern['holds'] else failure}")
    elif "shape" not in result:
        say("pattern: none recorded and no --target given, not checked")
    if "shape" in result:
        shape = result["shape"]
        say(f"shape {shape['target']}: {'holds' if shape['holds'] else 'BROKEN'}, {shape['parameters']} parameters")
    strange = result["finite"]["not_finite"]
    if strange:
        told = f"{sum(strange.values())} numbers of {names(list(strange))} are NaN or infinite"
        say(f"finite: NOT, {told}: the model is damaged or its training overflowed")
    say(f"zeros: {zeros['zeros']} of {density['weights']}, {zeros['negative_zeros']} of them stored as -0.0")
    say(f"density: {density['density']:.6f} over {len(density['per_weight'])} weights")
    if "logits" in result:
        x = result["logits"]
        say(
            f"logits against {x['against']}: largest difference {x['max_absolute_difference']:.3g} (largest logit "
            f"{x['largest_logit']:.3g}), same argmax {x['same_argmax']:.4f}: {'equal' if x['holds'] else 'DIFFERENT'}"
        )
    say("verified" if result["holds"] else "NOT verified")
