"""What a run may learn from: the teacher is looked at before anything is loaded."""

from __future__ import annotations

from megatron_prune.config import PruneConfig, TrainConfig
from megatron_prune.decision.source import ModelSource
from megatron_prune.training.weighting import check_teacher, check_way


def check_taught(config: PruneConfig | TrainConfig, source: ModelSource, teacher: ModelSource) -> None:
    """UserError for a teacher that the model of `source` cannot learn from as the options say."""
    teacher.config.check_length(config.training.seq_length)
    check_way(config.losses, config.training, config.parallelism)
    check_teacher(config.losses, config.input, source, teacher)
