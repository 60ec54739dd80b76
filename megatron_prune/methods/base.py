"""What every pruning method is: a frozen dataclass of hyper-parameters with one ``decide``, found by its name.

A method pulls what it needs from a workbench (this file's protocols) and answers one question: what stays. Its scores
and solvers are pure functions of tensors, to be tested, and read, without a model or a process group.
"""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, get_type_hints

import torch
from torch import Tensor

from megatron_prune.decision.target import MEASURES, NM, Budget, StructuredTarget, Target, Unstructured
from megatron_prune.decision.tiles import dense_tiles, removed
from megatron_prune.errors import UserError, brief
from megatron_prune.kernels.definition import MAX_M
from megatron_prune.kernels.selection import keep_largest, select_matrix, select_nm, select_rows
from megatron_prune.options import check_kind, check_value

if TYPE_CHECKING:
    from megatron_prune.decision.masks import Kept
    from megatron_prune.decision.units import Units
    from megatron_prune.model.families import ModelConfig
    from megatron_prune.model.prunable import PrunableModel
    from megatron_prune.statistics.experts import ExpertActivity
    from megatron_prune.statistics.passes import Passes
    from megatron_prune.training.learning import LearningRunner
    from megatron_prune.training.shearing import ShearingRunner
    from megatron_prune.training.stopping import StopRequest

__all__ = [
    "CALIBRATION",
    "DATA",
    "LOSSES",
    "PRIOR",
    "STATISTICS",
    "HyperParameter",
    "Linear",
    "MethodInfo",
    "PruningMethod",
    "Statistic",
    "Workbench",
    "dense_part",
    "finite",
    "get_method",
    "hyperparameter",
    "keep_largest",
    "methods",
    "register",
    "select_blocks",
    "select_matrix",
    "select_nm",
    "select_pattern",
    "select_rows",
]


class Statistic(Protocol):
    """Something accumulated over the calibration tokens that enter one linear layer."""

    tokens: Tensor
    """Calibration tokens seen, a float64 scalar that is one of ``tensors()``."""

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None: ...

    def update(self, x: Tensor) -> None:
        """Add one calibration window x [tokens, in]."""

    def value(self) -> Tensor:
        """The statistic of everything seen, float32."""

    def tensors(self) -> list[Tensor]:
        """The float64 accumulators: summed over ranks, they are the statistic of all ranks' windows."""


class Linear(Protocol):
    """One linear layer while it is being pruned; this rank holds a contiguous share of its complete rows."""

    name: str
    statistic: Any
    """What ``linears`` was asked for, already summed over all ranks; None without calibration."""
    layer: int
    """Of the whole model."""
    blocks: Mapping[str, Tensor]
    """Hugging Face matrix name -> its rows in the unsharded layer, in that matrix's order (LongTensor)."""

    def weight(self) -> Tensor:
        """float32 [rows_here, in]."""

    def gather(self, x: Tensor) -> Tensor:
        """[rows_here, k] of every rank -> [out, k] in row order. Collective."""

    def local(self, x: Tensor) -> Tensor:
        """[out, k] -> this rank's [rows_here, k]."""

    def keep(self, mask: Tensor, weight: Tensor | None = None) -> None:
        """Apply mask [rows_here, in] (True = kept), after replacing the weights when ``weight`` is given."""


