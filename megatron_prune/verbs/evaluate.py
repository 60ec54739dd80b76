"""The `evaluate` verb: perplexity of a checkpoint on a text, or scores of lm-eval's tasks."""

from __future__ import annotations

from typing import Any

from megatron_prune.config import EvaluateConfig
from megatron_prune.verbs import Verb, deliver

VERB = Verb("evaluate", EvaluateConfig, "perplexity of a checkpoint on a text, or scores of lm-eval's tasks", 80)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate `config.input`, print the result and write it where asked."""
    return _tasks(config) if config.tasks.names else _text(config)


def _text(config: EvaluateConfig) -> dict[str, Any]:
    from megatron_prune.evaluation.perplexity import load_told, perplexity

    result = perplexity(config)
    line = f"perplexity {result['perplexity']:.3f}  ({result['predicted_tokens']} tokens, {result['protocol']})"
    load = result.get("expert_tokens")
    deliver([line, load_told(load)] if load else [line], result, config.output)
    return result


def _tasks(config: EvaluateConfig) -> dict[str, Any]:
    from megatron_prune.evaluation.zeroshot import evaluate_tasks, table, write_samples
    from megatron_prune.log import is_leader

    result, samples = evaluate_tasks(config)
    deliver(table(result["results"]), result, config.output)
    if config.tasks.samples is not None and is_leader():
        write_samples(config.tasks.samples, samples)
    return result
