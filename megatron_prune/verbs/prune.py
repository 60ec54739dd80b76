"""The `prune` verb: a Megatron checkpoint and a method in, a run folder with a decision out."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch.distributed as dist
from torch import Tensor

from megatron_prune.config import PruneConfig, Training
from megatron_prune.data.calibration import CalibrationSet, windows
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.data.training import Windows, first_windows, held_out_windows, training_windows
from megatron_prune.decision.masks import MaskInfo, Masks, MaskWriter, check_mask, prunable_shapes
from megatron_prune.decision.resume import begun, check_resume, describe, finished_by_this_launch, goes_on, may_go_on
from megatron_prune.decision.run_folder import RunDescription, decision_of
from megatron_prune.decision.source import ModelSource, open_model, packed_masks, tell_left
from megatron_prune.decision.target import LATENCY, Budget, Shape, StructuredTarget, Target, parse_any_target
from megatron_prune.decision.trimming import Trim
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.exporting.preflight import check_export, check_result
from megatron_prune.files import from_leader, new_folder
from megatron_prune.log import MetricsLog, progress, say
from megatron_prune.methods.base import PruningMethod, get_method, methods
from megatron_prune.methods.fit import check_shards, check_target
from megatron_prune.methods.structured import StructuredMethod
from megatron_prune.model.checkpoint import compute_dtype, save_model
from megatron_prune.model.cost import parameters
from megatron_prune.model.families import ModelConfig, get_family
from megatron_prune.model.layout import layout_of
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.options import flag, flatten
from megatron_prune.statistics.passes import Passes
from megatron_prune.statistics.runner import Runner
from megatron_prune.statistics.store import StatisticsStore
from megatron_prune.training.learning import LearningRunner
from megatron_prune.training.loop import RECOMPUTE, check_learning
from megatron_prune.training.shearing import ShearingRunner
from megatron_prune.training.stopping import Stopped, StopRequest


def run(config: PruneConfig) -> None:
    """Prune `config.input` into the run folder `config.output`."""
    stop = StopRequest(config.training.time_limit)
    method, target = get_method(config.method, **config.method_options), parse_any_target(config.target)
    method.accept(target)
    source = open_model(config.input)
    target = _with_table(config, target)
    check_target(source.config, target)
    check_export(source.config)
    check_result(source.config, target)
    compute_dtype(source.config.dtype)
    tell_left(source)
    if config.statistics and not (isinstance(method, StructuredMethod) and method.keeps_statistics):
        raise UserError(
            f"--statistics was given and method {method.name} keeps none; allowed: shortgpt, minitron, flap"
        )
    going_on = may_go_on(config)
    layout = layout_of(config.parallelism)
    with backend.running(layout, config.training.seed, config.parallelism.distributed_timeout_minutes):
        if going_on:
            config = replace(config, resume=goes_on(config))
        if config.resume and finished_by_this_launch(config.output, _about(config)):
            say(f"{config.output} was finished when a process was lost")
        elif isinstance(method, StructuredMethod):
            assert isinstance(target, (Shape, Budget))
            if method.learned:
                _sheared(config, source, method, target, layout, stop)
            elif method.searches:
                _searched(config, source, method, target, layout, stop)
            else:
                _structured(config, source, method, target, layout)
        elif isinstance(target, (Shape, Budget)):
            raise AssertionError(f"{method.name} accepted {target}")
        elif method.learned:
            _learn(config, source, method, target, layout, stop)
        else:
            _one_shot(config, source, method, target, layout)


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
    info = mask_info(method, target, model.config, **_origin(calibration))
    writer = MaskWriter(folder, info) if backend.rank() == 0 else None
    with (
        writer or contextlib.nullcontext(),
        progress(f"{method.name} {target}", model.config.num_layers, "layers") as advance,
    ):
        runner = Runner(model, calibration.tokens if calibration else None, writer, advance)
        method.prune(model, runner, target)
    return runner


def mask_info(method: PruningMethod, target: Target | StructuredTarget, config: ModelConfig, **more: Any) -> MaskInfo:
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
            describe(folder, config, _about(config, "decided"))
    _say(config, runner.kept, runner.size)


def _structured(
    config: PruneConfig,
    source: ModelSource,
    method: StructuredMethod,
    target: StructuredTarget,
    layout: backend.Layout,
) -> None:
    """Choose units, correct the weights for those that go, and write both."""
    model = source.load(layout)
    calibration = _calibration(config, source) if method.calibrated else None
    tokens = calibration.tokens if calibration else None
    with new_folder(config.output) as folder, _store(config, model, tokens) as store:
        with progress(f"{method.name} {target}", None, "layers passed") as advance:
            units = from_leader(method.choose(model.config, Passes(model, tokens, advance, store), target))
        with progress("compensation", model.config.num_layers, "layers") as advance:
            changed = method.compensate(model, units, tokens, advance)
        if changed:
            _save_weights(source, model, folder / "weights", method)
        info = mask_info(method, target, model.config, **_origin(calibration))
        _save_units(config, folder, model.config, info, units)
    _say_units(config, model.config, units)


@contextlib.contextmanager
def _store(config: PruneConfig, model: PrunableModel, tokens: Tensor | None) -> Iterator[StatisticsStore | None]:
    """The statistics that `--statistics` names, where a method measures some; no empty ones after a failure."""
    store = StatisticsStore(config.statistics, model, tokens) if config.statistics and tokens is not None else None
    try:
        yield store
    except Exception:
        if store is not None:
            store.forget()
        raise


def _searched(
    config: PruneConfig,
    source: ModelSource,
    method: StructuredMethod,
    target: StructuredTarget,
    layout: backend.Layout,
    stop: StopRequest,
) -> None:
    """As `_structured`, for a method that works in the run folder and may be resumed."""
    _refuse_training(config)
    folder = config.output
    _reopen(config)
    calibration = _calibration(config, source)
    model = source.load(layout)
    with begun(config, _about(config, "searching")):
        try:
            units = method.run(model, Passes(model, calibration.tokens), target, folder, stop)
        except Stopped as stopped:
            say(f"{stopped}; go on with --resume")
            return
        _save_weights(source, model, folder / "weights", method)
        info = mask_info(method, target, model.config, **_origin(calibration))
        _save_units(config, folder, model.config, info, units)
    _say_units(config, model.config, units)


def _refuse_training(config: PruneConfig) -> None:
    """UserError for options of training in a search, which has its own for the steps that it takes."""
    found, usual = flatten(config.training), flatten(Training())
    given = [flag(key) for key, value in found.items() if value != usual[key] and key not in ("seed", "time_limit")]
    if given:
        raise UserError(
            f"{', '.join(given)} was given and method {config.method} has no use for it: leave it out, or see "
            f"`prune --method {config.method} --help` for the method's own options"
        )


def _refuse_unused(config: PruneConfig) -> None:
    """UserError for options of other methods that would have no effect."""
    options = {
        "--prior": config.prior,
        "--initial-logits": config.initial_logits,
        "--calibration": config.calibration.text,
    }
    given = [flag for flag, value in options.items() if value]
    if given:
        raise UserError(f"{', '.join(given)} was given and method {config.method} has no use for it: leave it out")


def _sheared(
    config: PruneConfig,
    source: ModelSource,
    method: StructuredMethod,
    target: StructuredTarget,
    layout: backend.Layout,
    stop: StopRequest,
) -> None:
    """As `_searched`, for a method that trains the weights, too."""
    _refuse_unused(config)
    method.check(source.config, target)
    folder, t = config.output, config.training
    _reopen(config)
    inputs = _training_inputs(config, source, method, layout)
    model = source.load(layout, **(RECOMPUTE if t.recompute else {}))
    with begun(config, _about(config, "learning")):
        runner = ShearingRunner(
            model,
            t,
            inputs.data,
            folder,
            log=MetricsLog(folder),
            eval_windows=inputs.held_out,
            resume=config.resume,
            stop=stop,
            identity={"data": inputs.data.info(), "method_options": method.options(), "target": str(target)},
        )
        try:
            units = method.train(runner, target)
        except Stopped as stopped:
            say(f"{stopped}; go on with --resume")
            return
        _save_weights(source, model, folder / "weights", method)
        info = mask_info(method, target, model.config, seed=t.seed, notes={"data": inputs.data.info()})
        _save_units(config, folder, model.config, info, units)
    _say_units(config, model.config, units)


def _save_units(config: PruneConfig, folder: Path, whole: ModelConfig, info: MaskInfo, units: Units) -> None:
    """Write which units stay; the run is decided then."""
    if backend.rank() == 0:
        Trim(info, units).save(folder / "decision", whole)
        describe(folder, config, _about(config, "decided"))


def _say_units(config: PruneConfig, whole: ModelConfig, units: Units) -> None:
    before, after = parameters(whole), parameters(units.config(whole))
    asked = parse_any_target(config.target)
    say(f"{config.method} {asked}: {after} of {before} parameters stay ({after / before:.4f}), in {config.output}")


def _reopen(config: PruneConfig) -> None:
    """With --resume: the run in the output folder must be this one, and loses a decision that it did not finish."""
    if config.resume:
        check_resume(config.output, _about(config))
        _forget_unfinished_decision(config.output)


class TrainingInputs(NamedTuple):
    """What a method that learns reads."""

    data: Windows
    held_out: Tensor | None


def _training_inputs(
    config: PruneConfig, source: ModelSource, method: PruningMethod, layout: backend.Layout
) -> TrainingInputs:
    """Training windows and held-out ones `[n, seq_length]`; UserError when the model or layout cannot. Collective."""
    t, vocab_size = config.training, source.config.vocab_size
    if not t.data:
        raise UserError(f"method {method.name} learns from text and none was given: --data FILE.jsonl (or .txt)")
    check_learning(t, layout)
    source.config.check_length(t.seq_length)
    tokenizer = load_tokenizer(source.tokenizer, vocab_size)
    held_out = held_out_windows(t, tokenizer, vocab_size)
    return TrainingInputs(training_windows(t, tokenizer, vocab_size), first_windows(held_out, t.eval_windows))


def _origin(calibration: CalibrationSet | None) -> dict[str, Any]:
    """What a decision says about the text it was made with."""
    return {"seed": calibration.seed, "calibration": calibration.info()} if calibration else {}


def _about(config: PruneConfig, state: str = "") -> RunDescription:
    return RunDescription(str(config.input.resolve()), config.method, str(config.target), state)


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
    _reopen(config)
    t = config.training
    check_shards(source.config, target, layout.tensor)
    inputs = _training_inputs(config, source, method, layout)
    data = inputs.data
    model = source.load(layout, **(RECOMPUTE if t.recompute else {}))
    with begun(config, _about(config, "learning")):
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
            eval_windows=inputs.held_out,
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
            describe(folder, config, _about(config, "decided"))
    _say(config, kept, size)


def _save_weights(source: ModelSource, model: PrunableModel, path: Path, method: PruningMethod) -> None:
    """Write the model whose weights a method changed. Collective."""
    save_model(path, model, {**source.history, "weights": method.name}, source.tokenizer)


def _forget_unfinished_decision(folder: Path) -> None:
    """A run that died while it wrote its decision writes it again: it follows from the last checkpoint."""
    if backend.rank() == 0:
        for name in ("decision", "weights"):
            shutil.rmtree(folder / name, ignore_errors=True)
    dist.barrier()


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
    return sorted(info.name for info in methods() if get_method(info.name).makes_masks)


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
