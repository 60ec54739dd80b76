"""The `prune` verb: a Megatron checkpoint and a method in, a run folder with a decision out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.apply.decision import MaskInfo, Masks, MaskWriter, check_mask, prunable_shapes
from megatron_prune.apply.run_folder import RunDescription, decision_of, read_run, write_run
from megatron_prune.config import PruneConfig, Training
from megatron_prune.data.calibration import CalibrationSet, windows
from megatron_prune.data.text import load_tokenizer
from megatron_prune.data.training import Windows, held_out_windows, training_windows
from megatron_prune.errors import UserError
from megatron_prune.files import from_leader, new_folder, refuse_existing
from megatron_prune.log import MetricsLog, progress, say, write_environment
from megatron_prune.methods.base import PruningMethod, get_method, methods
from megatron_prune.methods.fit import check_shards, check_target
from megatron_prune.methods.target import Target, parse_target
from megatron_prune.model.checkpoint import save_model
from megatron_prune.model.families import ModelConfig, get_family
from megatron_prune.model.forward import sequence_parts
from megatron_prune.model.import_hf import layout_of, packed_masks
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.model.source import ModelSource, open_model
from megatron_prune.options import save_yaml
from megatron_prune.statistics.runner import Runner
from megatron_prune.training.learning import LearningRunner
from megatron_prune.training.loop import check_interleaving
from megatron_prune.training.stopping import Stopped, StopRequest

RECOMPUTE: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
"""Megatron-core's settings for recomputing every layer in the backward pass."""


def run(config: PruneConfig) -> None:
    """Prune `config.input` into the run folder `config.output`."""
    stop = StopRequest(config.training.time_limit)
    method, target = get_method(config.method, **config.method_options), parse_target(config.target)
    method.accept(target)
    source = open_model(config.input)
    check_target(source.config, target)
    may_go_on = config.resume or config.restartable or backend.restarted()
    if not may_go_on:
        refuse_existing(config.output)
    layout = layout_of(config.parallelism)
    with backend.running(layout, config.training.seed, config.parallelism.distributed_timeout_minutes):
        if may_go_on and not config.resume:
            config = replace(config, resume=_goes_on(config))
        if config.resume and _finished_by_this_launch(config):
            say(f"{config.output} was finished when a process was lost")
        elif method.learned:
            _learn(config, source, method, target, layout, stop)
        else:
            _one_shot(config, source, method, target, layout)


def _goes_on(config: PruneConfig) -> bool:
    """Whether the output holds the run that this process is to continue. Collective.

    Rank 0 looks: a shared file system shows a new folder on some nodes later. Without --restartable only the run of
    the launch that restarted this process will do, any other output is refused.
    """
    exists, own = from_leader((config.output.exists(), config.restartable or _of_this_launch(config.output)))
    if exists and not own:
        refuse_existing(config.output)
    return exists


def _of_this_launch(folder: Path) -> bool:
    """Whether a run was written by the launcher that started this process; jobs of other days may share its name."""
    file = folder / "run.json"
    if not file.exists() or file.stat().st_mtime < psutil.Process(os.getppid()).create_time():
        return False
    return read_run(folder).launch == backend.launch()


def _finished_by_this_launch(config: PruneConfig) -> bool:
    """Whether the run that processes were restarted for is complete. Collective.

    Rank 0 looks, and says whether it was restarted: on a node that is new to the job processes are started first.
    """
    own = backend.restarted() and _of_this_launch(config.output)
    finished = from_leader(own and read_run(config.output).state == "decided")
    if finished:
        _check_same(config)
    return finished


def _calibration(config: PruneConfig, source: ModelSource) -> CalibrationSet:
    c = config.calibration
    if not c.text:
        raise UserError(
            f"method {config.method} needs calibration text and none was given: --calibration FILE.jsonl (or .txt)"
        )
    length = min(c.seq_length, source.config.max_position_embeddings)
    tokenizer = load_tokenizer(source.tokenizer, source.config.vocab_size)
    return windows(c.text, tokenizer, c.samples, length, c.seed, c.document_range)


