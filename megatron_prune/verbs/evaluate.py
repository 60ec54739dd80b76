"""The `evaluate` verb: perplexity of a checkpoint on a text, or scores of lm-eval's tasks."""

from __future__ import annotations

from typing import Any

from megatron_prune.config import EvaluateConfig
from megatron_prune.verbs import Verb

VERB = Verb("evaluate", EvaluateConfig, "perplexity of a checkpoint on a text, or scores of lm-eval's tasks", 80)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate `config.input`, print the result and write it where asked."""
    return _tasks(config) if config.tasks.names else _text(config)


def _text(config: EvaluateConfig) -> dict[str, Any]:
    from megatron_prune.evaluation.perplexity import perplexity
    from megatron_prune.files import write_result
    from megatron_prune.log import is_leader

    result = perplexity(config)
    if is_leader():
        print(f"perplexity {result['perplexity']:.3f}  ({result['predicted_tokens']} tokens, {result['protocol']})")
        if config.output is not None:
            write_result(config.output, result)
    return result


def _tasks(config: EvaluateConfig) -> dict[str, Any]:
    from megatron_prune.evaluation.zeroshot import evaluate_tasks, table, write_samples
    from megatron_prune.files import write_result
    from megatron_prune.log import is_leader, say

    result, samples = evaluate_tasks(config)
    if is_leader():
        for line in table(result["results"]):
            say(line)
        if config.output is not None:
            write_result(config.output, result)
        if config.tasks.samples is not None:
            write_samples(config.tasks.samples, samples)
    return result
