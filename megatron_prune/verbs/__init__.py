"""The table of verbs. A verb's module is imported only when the verb runs, so `--help` answers at once."""

from __future__ import annotations

from typing import NamedTuple

from megatron_prune import config
from megatron_prune.options import Options


class Verb(NamedTuple):
    """One command: what configures it, `module:function` that does it, a line of help, and for how many processes."""

    config: type[Options]
    function: str
    help: str
    alone: bool = False
    """For one process."""


VERBS = {
    "preprocess": Verb(
        config.PreprocessConfig,
        "megatron_prune.verbs.preprocess:run",
        "text -> token ids in Megatron's .bin and .idx",
        alone=True,
    ),
    "import": Verb(
        config.ImportConfig,
        "megatron_prune.verbs.import_hf:run",
        "Hugging Face checkpoint -> Megatron checkpoint",
    ),
    "prune": Verb(
        config.PruneConfig, "megatron_prune.verbs.prune:run", "decide which weights stay, by a method from a paper"
    ),
    "plan": Verb(
        config.PlanConfig,
        "megatron_prune.verbs.plan:run",
        "memory that learning masks will take on each GPU",
        alone=True,
    ),
    "train": Verb(
        config.TrainConfig,
        "megatron_prune.verbs.train:run",
        "recover a pruned model: text, a teacher, LoRA; zeros stay",
    ),
    "trim": Verb(config.TrimConfig, "megatron_prune.verbs.trim:run", "apply a decision: a checkpoint with true zeros"),
    "export": Verb(
        config.ExportConfig,
        "megatron_prune.verbs.export:run",
        "Megatron checkpoint -> Hugging Face directory, MaxText or masks",
    ),
    "evaluate": Verb(
        config.EvaluateConfig,
        "megatron_prune.verbs.evaluate:run",
        "perplexity of a checkpoint on a text, or scores of lm-eval's tasks",
    ),
    "verify": Verb(
        config.VerifyConfig,
        "megatron_prune.verbs.verify:run",
        "prove pattern, zeros, density and equal logits",
    ),
    "bench": Verb(
        config.BenchConfig,
        "megatron_prune.verbs.bench:run",
        "time an exported 2:4 model, dense against sparse",
        alone=True,
    ),
    "latency": Verb(
        config.LatencyConfig,
        "megatron_prune.verbs.latency:run",
        "time a layer's parts at several sizes, for budgets",
        alone=True,
    ),
    "inspect": Verb(
        config.InspectConfig,
        "megatron_prune.verbs.inspect:run",
        "show what a checkpoint, run or decision holds",
        alone=True,
    ),
    "report": Verb(
        config.ReportConfig, "megatron_prune.verbs.report:run", "one HTML page of runs and results", alone=True
    ),
    "methods": Verb(
        config.MethodsConfig,
        "megatron_prune.verbs.methods:run",
        "list the pruning methods and their options",
        alone=True,
    ),
}