def decide(
    model: PrunableModel, method: PruningMethod, target: Target, calibration: CalibrationSet | None, folder: Path
) -> Runner:
    """Run a one-shot method and write its masks to `folder`. Collective."""
    about = calibration.info() if calibration else None
    info = mask_info(method, target, model.config, seed=calibration.seed if calibration else None, calibration=about)
    writer = MaskWriter(folder, info) if backend.rank() == 0 else None
    with progress(f"{method.name} {target}", model.config.num_layers, "layers") as advance:
        runner = Runner(model, calibration.tokens if calibration else None, writer, advance)
        method.prune(model, runner, target)
    if writer is not None:
        writer.close()
    return runner


def mask_info(method: PruningMethod, target: Target, config: ModelConfig, **more: Any) -> MaskInfo:
    """What a decision says about where it comes from."""
    return MaskInfo(method.name, str(target), method.options(), config.family, config.fingerprint(), **more)


def _one_shot(
    config: PruneConfig, source: ModelSource, method: PruningMethod, target: Target, layout: backend.Layout
) -> None:
    model = source.load(layout)
    calibration = _calibration(config, source) if method.calibrated else None
    with new_folder(config.output) as folder:
        runner = decide(model, method, target, calibration, folder / "decision")
        if runner.weights_changed:
            _save_weights(source, model, folder / "weights", method)
        if backend.rank() == 0:
            _describe(folder, config, "decided")
    _say(config, runner.kept, runner.size)


def _describe(folder: Path, config: PruneConfig, state: str) -> None:
    launch = backend.launch()
    write_run(folder, RunDescription(str(config.input.resolve()), config.method, str(config.target), state, launch))
    if not (folder / "config.yaml").exists():
        save_yaml(config, folder / "config.yaml")
        write_environment(folder)


def _say(config: PruneConfig, kept: int, size: int) -> None:
    if backend.rank() == 0:
        print(f"{config.method} {config.target}: {kept} of {size} weights kept ({kept / size:.4f}), in {config.output}")


def _learn(
    config: PruneConfig,
    source: ModelSource,
    method: PruningMethod,
    target: Target,
    layout: backend.Layout,
    stop: StopRequest,
) -> None:
    folder = config.output
    prior = _given_prior(config, source.config, target)
    if config.initial_logits and not (config.initial_logits / "checkpoints").is_dir():
        raise UserError(
            f"--initial-logits {config.initial_logits} has no checkpoints; give a run of a method that learns, or "
            "its mask with --prior"
        )
    if config.resume:
        _check_resume(config)
        _forget_unfinished_decision(folder)
    t = config.training
    if not t.data:
        raise UserError(f"method {method.name} learns from text and none was given: --data FILE.jsonl (or .txt)")
    check_learning(t, layout)
    source.config.check_length(t.seq_length)
    check_shards(source.config, target, layout.tensor)
    model = source.load(layout, **(RECOMPUTE if t.recompute else {}))
    tokenizer = load_tokenizer(source.tokenizer, model.config.vocab_size)
    data = training_windows(t, tokenizer, model.config.vocab_size)
    held_out = held_out_windows(t, tokenizer, model.config.vocab_size)
    if not config.resume:
        with new_folder(folder) as new:
            if backend.rank() == 0:
                _describe(new, config, "learning")
    else:
        _note_resumption(config, folder)
    info = mask_info(method, target, model.config, seed=t.seed, notes={"data": data.info()})
    runner = LearningRunner(
        model,
        t,
        data,
        folder,
        writer=lambda: MaskWriter(folder / "decision", info) if backend.rank() == 0 else None,
        log=MetricsLog(folder),
        prior=prior or _made_prior(config, source, model, target, folder),
        initial_logits=config.initial_logits,
        eval_windows=_windows(held_out, t.eval_windows),
        resume=config.resume,
        stop=stop,
        identity={"data": data.info(), "method_options": method.options()},
    )
    try:
        kept, size = method.prune(model, runner, target)
    except Stopped as stopped:
        say(f"{stopped}; go on with --resume")
        return
    if runner.weights_trained:
        _save_weights(source, model, folder / "weights", method)
    if backend.rank() == 0:
        _describe(folder, config, "decided")
    _say(config, kept, size)


