"""A model in, the same model with better weights out; what was pruned stays zero.

Recovery after pruning, distillation from the unpruned model, LoRA and continued pretraining are this one verb, by the
weights of the losses. The run folder is that of a pruning run without a decision; its `weights` are the result. The
model is megatron-core's, or with `--engine fsdp` transformers' (`fsdp/recover.py`).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch.distributed as dist

from megatron_prune.config import TrainConfig
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.data.training import first_windows, held_out_windows, training_windows
from megatron_prune.decision.pruned import open_source
from megatron_prune.decision.resume import begun, check_resume, describe, finished_by_this_launch, goes_on, may_go_on
from megatron_prune.decision.run_folder import TRAINED, RunDescription
from megatron_prune.decision.source import ModelSource, tell_left
from megatron_prune.errors import UserError
from megatron_prune.exporting.preflight import check_export
from megatron_prune.jobs.teacher import check_taught
from megatron_prune.log import MetricsLog
from megatron_prune.model.checkpoint import save_model
from megatron_prune.model.layout import layout_of
from megatron_prune.model.length import fitting
from megatron_prune.options import flatten
from megatron_prune.training.loop import check_learning, model_options
from megatron_prune.training.lora import Adapters, linear_kinds
from megatron_prune.training.recovery import RecoveryRunner
from megatron_prune.training.stopping import Stopped, StopRequest
from megatron_prune.training.weighting import Weighting, settled


def train(config: TrainConfig) -> str:
    """Train `config.input` into the run folder `config.output`; a line on what came of it. By all processes."""
    stop = StopRequest(config.training.time_limit)
    source = open_source(config.input)
    teacher = open_source(config.losses.teacher) if config.losses.teacher else None
    layout = layout_of(config.parallelism)
    config = replace(config, training=fitting(config.training, source.config))
    check(config, source, teacher)
    tell_left(source)
    going_on = may_go_on(config)
    with (
        backend.deterministic(config.training.deterministic),
        backend.running(layout, config.training.seed, config.parallelism.distributed_timeout_minutes),
    ):
        if going_on:
            config = replace(config, resume=goes_on(config))
        if config.resume and finished_by_this_launch(config.output, _about(config, source)):
            return f"{config.output} was finished when a process was lost"
        check_learning(config.training, layout, source.config)
        return _train(config, source, teacher, layout, stop)


def check(config: TrainConfig, source: ModelSource, teacher: ModelSource | None) -> None:
    """Refuse what cannot be trained, before anything is loaded."""
    t = config.training
    if not t.data:
        raise UserError("train learns from text and none was given: --data FILE.jsonl (or .txt)")
    source.config.check_length(t.seq_length)
    check_export(source.config)
    if config.engine == "fsdp":
        from megatron_prune.fsdp.recover import check_sources

        check_sources(config, source, teacher)
    if config.lora.rank:
        linear_kinds(source.config, config.lora.targets)
    if teacher is not None:
        check_taught(config, source, teacher)


def _about(config: TrainConfig, source: ModelSource, state: str = "") -> RunDescription:
    target = source.history.get("target") if config.keep_zeros else None
    return RunDescription(str(config.input.resolve()), "train", target, state)


def _train(
    config: TrainConfig, source: ModelSource, teacher: ModelSource | None, layout: backend.Layout, stop: StopRequest
) -> str:
    folder, t = config.output, config.training
    if config.resume:
        check_resume(folder, _about(config, source))
        _forget_unfinished_weights(folder)
    tokenizer = load_tokenizer(source.tokenizer, source.config.vocab_size, chat=config.apply_chat_template)
    data = training_windows(t, tokenizer, source.config.vocab_size)
    held_out = held_out_windows(t, tokenizer, source.config.vocab_size)
    engine = _engine(config, source, teacher, layout)
    with begun(config, _about(config, source, "training")):
        try:
            zeros = engine.recover(
                Weighting.of(config.losses),
                data=data,
                folder=folder,
                log=MetricsLog(folder),
                eval_windows=first_windows(held_out, t.eval_windows),
                resume=config.resume,
                stop=stop,
                identity={"data": data.info(), **_settings(config)},
            )
        except Stopped as stopped:
            return f"{stopped}; go on with --resume"
        engine.save(folder / "weights", _history(config, source))
        if backend.rank() == 0:
            describe(folder, config, _about(config, source, TRAINED))
    kept = "zeros were not kept" if zeros is None else f"{zeros} weights stayed zero" if zeros else "no weight was zero"
    return f"trained {t.train_iters} steps, {kept}: {folder / 'weights'}"


class Engine(Protocol):
    """A model, and its teacher, loaded to be trained."""

    def recover(self, weighting: Weighting, **session: Any) -> int | None:
        """Train in a `TrainingSession` with these settings; the number of kept zeros, None when they are not kept.

        Collective; raises Stopped.
        """

    def save(self, path: Path, history: dict[str, Any]) -> None:
        """Write the trained weights. Collective."""


def _engine(config: TrainConfig, source: ModelSource, teacher: ModelSource | None, layout: backend.Layout) -> Engine:
    if config.engine == "megatron":
        return MegatronEngine(config, source, teacher, layout)
    from megatron_prune.fsdp.recover import FsdpEngine

    return FsdpEngine(config, source, teacher)


class MegatronEngine:
    """megatron-core's model in a layout."""

    def __init__(
        self, config: TrainConfig, source: ModelSource, teacher: ModelSource | None, layout: backend.Layout
    ) -> None:
        """Collective."""
        self.config = config
        self.source = source
        self.model = source.load(layout, **model_options(config.training))
        self.teacher = teacher.load(layout, config.losses.teacher_dtype) if teacher else None

    def recover(self, weighting: Weighting, **session: Any) -> int | None:
        """As `Engine` says."""
        config = self.config
        runner = RecoveryRunner(self.model, config.training, **session)
        return runner.recover(weighting, self.teacher, _adapters(config), config.lora.targets, config.keep_zeros)

    def save(self, path: Path, history: dict[str, Any]) -> None:
        """As `Engine` says: a checkpoint."""
        save_model(path, self.model, history, self.source.tokenizer)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What a resumed run must share with the one that wrote its checkpoint."""
    return {**settled(config.losses), **flatten(config.lora), "engine": config.engine, "keep_zeros": config.keep_zeros}


def _adapters(config: TrainConfig) -> Adapters | None:
    x = config.lora
    return Adapters(x.rank, x.alpha, x.dropout, config.training.seed, config.keep_zeros) if x.rank else None


def _history(config: TrainConfig, source: ModelSource) -> dict[str, Any]:
    """What was done to the weights; a pattern that was not kept is not theirs any more."""
    before = source.history if config.keep_zeros else {**source.history, "target": None}
    t = config.training
    steps = f"{t.train_iters} steps of {t.global_batch_size * t.seq_length} tokens"
    teacher = f", teacher {config.losses.teacher}" if config.losses.teacher else ""
    adapters = f", LoRA of rank {config.lora.rank}" if config.lora.rank else ""
    return {**before, "train": f"{steps}{teacher}{adapters}"}


def _forget_unfinished_weights(folder: Path) -> None:
    """A run that died while it wrote its weights writes them again: they follow from the last checkpoint."""
    if backend.rank() == 0:
        shutil.rmtree(folder / "weights", ignore_errors=True)
    dist.barrier()