class Workbench(Protocol):
    """What a method may pull; each thing is made when it is pulled, and is the same in every layout.

    `megatron_prune.workbench` has the real one. What a method pulls of the user's it declares in `needs`.
    """

    @property
    def config(self) -> ModelConfig:
        """Sizes of the whole model."""

    @property
    def model(self) -> PrunableModel:
        """The model itself, for methods that change its weights by themselves."""

    @property
    def passes(self) -> Passes:
        """Passes over the calibration text: activations, losses without layers or of smaller models, gradients."""

    @property
    def folder(self) -> Path:
        """The run folder, where a method that takes hours keeps what it has found."""

    @property
    def stop(self) -> StopRequest:
        """Whether the run is asked to end; it may then raise `Stopped`."""

    def linears(self, statistic: Callable[..., Any] | None, sequential: bool = False) -> Iterator[Any]:
        """Prunable linears (`Linear`) in model order; the statistics of later layers see the earlier ones pruned.

        With ``sequential`` those of later linears of the same layer do, too.
        """

    def dense_linears(self, statistic: Callable[..., Any]) -> Iterator[Any]:
        """The same linears while nothing is pruned, with statistics of the dense model; nothing is decided of them."""

    def masks(self) -> Kept:
        """The answer of a method that went through the linears: what it kept. The masks are in the run."""

    def compensate(self, units: Units, refit: str, damping: float, norm_gain: bool) -> None:
        """Correct the weights of what stays for what goes. Collective."""

    def merge_experts(
        self,
        count: int,
        group_size: int,
        score: Callable[[ExpertActivity], Tensor],
        keep: Callable[[Tensor, int], tuple[int, ...]],
    ) -> Units:
        """Average the experts of every layer into the `count` that `keep` names by their scores. Collective."""

    def learn(self) -> LearningRunner:
        """A training session for mask logits."""

    def shear(self) -> ShearingRunner:
        """A training session for masks of units and weights together."""


CALIBRATION, DATA, LOSSES, PRIOR, STATISTICS = "calibration", "data", "losses", "prior", "statistics"


@dataclass(frozen=True)
class PruningMethod:
    """Base of all methods: subclass as a frozen dataclass whose fields are the paper's hyper-parameters."""

    name: ClassVar[str]
    paper: ClassVar[str]
    """Authors, year and arXiv number."""
    targets: ClassVar[Mapping[type, str]]
    """Supported target type -> how this method counts it, in a few words."""
    measures: ClassVar[tuple[str, ...]] = MEASURES
    """What its budgets may limit."""
    needs: ClassVar[tuple[str, ...]] = (CALIBRATION,)
    """What the user must give: `CALIBRATION` text or training `DATA`; read before any weight."""
    takes: ClassVar[tuple[str, ...]] = ()
    """What the user may give besides: a `PRIOR` to start from, `LOSSES` such as a teacher's, a folder of `STATISTICS`
    for several targets.
    """
    resumable: ClassVar[bool] = False
    """Whether it takes hours: it works in the run folder, stops when asked to, and goes on after a kill."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of this method for options of `prune` that are not its own, by key: its paper's, where they differ. A
    value or a `Share` of another option."""
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Name of a recipe, given as the hyper-parameter `recipe` -> defaults in place of the usual: hyper-parameters, and
    options that are not its own.
    """
    sizes_with_experts: ClassVar[tuple[str, ...]] = ()
    """Those that it can change of a model with experts, where it removes units."""
    budget_with_experts: ClassVar[bool] = False
    """Whether it knows such models within a budget."""
    mask_only: ClassVar[Mapping[str, Any]] = {}
    """Hyper-parameters under which it leaves the kept weights alone, as a prior of mask learning."""

    @property
    def weights_stay(self) -> bool:
        """Whether it leaves all weights of the model as they are while it learns."""
        return False

    def options(self) -> dict[str, Any]:
        """This method's hyper-parameters, for the record."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def decide(self, work: Workbench, target: Any) -> Kept | Units:
        """Which weights, or which units, stay. Collective; UserError when target or data do not allow it.

        Weights that the method corrects are changed in the model. ``target`` is of a type in ``targets``.
        """
        raise NotImplementedError

    def idle(self, settings: Mapping[str, Any]) -> Mapping[str, str]:
        """Keys, of `prune` or of the method, that have no effect beside others -> those, in words.

        `settings`: every key of `prune` and its value.
        """
        return {}

    def check(self, config: ModelConfig, target: Any) -> None:
        """UserError for a model and target that the method cannot take; asked before any weight is read."""

    def accept(self, target: Target | StructuredTarget) -> None:
        """Raise UserError when this method cannot produce ``target``."""
        if type(target) not in self.targets:
            allowed = "; ".join(self.targets.values())
            raise UserError(f"method {self.name} cannot prune to {target}; it supports {allowed}")
        if isinstance(target, Budget) and target.measure not in self.measures:
            raise UserError(
                f"method {self.name} cannot prune to {target}; its budgets may limit {', '.join(self.measures)}"
            )
        if self.resumable and isinstance(target, NM):
            check_learnable(target)


