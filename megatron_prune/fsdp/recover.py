"""Recovery training with FSDP2: transformers' model, sharded; what the `train` verb runs for `--engine fsdp`.

The weights come out as a Hugging Face directory. megatron-fsdp, which is part of megatron-core, is not used: FSDP2 runs
on a CPU as well, takes transformers' modules as they are and needs nothing beside PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip

from megatron_prune.config import TrainConfig
from megatron_prune.errors import UserError
from megatron_prune.export.huggingface import write_hf
from megatron_prune.files import together
from megatron_prune.fsdp.checkpoint import FsdpSave, load_fsdp
from megatron_prune.fsdp.model import ShardedModel, ShardedZeros, check_model
from megatron_prune.fsdp.trainer import FsdpTrainer, Objective
from megatron_prune.model.convert import HFReader
from megatron_prune.model.source import ModelSource
from megatron_prune.training.recovery import Weighting
from megatron_prune.training.session import TrainingSession
from megatron_prune.training.throughput import forward_flops


def readers(config: TrainConfig, source: ModelSource, teacher: ModelSource | None) -> list[HFReader]:
    """Of the model and of its teacher; UserError for what FSDP cannot train, before anything is loaded."""
    x = config.losses
    found = []
    for given, each, dtype in (
        (f"--input {config.input}", source, None),
        (f"--teacher {x.teacher}", teacher, x.teacher_dtype),
    ):
        if each is None:
            continue
        if each.reader is None:
            raise UserError(
                f"--engine fsdp: {given} is no Hugging Face directory: give one, such as `export` writes from a "
                "checkpoint that `trim` wrote, or use --engine megatron"
            )
        check_model(each.config, dtype, given)
        found.append(each.reader)
    return found


class FsdpEngine:
    """The model and its teacher, loaded."""

    def __init__(self, config: TrainConfig, source: ModelSource, teacher: ModelSource | None) -> None:
        """Collective."""
        self.config = config
        student, *taught = readers(config, source, teacher)
        self.source = student
        self.model = ShardedModel(student, recompute=config.training.recompute)
        self.teacher = ShardedModel(taught[0], config.losses.teacher_dtype, trained=False) if taught else None

    def recover(self, weighting: Weighting, **session: Any) -> int | None:
        """Train; the number of kept zeros, None when they are not kept. Collective; raises Stopped."""
        runner = FsdpSession(self.model, self.config.training, **session)
        return runner.recover(weighting, self.teacher, self.config.keep_zeros)

    def save(self, path: Path, history: dict[str, Any]) -> None:
        """Write a Hugging Face directory, which has no place for a history: the run has it. Collective."""
        del history
        weights = self.model.weights()
        config = self.model.config

        def write() -> None:
            try:
                if backend.rank() == 0:
                    write_hf(path, config, weights, self.source.directory)
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
        """The zeros, counted."""
        return {"zeros": self.zeros.check(when)} if self.zeros is not None else {}
