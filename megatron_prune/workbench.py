"""What a pruning method may pull (`methods.base.Workbench`), made when it is pulled; what its answer becomes on disk.

What is missing is refused before weights are loaded: `prepare` reads what the method needs, then the model.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch.distributed as dist
from torch import Tensor

from megatron_prune.config import PruneConfig
from megatron_prune.data.calibration import CalibrationSet, windows
from megatron_prune.data.named import named_files
from megatron_prune.data.tokenizer import form_of, load_tokenizer
from megatron_prune.data.training import Windows, first_windows, held_out_windows, training_windows
from megatron_prune.decision.masks import Kept, MaskInfo, Masks, MaskWriter, prunable_shapes
from megatron_prune.decision.prior import MaskSource, given_prior
from megatron_prune.decision.pruned import open_source
from megatron_prune.decision.run_folder import decision_of, target_of
from megatron_prune.decision.source import ModelSource
from megatron_prune.decision.target import NM, StructuredTarget, Target, Unstructured, title
from megatron_prune.decision.trimming import Trim
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.log import MetricsLog, progress, say
from megatron_prune.methods.base import CALIBRATION, DATA, PRIOR, PruningMethod, get_method, looks_at_text, mask_methods
from megatron_prune.methods.fit import dense_room
from megatron_prune.model.checkpoint import save_model
from megatron_prune.model.length import readable
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Calibration
from megatron_prune.options import given
from megatron_prune.ranks import by_leader, from_leader
from megatron_prune.search.integer import best_worth
from megatron_prune.statistics.compensation import Compensation
from megatron_prune.statistics.experts import ExpertActivity
from megatron_prune.statistics.merging import Merging
from megatron_prune.statistics.passes import Passes
from megatron_prune.statistics.restoring import Halfway, costs
from megatron_prune.statistics.runner import Runner, WholeLinear
from megatron_prune.statistics.store import StatisticsStore
from megatron_prune.training.learning import LearningRunner
from megatron_prune.training.loop import check_learning, model_options
from megatron_prune.training.shearing import ShearingRunner
from megatron_prune.training.stopping import StopRequest
from megatron_prune.training.weighting import Weighting, settled, teaches_itself

DECISION, WEIGHTS, MADE_PRIOR = "decision", "weights", "prior"
"""Folders in a run."""
ALL_PRUNED = "all_pruned"
"""Another, while weights are chosen that stay dense."""
CHOICE_TOKENS = 8192
"""Of the first calibration windows, and of at least one, show what pruning costs."""


def calibration_windows(c: Calibration, source: ModelSource, asks: str, chat: bool = False) -> CalibrationSet:
    """Windows of the calibration text for a model; UserError without text. `asks`: who does, in words."""
    if not c.text:
        raise UserError(f"{asks} needs calibration text and none was given: --calibration FILE.jsonl (or .txt)")
    length = readable("calibration_seq_length", c.seq_length, source.config)
    tokenizer = load_tokenizer(source.tokenizer, source.config.vocab_size, chat=chat)
    text = named_files(c.text, c.samples, c.seed, form_of(tokenizer))
    return windows(text, tokenizer, c.samples, length, c.seed, c.document_range)


def _removed(folder: Path) -> None:
    """Remove a folder of a run's own; UserError where that cannot be."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise UserError(
            f"{folder} could not be removed ({error.strerror}); give a place that can be written"
        ) from error


class TrainingInputs(NamedTuple):
    """What a method that learns reads."""

    data: Windows
    held_out: Tensor | None