def check_learnable(target: NM) -> None:
    """UserError for a pattern with more choices than logits are kept of (of 16 inputs 8 can stay in 12,870 ways), and
    for tiles beside whole weights that stay dense.
    """
    if target.share != 1 and (target.dense or target.dense_share):
        raise UserError(
            f"target {target.title}: tiles are learned of all linears; leave dense= or @{target.share} out, or use a "
            "one-shot method"
        )
    if target.m > MAX_M:
        able = [name for name in mask_methods() if NM in _discovered()[name].targets]
        raise UserError(
            f"pattern {target} has {math.comb(target.m, target.n)} choices in each group, and a learned mask a logit "
            f"for each; allowed: M up to {MAX_M}, or a method in one shot: {', '.join(able)}"
        )


@dataclass(frozen=True)
class HyperParameter:
    """One knob of a method, for listings and help."""

    name: str
    type: str
    default: object
    help: str


@dataclass(frozen=True)
class MethodInfo:
    """What ``methods`` lists."""

    name: str
    paper: str
    targets: tuple[str, ...]
    hyperparameters: tuple[HyperParameter, ...]
    defaults: Mapping[str, Any]
    """Of other options of `prune`, where the method has its own."""


_registry: dict[str, type[PruningMethod]] = {}
_Method = TypeVar("_Method", bound=type[PruningMethod])


def register(name: str) -> Callable[[_Method], _Method]:
    """Class decorator that makes a method known under ``name``."""

    def decorate(cls: _Method) -> _Method:
        assert name not in _registry, f"two methods are called {name}"
        cls.name = name
        _registry[name] = cls
        return cls

    return decorate


def hyperparameter(default: Any, help: str, at_most: int | None = None, *, numbers: bool = False) -> Any:
    """A dataclass field with the one-line help that listings show; `at_most` where a list or a loop is made of it.

    `numbers`: a list of numbers in words, of which a single one may be given as a number.
    """
    return field(default=default, metadata={"help": help, "at_most": at_most, "numbers": numbers})


def mask_methods() -> list[str]:
    """Names of the methods that give a mask in one shot, which mask learning may start from."""
    kinds = (NM, Unstructured)
    return [n for n, cls in sorted(_discovered().items()) if not cls.resumable and any(k in cls.targets for k in kinds)]


def looks_at_text(name: str | None) -> bool:
    """Whether that is a method that gives a mask in one shot, by calibration text."""
    return name in mask_methods() and CALIBRATION in _discovered()[name].needs


def get_method(name: str, **hyperparameters: Any) -> PruningMethod:
    """The method called ``name`` with these hyper-parameters; UserError names the nearest known one."""
    known = _discovered()
    check_kind("method", name, str)
    if name not in known:
        raise UserError(
            f"unknown method {brief(name)}{_nearest(name, known)}; known methods: {', '.join(sorted(known))}"
        )
    allowed = {entry.name: entry.metadata for entry in fields(known[name])}
    kinds = get_type_hints(known[name])
    for given, value in hyperparameters.items():
        if given not in allowed:
            raise UserError(
                f"method {name} has no hyper-parameter {brief(given)}{_nearest(given, allowed)}; "
                f"it has: {', '.join(allowed) or 'none'}"
            )
        check_kind(f"{name}: {given}", value, str | int if allowed[given].get("numbers") else kinds[given])
    recipe = known[name].recipes.get(hyperparameters.get("recipe", ""), {})
    made = known[name](**{**{key: value for key, value in recipe.items() if key in allowed}, **hyperparameters})
    for entry in fields(made):
        check_value(entry.name, getattr(made, entry.name), entry.metadata)
    return made


