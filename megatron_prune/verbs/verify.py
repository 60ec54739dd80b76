"""The `verify` verb: pattern, true zeros, density and equal logits, proved."""

from __future__ import annotations

from typing import Any

from megatron_prune.config import VerifyConfig
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
    from megatron_prune.evaluation.verify import told, verify

    result = verify(config)
    deliver(told(result), result, config.output)
    return result