class Workbench:
    """Of one method, one target and one model, in a layout. Made and used by all ranks."""

    def __init__(
        self,
        settings: PruneConfig,
        source: ModelSource,
        layout: backend.Layout,
        method: PruningMethod,
        target: Target | StructuredTarget,
        stop: StopRequest | None = None,
    ) -> None:
        self.settings = settings
        self.source = source
        self.layout = layout
        self.method = method
        self.target = target
        self.stop = stop or StopRequest()
        self.folder = settings.output
        """Where the run is; of one that appears when it is whole, the place until then."""
        self.config = source.config
        self._runner: Runner | None = None
        self._learner: LearningRunner | None = None
        self._store: StatisticsStore | None = None
        """Of this method's measurements; an empty one does not outlive a failure."""
        self._decision: Path | None = None
        self._changed = False
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._open.close()
        if self._store is not None and kind is not None and issubclass(kind, Exception):
            self._store.forget()

    # --- what the user gave ---

    def prepare(self) -> None:
        """Read what the method needs, then the model; UserError for what was not given."""
        given_to = {CALIBRATION: lambda: self.calibration, DATA: lambda: self.inputs}
        for need in self.method.needs:
            given_to[need]()
        if PRIOR in self.method.takes:
            self._check_prior()
            self._take_dense()
            _ = self._given_prior
        _ = self.model

    def _check_prior(self) -> None:
        """UserError for a method that is to make the prior and looks at text, without one."""
        named, text = self.settings.prior, self.settings.calibration.text
        if looks_at_text(named) and not (text or self.settings.resume):
            raise UserError(
                f"--prior {named} needs calibration text and none was given: --calibration FILE.jsonl (or .txt)"
            )

    def _take_dense(self) -> None:
        """For a method that learns: where weights that stay dense are to be chosen, those that the prior leaves dense.

        UserError where none says which, and none is to be made of which the weights could be chosen.
        """
        target, named, logits = self.target, self.settings.prior, self.settings.initial_logits
        if not isinstance(target, NM) or not target.dense_share or looks_at_text(named):
            return
        found: object = None
        if named and Path(named).is_dir():
            found = Masks.load(decision_of(Path(named))).target
        elif logits:
            found = target_of(logits)
        if not isinstance(found, NM | Unstructured) or not found.dense:
            raise UserError(
                f"target {target}: a method that learns does not choose the weights that stay dense; give --prior with "
                "a one-shot method that looks at text, such as sparsegpt, or with a run that leaves weights dense, or "
                "name them"
            )
        shapes = prunable_shapes(self.config)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        held = sum(size for name, size in sizes.items() if found.leaves(name))
        if held > dense_room(target.dense_share, list(sizes.values())):
            raise UserError(
                f"target {target}: {named or logits} leaves {held / sum(sizes.values()):.2%} of the weights dense; "
                "give at least as much"
            )
        self.target = replace(target, dense=found.dense, dense_share=0.0)

    @cached_property
    def calibration(self) -> CalibrationSet:
        """Windows of the calibration text."""
        asks = f"method {self.method.name}"
        return calibration_windows(self.settings.calibration, self.source, asks, self.settings.apply_chat_template)

    @cached_property
    def inputs(self) -> TrainingInputs:
        """Training windows and held-out ones `[n, seq_length]`; UserError when the model or layout cannot."""
        t, vocab_size = self.settings.training, self.config.vocab_size
        if not t.data:
            raise UserError(
                f"method {self.method.name} learns from text and none was given: --data FILE.jsonl (or .txt)"
            )
        check_learning(t, self.layout, self.config)
        self.config.check_length(t.seq_length)
        tokenizer = load_tokenizer(self.source.tokenizer, vocab_size, chat=self.settings.apply_chat_template)
        held_out = held_out_windows(t, tokenizer, vocab_size)
        return TrainingInputs(training_windows(t, tokenizer, vocab_size), first_windows(held_out, t.eval_windows))

    @cached_property
    def _given_prior(self) -> MaskSource | None:
        """The mask that learning starts from; None without one, and when a method is named, which makes it later."""
        named = self.settings.prior
        if named is None or named in mask_methods():
            return None
        assert isinstance(self.target, NM | Unstructured)
        return given_prior(named, self.settings.input, self.config, self.target, mask_methods())

    def choose(self) -> None:
        """Choose the weights that stay dense where the target gives a share of them, for a method that learns by that
        which makes its prior. Collective.
        """
        if isinstance(self.target, NM | Unstructured) and self.target.dense_share:
            self.target = self._with_dense(self.target)

    def decide(self) -> Kept | Units:
        """What the method decides, when what stays dense is chosen. Collective."""
        self.choose()
        return self.method.decide(self, self.target)

    def _with_dense(self, target: Target) -> Target:
        """The target with the weights that stay dense: those that the loss needs most for their size when all are
        pruned by the method. The model is as it was before.
        """
        whole, path = replace(target, dense_share=0.0), self.folder / ALL_PRUNED
        method = self.method if CALIBRATION in self.method.needs else self._prior_method()
        with self._aside(method, path, whole) as aside, self.model.remembering() as before:
            aside.calibration = self.calibration
            method.decide(aside, whole)
        dist.barrier()  # the folder is complete when rank 0 arrives
        tokens = self.calibration.tokens
        tokens = tokens[: max(1, CHOICE_TOKENS // tokens.shape[1])]
        with progress(f"{self.method.name}: which weights stay dense", self.config.num_layers, "layers") as advance:
            found = costs(Halfway(self.model, before, Masks.load(path).get), tokens, advance)
        self.model.put_back(before)
        dist.barrier()  # all have read it
        by_leader(lambda: _removed(path))
        return replace(whole, dense=from_leader(self._best_dense(found, target.dense_share)))

    def _best_dense(self, costs: Mapping[str, float], share: float) -> tuple[str, ...]:
        """Names of the weights, at most that share of all, that cost most together when they are pruned."""
        shapes = prunable_shapes(self.config)
        names = [name for name in shapes if name in costs]
        sizes = [math.prod(shapes[name]) for name in names]
        chosen = best_worth([costs[name] for name in names], sizes, dense_room(share, sizes))
        if not chosen:
            raise UserError(
                f"target {self.target}: by the calibration text no weight that is so small costs anything when it is "
                "pruned; give a larger share, or name the weights"
            )
        held, total = sum(costs[names[each]] for each in chosen), sum(costs.values())
        size = sum(sizes[each] for each in chosen) / sum(sizes)
        say(
            f"{len(chosen)} of {len(names)} weights stay dense, {size:.2%} of all: {held:.3f} of the {total:.3f} nats "
            "that pruning costs, by the estimate"
        )
        return tuple(names[each] for each in chosen)

    # --- what a method pulls ---

    @cached_property
    def model(self) -> PrunableModel:
        """The model, whole, its weights as they are in the source until a method changes them."""
        options = model_options(self.settings.training) if DATA in self.method.needs else {}
        return self.source.load(self.layout, **options)

    @cached_property
    def passes(self) -> Passes:
        """Passes over the calibration text, with a bar where the method has none of its own."""
        tokens = self._tokens
        if self.method.resumable:
            return Passes(self.model, tokens)
        if self.settings.statistics and tokens is not None:
            self._store = StatisticsStore(self.settings.statistics, self.model, tokens)
        advance = self._open.enter_context(progress(self._title, None, "layers passed"))
        return Passes(self.model, tokens, advance, self._store)

    def linears(self, statistic: Callable[..., Any] | None, sequential: bool = False) -> Iterator[WholeLinear]:
        """Prunable linears in model order; each must be decided before the next is taken."""
        found = self._each_linear(statistic, sequential)
        self._open.callback(found.close)  # of a method that fails: its masks go at once
        return found

    def _each_linear(
        self, statistic: Callable[..., Any] | None, sequential: bool
    ) -> Generator[WholeLinear, None, None]:
        writer = self._writer()
        with (
            writer or contextlib.nullcontext(),
            progress(self._title, self.config.num_layers, "layers") as advance,
        ):
            self._runner = Runner(self.model, self._tokens, writer, advance, self.target)
            yield from self._runner.layerwise(statistic, sequential)

    def dense_linears(self, statistic: Callable[..., Any]) -> Iterator[WholeLinear]:
        """Prunable linears in model order while all of them stay whole; nothing is written."""
        with progress(f"{self._title}, dense", self.config.num_layers, "layers") as advance:
            yield from Runner(self.model, self._tokens, None, advance).dense(statistic)

    def masks(self) -> Kept:
        """What the pass over the linears has kept."""
        assert self._runner is not None, "no linear was decided"
        return self._runner.masks()

    def compensate(self, units: Units, refit: str, damping: float, norm_gain: bool) -> None:
        """Correct the weights of what stays for what goes. Collective."""
        tokens = self._tokens
        self._open.close()  # the bar of the passes
        with progress("compensation", self.config.num_layers, "layers") as advance:
            if tokens is not None and units.thins(self.config):
                work = Compensation(self.model, units, tokens, refit, damping, norm_gain)
                self._changed |= work.run(advance)

    def merge_experts(
        self,
        count: int,
        group_size: int,
        score: Callable[[ExpertActivity], Tensor],
        keep: Callable[[Tensor, int], tuple[int, ...]],
    ) -> Units:
        """Average the experts of every layer into `count` of them; the units that stay. Collective."""
        with progress(self._title, self.config.num_layers, "layers") as advance:
            self._changed = True
            return Merging(self.model, self._tokens, count, group_size, score, keep).run(advance)

    def learn(self) -> LearningRunner:
        """A training session for mask logits, which writes the masks that it decides on."""
        identity = {"data": self.inputs.data.info(), "method_options": self.method.options(), "losses": self._losses}
        prior = self._given_prior or self._made_prior()
        self._learner = LearningRunner(
            *self._session(),
            **self._session_options(identity),
            writer=self._writer,
            prior=prior,
            initial_logits=self.settings.initial_logits,
            weighting=Weighting.of(self.settings.losses) if self._losses else None,
            teacher=self._teacher(),
        )
        return self._learner

    @property
    def _losses(self) -> dict[str, Any] | None:
        """What is lowered, for the record; None: the next-token loss alone."""
        losses = self.settings.losses
        return settled(losses) if given(losses) else None

    def _teacher(self) -> PrunableModel | None:
        """The model to learn from. The model itself where its weights stay as they are, which then needs no copy."""
        losses = self.settings.losses
        if losses.teacher is None:
            return None
        if teaches_itself(losses, self.settings.input, self.config.dtype, self.method.weights_stay):
            return self.model
        return open_source(losses.teacher).load(self.layout, losses.teacher_dtype)

    def shear(self) -> ShearingRunner:
        """A training session for masks of units and weights together."""
        options = {"method_options": self.method.options(), "target": str(self.target)}
        return ShearingRunner(*self._session(), **self._session_options({"data": self.inputs.data.info(), **options}))

    def _session(self) -> tuple[Any, ...]:
        return self.model, self.settings.training, self.inputs.data, self.folder

    def _session_options(self, identity: dict[str, Any]) -> dict[str, Any]:
        return {
            "log": MetricsLog(self.folder),
            "eval_windows": self.inputs.held_out,
            "resume": self.settings.resume,
            "stop": self.stop,
            "identity": identity,
        }

    def _made_prior(self) -> MaskSource | None:
        """The mask of the one-shot method that `--prior` names, made in the run unless it is there. Collective."""
        if self.settings.prior is None:
            return None
        path = self.folder / MADE_PRIOR
        if not path.exists():
            method = self._prior_method()
            method.accept(self.target)
            assert isinstance(self.target, NM | Unstructured)
            with self._aside(method, path, self.target) as aside:
                method.decide(aside, self.target)
        dist.barrier()  # the folder is complete when rank 0 arrives
        return Masks.load(path).get

    def _prior_method(self) -> PruningMethod:
        """That of `--prior`, without a change of weights."""
        assert self.settings.prior is not None
        return get_method(self.settings.prior, **get_method(self.settings.prior).mask_only)

    def _aside(self, method: PruningMethod, decision: Path, target: Target) -> Workbench:
        """A workbench of a method and a target on the same model, which writes its masks to `decision`."""
        made = Workbench(self.settings, self.source, self.layout, method, target)
        made.model, made._decision = self.model, decision
        return made

    # --- what becomes of the answer ---

    @property
    def decision(self) -> Path:
        """The folder of masks or units."""
        return self._decision or self.folder / DECISION

    def save(self, decision: Kept | Units) -> None:
        """Write the units, and the weights where they were changed; masks are written already. Collective."""
        self._open.close()
        learned = self._learner is not None and self._learner.weights is not None
        searched = self.method.resumable and isinstance(decision, Units)
        changed = self._changed or (self._runner is not None and self._runner.weights_changed)
        if changed or learned or searched:
            undecided = {"method": None, "target": None, "weights": self.method.name}
            history = {**self.source.history, **undecided}
            save_model(self.folder / WEIGHTS, self.model, history, self.source.tokenizer)
        if isinstance(decision, Units) and backend.rank() == 0:
            Trim(self._info(), decision).save(self.decision, self.config)

    def _writer(self) -> MaskWriter | None:
        return MaskWriter(self.decision, self._info()) if backend.rank() == 0 else None

    @property
    def _tokens(self) -> Tensor | None:
        return self.calibration.tokens if CALIBRATION in self.method.needs else None

    @property
    def _title(self) -> str:
        return f"{self.method.name} {title(str(self.target))}"

    def _info(self) -> MaskInfo:
        """What a decision says about where it comes from."""
        method, config = self.method, self.config
        about: dict[str, Any] = {}
        if DATA in method.needs:
            lowered = {"losses": self._losses} if self._losses else {}
            about = {"seed": self.settings.training.seed, "notes": {"data": self.inputs.data.info(), **lowered}}
        elif CALIBRATION in method.needs:
            about = {"seed": self.calibration.seed, "calibration": self.calibration.info()}
        return MaskInfo(method.name, str(self.target), method.options(), config.family, config.fingerprint(), **about)
