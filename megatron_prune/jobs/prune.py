"""A model and a method in, a run folder with a decision out: one driver for all methods."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch.distributed as dist

from megatron_prune.config import PruneConfig
from megatron_prune.decision.masks import Kept
from megatron_prune.decision.pruned import open_source
from megatron_prune.decision.resume import (
    begun,
    check_resume,
    describe,
    finished_by_this_launch,
    goes_on,
    may_go_on,
)
from megatron_prune.decision.run_folder import RunDescription, read_run, target_of, trained_model
from megatron_prune.decision.source import ModelSource, open_model, tell_left
from megatron_prune.decision.target import (
    LATENCY,
    NM,
    Budget,
    StructuredTarget,
    Target,
    Unstructured,
    parse_any_target,
    title,
)
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.exporting.preflight import check_export, check_result
from megatron_prune.files import new_folder
from megatron_prune.jobs.given import check_given
from megatron_prune.jobs.teacher import check_taught
from megatron_prune.methods.base import DATA, PruningMethod, get_method
from megatron_prune.methods.fit import check_experts, check_shards, check_target
from megatron_prune.model.checkpoint import compute_dtype
from megatron_prune.model.cost import parameters
from megatron_prune.model.layout import layout_of
from megatron_prune.model.length import fitting
from megatron_prune.ranks import by_leader, from_leader
from megatron_prune.training.stopping import Stopped, StopRequest
from megatron_prune.workbench import ALL_PRUNED, DECISION, WEIGHTS, Workbench


def prune(config: PruneConfig) -> str:
    """Prune `config.input` into the run folder `config.output`; a line on what came of it. By all processes."""
    stop = StopRequest(config.training.time_limit)
    method, target = get_method(config.method, **config.method_options), parse_any_target(config.target)
    method.accept(target)
    check_given(config, method)
    _check_logits(config)
    config = replace(config, input=trained_model(config.input))
    source = open_model(config.input)
    if DATA in method.needs:
        config = replace(config, training=fitting(config.training, source.config))
    target = _with_table(config, target)
    check_experts(source.config, method, target)
    check_target(source.config, target)
    check_export(source.config)
    check_result(source.config, target)
    compute_dtype(source.config.dtype)
    tell_left(source)
    method.check(source.config, target)
    going_on = may_go_on(config)
    layout = layout_of(config.parallelism)
    if config.losses.teacher:
        check_taught(config, source, open_source(config.losses.teacher))
    with (
        backend.deterministic(config.training.deterministic),
        backend.running(layout, config.training.seed, config.parallelism.distributed_timeout_minutes),
    ):
        if going_on:
            config = replace(config, resume=goes_on(config))
        if config.resume and finished_by_this_launch(config.output, _about(config)):
            return f"{config.output} was finished when a process was lost"
        work = Workbench(config, source, layout, method, target, stop)
        with _run_folder(config, work):
            try:
                with work:
                    work.choose()
                    if method.resumable:
                        by_leader(lambda: _note_choice(config, work))
                    decision = work.decide()
                    work.save(decision)
            except Stopped as stopped:  # no failure: what there is of the run stays
                return f"{stopped}; go on with --resume"
            if backend.rank() == 0:
                describe(work.folder, config, _about(config, "decided", work.target))
        return _told(config, source, decision)


@contextlib.contextmanager
def _run_folder(config: PruneConfig, work: Workbench) -> Iterator[None]:
    """Where the method works: a folder that appears when all is in it, or one that may be gone on with."""
    if not work.method.resumable:
        work.prepare()
        with new_folder(config.output) as work.folder:
            yield
        return
    if config.resume:
        check_resume(config.output, _about(config))
        work.target = from_leader(_chosen(config.output)) or work.target
        _forget_unfinished_decision(config.output)
    check_shards(work.config, work.target, work.layout.tensor, work.layout.expert_tensor)
    work.prepare()
    with begun(config, _about(config, _state(work.method), work.target)):
        yield


def _chosen(run: Path) -> Target | StructuredTarget | None:
    """The target of a run that has chosen which weights stay dense."""
    return target_of(run) if read_run(run).asked else None


def _note_choice(config: PruneConfig, work: Workbench) -> None:
    """Write down what stays dense as soon as it is known: a run that goes on takes that, whatever else it is given."""
    about = _about(config, _state(work.method), work.target)
    if about.asked and not read_run(config.output).asked:
        describe(config.output, config, about)


def _state(method: PruningMethod) -> str:
    """Of a run that is under way."""
    return "learning" if DATA in method.needs else "searching"


def _with_table(config: PruneConfig, target: Target | StructuredTarget) -> Target | StructuredTarget:
    """A budget of latency with what it is counted by."""
    wanted = isinstance(target, Budget) and target.measure == LATENCY
    if wanted != (config.latency_table is not None):
        raise UserError(
            f"target {target} and --latency-table {config.latency_table} were given: {LATENCY}=N goes with "
            "--latency-table FILE, which `latency` makes, and other targets go without"
        )
    if not isinstance(target, Budget) or config.latency_table is None:
        return target
    from megatron_prune.decision.latency import LatencyTable

    return replace(target, table=LatencyTable.load(config.latency_table))


def _check_logits(config: PruneConfig) -> None:
    """UserError where transfer has nothing to start from."""
    if config.initial_logits and not (config.initial_logits / "checkpoints").is_dir():
        raise UserError(
            f"--initial-logits {config.initial_logits} has no checkpoints; give a run of a method that learns, or "
            "its mask with --prior"
        )


def _forget_unfinished_decision(folder: Path) -> None:
    """A run that died while it wrote its decision writes it again: it follows from the last checkpoint."""
    if backend.rank() == 0:
        for name in (DECISION, WEIGHTS, ALL_PRUNED):
            shutil.rmtree(folder / name, ignore_errors=True)
    dist.barrier()


def _about(config: PruneConfig, state: str = "", target: Target | StructuredTarget | None = None) -> RunDescription:
    """What a run says of itself. `target`: what it has made of the one that was given, so far."""
    about = RunDescription(str(config.input.resolve()), config.method, str(config.target), state)
    if not isinstance(target, NM | Unstructured) or not target.dense:
        return about
    asked = parse_any_target(config.target)
    chosen = isinstance(asked, NM | Unstructured) and asked.dense_share
    return replace(about, target=str(target), asked=about.target) if chosen else about


def _told(config: PruneConfig, source: ModelSource, decision: Kept | Units) -> str:
    if isinstance(decision, Kept):
        kept, size = decision
        asked = title(str(config.target))
        return f"{config.method} {asked}: {kept} of {size} weights kept ({kept / size:.4f}), in {config.output}"
    before, after = parameters(source.config), parameters(decision.config(source.config))
    asked = str(parse_any_target(config.target))
    return f"{config.method} {asked}: {after} of {before} parameters stay ({after / before:.4f}), in {config.output}"