def methods_that(hold: Callable[[type[PruningMethod]], bool]) -> list[str]:
    """Names of the methods of which something holds."""
    return [name for name, cls in sorted(_discovered().items()) if hold(cls)]


def methods() -> list[MethodInfo]:
    """Every known method, by name."""
    return [_describe(cls) for _, cls in sorted(_discovered().items())]


def _discovered() -> dict[str, type[PruningMethod]]:
    """The registry after importing every module of this package: a method is known once its file exists."""
    package = importlib.import_module("megatron_prune.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _registry


def _describe(cls: type[PruningMethod]) -> MethodInfo:
    knobs = tuple(_knob(entry) for entry in fields(cls))
    return MethodInfo(cls.name, cls.paper, tuple(cls.targets.values()), knobs, cls.defaults)


def _knob(entry: Field[Any]) -> HyperParameter:
    default = None if entry.default is MISSING else entry.default
    return HyperParameter(entry.name, str(entry.type), default, entry.metadata.get("help", ""))


def _nearest(given: str, known: Any) -> str:
    close = difflib.get_close_matches(given[:100], list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def finite(name: str, x: Tensor, what: str) -> Tensor:
    """``x`` itself, after checking that the ``what`` of layer ``name`` are all finite (UserError)."""
    # NaN where there is one; in a twentieth of the time that isfinite of each takes.
    if x.numel() and not torch.isfinite(torch.stack(torch.aminmax(x))).all():
        raise UserError(
            f"the {what} of {name} hold NaN or infinity; "
            "check the checkpoint, and that the calibration runs in a dtype that does not overflow"
        )
    return x


def dense_part(linear: Linear, cost: Callable[[], Tensor], target: NM) -> Tensor | None:
    """What of this rank's rows is in tiles that stay dense, bool `[rows_here, in]`; None where `target` has no share.

    `cost`: of removing each weight alone, `[rows_here, in]`. Tiles are those of the Hugging Face matrices, and each
    loses the same share. Collective.
    """
    if target.share == 1:
        return None
    whole = linear.gather(removed(cost(), target))
    dense = torch.zeros(whole.shape, dtype=torch.bool, device=whole.device)
    for rows in linear.blocks.values():
        rows = rows.to(whole.device)
        dense[rows] = dense_tiles(whole[rows], target)
    return linear.local(dense).repeat_interleave(target.m, 1)


def select_pattern(linear: Linear, score: Tensor, target: NM) -> Tensor:
    """Keep the highest scores of every group; where a share of the weight is pruned, all of the tiles in which the
    squares of what would go are largest. `[rows_here, in]` -> bool. Collective.
    """
    mask, dense = select_nm(score, target.n, target.m), dense_part(linear, score.square, target)
    return mask if dense is None else mask | dense


def select_blocks(score: Tensor, blocks: Mapping[str, Tensor], kept: Callable[[int], int]) -> Tensor:
    """Keep the ``kept(rows)`` highest scores of each Hugging Face matrix: [out, k] -> bool [out, k].

    Megatron fuses q, k, v and gate, up into one weight; counting per original matrix makes the result
    comparable with tools that prune those separately, and equal whatever the interleaving. ``rows`` is a
    matrix's height.
    """
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    for rows in blocks.values():
        rows = rows.to(score.device)
        flat = score[rows].reshape(1, -1)
        mask[rows] = keep_largest(flat, kept(len(rows))).reshape(len(rows), -1)
    return mask
