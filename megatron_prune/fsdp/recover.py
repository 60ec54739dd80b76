"""Recovery training with FSDP2: transformers' model, sharded; what the `train` verb runs for `--engine fsdp`.

The weights come out as a Hugging Face directory. megatron-fsdp, which is part of megatron-core, is not used: FSDP2 runs
on a CPU as well, takes transformers' modules as they are and needs nothing beside PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip

from megatron_prune.config import TrainConfig
from megatron_prune.decision.source import ModelSource
from megatron_prune.errors import UserError
from megatron_prune.exporting.huggingface import write_hf
from megatron_prune.fsdp.checkpoint import FsdpSave, load_fsdp
from megatron_prune.fsdp.model import ShardedModel, ShardedZeros, check_model
from megatron_prune.fsdp.trainer import FsdpTrainer, Objective
from megatron_prune.model.cost import forward_flops
from megatron_prune.ranks import together
from megatron_prune.training.session import TrainingSession
from megatron_prune.training.weighting import Weighting
from megatron_prune.training.zeros import counted


def check_sources(config: TrainConfig, source: ModelSource, teacher: ModelSource | None) -> None:
    """UserError for what FSDP cannot train or learn from, before anything is loaded."""
    x = config.losses
    for given, each, dtype in (
        (f"--input {config.input}", source, None),
        (f"--teacher {x.teacher}", teacher, x.teacher_dtype),
    ):
        if each is None:
            continue
        if each.reader is None:
            raise UserError(
                f"--engine fsdp: {given} has no weights as a Hugging Face directory: give one, such as `export` writes "
                "from a checkpoint that `trim` wrote, or use --engine megatron"
            )
        check_model(each.config, dtype, given)


def load(source: ModelSource, dtype: str | None = None, **more: Any) -> ShardedModel:
    """The model of a source that `check_sources` has seen, pruned where it is a pruning run's. Collective."""
    assert source.reader is not None
    return ShardedModel(source.reader, dtype, masks=source.masks, **more)


class FsdpEngine:
    """The model and its teacher, loaded."""

    def __init__(self, config: TrainConfig, source: ModelSource, teacher: ModelSource | None) -> None:
        """Collective."""
        self.config = config
        self.tokenizer = source.tokenizer
        self.model = load(source, recompute=config.training.recompute)
        self.teacher = load(teacher, config.losses.teacher_dtype, trained=False) if teacher else None

    def recover(self, weighting: Weighting, **session: Any) -> int | None:
        """Train; the number of kept zeros, None when they are not kept. Collective; raises Stopped."""
        runner = FsdpSession(self.model, self.config.training, **session)
        return runner.recover(weighting, self.teacher, self.config.keep_zeros)

    def save(self, path: Path, history: dict[str, Any]) -> None:
        """Write a Hugging Face directory, with what the history says of pruning. Collective."""
        weights = self.model.weights()
        config = self.model.config

        def write() -> None:
            try:
                if backend.rank() == 0:
                    write_hf(path, config, weights, self.tokenizer, history=history)
            finally:  # every rank takes part in gathering each tensor, also when it cannot be written
                for _ in weights:
                    pass

        together(write)


class FsdpSession(TrainingSession):
    """Trains all weights of a sharded model whose zeros stay."""

    model: ShardedModel
    sharded_save = FsdpSave
    sharded_load = staticmethod(load_fsdp)
    zeros: ShardedZeros | None = None

    def recover(self, weighting: Weighting, teacher: ShardedModel | None, keep_zeros: bool) -> int | None:
        """As `RecoveryRunner.recover`."""
        self.zeros = ShardedZeros(self.model) if keep_zeros else None
        self.flops = 3 * forward_flops(self.model.config, self.training.seq_length)
        if teacher:
            self.flops += forward_flops(teacher.config, self.training.seq_length)
        objective = Objective(self.model, weighting, teacher)
        trainer = FsdpTrainer(self.model, self.training, self.data, objective, self.zeros)
        self.take_steps(trainer, lambda step, steps: {})
        return self.zeros.check("in the final weights") if self.zeros else None

    def check_state(self, when: str) -> dict[str, float]:
        """The zeros, counted, where there are any."""
        return counted(self.zeros, when)
