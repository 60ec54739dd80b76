"""The `evaluate` verb: perplexity of a checkpoint on a text, or scores of lm-eval's tasks."""

from __future__ import annotations

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from megatron_prune.claims import refuse_existing
from megatron_prune.config import EvaluateConfig
from megatron_prune.evaluation.perplexity import perplexity
from megatron_prune.files import write_result


def run(config: EvaluateConfig) -> None:
    """Evaluate `config.input`, print the result and write it where asked."""
    if config.tasks.names:
        from megatron_prune.evaluation import zeroshot

        zeroshot.run(config)
        return
    if config.output is not None:
        refuse_existing(config.output)
    result = perplexity(config)
    if backend.rank() == 0:
        print(f"perplexity {result['perplexity']:.3f}  ({result['predicted_tokens']} tokens, {result['protocol']})")
        if config.output is not None:
            write_result(config.output, result)