def _save_weights(source: ModelSource, model: PrunableModel, path: Path, method: PruningMethod) -> None:
    """Write the model whose weights a method changed. Collective."""
    save_model(path, model, {**source.history, "weights": method.name}, source.tokenizer_files)


def _forget_unfinished_decision(folder: Path) -> None:
    """A run that died while it wrote its decision writes it again: it follows from the last checkpoint."""
    if backend.rank() == 0:
        for name in ("decision", "weights"):
            shutil.rmtree(folder / name, ignore_errors=True)
    dist.barrier()


def check_learning(training: Training, layout: backend.Layout) -> None:
    """Refuse what cannot be trained, before anything is loaded."""
    parts = sequence_parts(layout)
    if training.seq_length % parts:
        raise UserError(
            f"--seq-length {training.seq_length} was given; with this layout it must be a multiple of {parts} "
            "(2 x --context-parallel-size above 1, times --tensor-model-parallel-size with --sequence-parallel)"
        )
    check_interleaving(layout, training.num_microbatches(layout.data))


def _windows(held_out: Windows | None, count: int) -> Tensor | None:
    """The first `count` held-out windows `[n, seq_length]`, fewer when the text has fewer."""
    if held_out is None:
        return None
    count = min(count, held_out.num_windows)
    return torch.stack([held_out.sample(i)[:-1] for i in range(count)])


def _note_resumption(config: PruneConfig, folder: Path) -> None:
    """Keep what a run is resumed with: the learning rate, say, may differ from what it was begun with."""
    if backend.rank() == 0:
        number = len(list(folder.glob("config.resumed.*.yaml"))) + 1
        save_yaml(config, folder / f"config.resumed.{number}.yaml")


def _check_same(config: PruneConfig) -> None:
    """UserError when the output holds another run than the one asked for."""
    found = read_run(config.output)
    given = (str(config.input.resolve()), config.method, str(config.target))
    if (found.input, found.method, found.target) != given:
        raise UserError(
            f"--resume: {config.output} is a {found.method} {found.target} run of {found.input}; "
            f"{config.method} {config.target} of {config.input} was given: give the same, or a new --output"
        )


def _check_resume(config: PruneConfig) -> None:
    """The run that is resumed must be the same one, unfinished."""
    _check_same(config)
    if read_run(config.output).state == "decided":
        raise UserError(f"--resume: the run {config.output} is finished; trim or evaluate it, or give a new --output")


def _given_prior(config: PruneConfig, model: ModelConfig, target: Target) -> Callable[[str], Tensor] | None:
    """The mask that learning starts from, by Hugging Face weight name; any mask will do, one off the target is told.

    None without one, and when a method is named, which makes it later.
    """
    if config.prior is None or config.prior in _one_shot_methods():
        return None
    path = Path(config.prior)
    if path.suffix == ".npz":
        masks = packed_masks(path, model)
    elif path.is_dir():
        found = Masks.load(decision_of(path))
        found.check_model(model)
        masks = found.get
    else:
        raise UserError(
            f"--prior {config.prior} is neither a run, a decision folder, a mask .npz nor a method "
            f"({', '.join(_one_shot_methods())})"
        )
    name = next(iter(prunable_shapes(model)))
    try:
        check_mask(get_family(model.family).as_rows(masks(name)), target, name)
    except UserError as error:
        say(f"--prior {config.prior} is no {target} mask: {error}; each group starts from the pattern closest to it")
    return masks


def _one_shot_methods() -> list[str]:
    return sorted(info.name for info in methods() if not get_method(info.name).learned)


def _made_prior(
    config: PruneConfig, source: ModelSource, model: PrunableModel, target: Target, folder: Path
) -> Callable[[str], Tensor] | None:
    """The mask of the one-shot method that `--prior` names, made in `folder` unless it is there. Collective."""
    if config.prior is None:
        return None
    path = folder / "prior"
    if not path.exists():
        method = get_method(config.prior)
        method = get_method(config.prior, **method.mask_only)
        calibration = _calibration(config, source) if method.calibrated else None
        decide(model, method, target, calibration, path)
    dist.barrier()  # the folder is complete when rank 0 arrives
    return Masks.load(path).get
