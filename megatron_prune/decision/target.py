"""What to prune to: N:M patterns and unstructured sparsity of weights, or the shape or size of a smaller model.

Written ``2:4``, ``0.5``, ``num_layers=24,ffn_hidden_size=1152`` or ``parameters=100M`` on the command line, a mapping
(``{n: 2, m: 4}``, ``{sparsity: 0.5}``, ``{num_layers: 24}``) in a file.
**N:M means N kept of every M consecutive inputs of an output row**; several other tools count N removed.

Either of the first two may leave weights dense: ``2:4,dense=down_proj+layers.0.`` (in a file ``dense: [down_proj,
layers.0.]``) prunes none whose Hugging Face name has one of these in it; ``*`` stands for anything.
``2:4,dense=25%`` leaves weights dense that together hold at most a quarter of all: `prune` chooses which.
``0.5,spread=0.08`` lets layers differ: the least and the most sparse one are that far apart.
``2:4@0.75`` prunes three quarters of every weight, in tiles of 128 by 128, and leaves the other tiles dense;
``2:4@0.75,tile=64xall`` has tiles of 64 whole rows (outputs), ``tile=allx64`` of 64 whole columns (inputs).
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megatron_prune.errors import UserError, brief

if TYPE_CHECKING:
    from megatron_prune.decision.latency import LatencyTable

MAX_M = 16
LARGEST = 2**63 - 1
"""Of sizes and budgets."""
MEASURES = ("parameters", "active_parameters", "forward_flops", "kv_cache_bytes")
"""What a budget may limit: weights of the model, all or those that a token meets; of a token, FLOPs with 2048 before it
and bytes of key-value cache.
"""
_NUMBER = r"[+-]?(?:(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,3})?|nan|inf)"
LATENCY = "latency_us"
"""Another measure: microseconds by a table that was measured; see `decision/latency.py`."""
_ALLOWED = (
    "N:M such as 2:4 (N kept of every M inputs), of a share of each weight such as 2:4@0.75, a sparsity between 0 and "
    "1 such as 0.5 (share removed), any with weights that stay dense such as 2:4,dense=down_proj or 2:4,dense=25%, "
    "sizes such as num_layers=24,ffn_hidden_size=1152, or a budget such as parameters=100M, forward_flops=200M, "
    "kv_cache_bytes=10K or latency_us=800K"
)

LONG = 60
"""More characters of a list of weights are not shown."""
_TILES = "rows x columns, such as 128x128, 64xall or allx64"
MOST_NAMES, MOST_PATTERNS = 100_000, 100
"""Of weights that stay dense, or parts of them: those of large mixtures of experts may all be named. Of names with a
``*``.
"""
MOST_CHARACTERS = 1000
"""Of a target, but for names."""


def title(target: str) -> str:
    """The text of a target, but for a list of weights that is long."""
    rest, _, dense = target.partition(",dense=")
    names = dense.split("+")
    return f"{rest},dense={len(names)} weights" if len(dense) > LONG and len(names) > 1 else target


class _LeavesDense:
    """A target of single weights, which may leave some of them alone."""

    dense: tuple[str, ...]
    dense_share: float

    def leaves(self, name: str) -> bool:
        """Whether the weight of that Hugging Face name is not pruned; UserError where that is still to be chosen."""
        self.check_named()
        names, parts, patterns = self._sorted
        return (
            name in names
            or any(part in name for part in parts)
            or any(fnmatch.fnmatchcase(name, f"*{pattern}*") for pattern in patterns)
        )

    def check_named(self) -> None:
        """UserError where weights that stay dense are still to be chosen."""
        if self.dense_share:
            raise UserError(
                f"target {self} does not say which weights stay dense; `prune` chooses them, and its run names them"
            )

    @cached_property
    def _sorted(self) -> tuple[frozenset[str], list[str], list[str]]:
        """All of `dense`, to know a whole name at once; those without and those with a ``*``."""
        return (
            frozenset(self.dense),
            [part for part in self.dense if "*" not in part],
            [part for part in self.dense if "*" in part],
        )

    def _check_patterns(self) -> None:
        if (
            type(self.dense_share) not in (int, float)
            or not 0 <= self.dense_share < 1
            or self.dense_share
            and self.dense
        ):
            raise UserError(
                f"dense={brief(self.dense_share)} of the weights is not possible; give a share between 0 and 100%, "
                "such as dense=25%, or names"
            )
        wrong = [each for each in self.dense if not re.fullmatch(r"[A-Za-z0-9_.*-]{1,200}", each)]
        patterns = sum("*" in each for each in self.dense)
        if wrong or len(self.dense) > MOST_NAMES or patterns > MOST_PATTERNS:
            shown = brief(wrong[0]) if wrong else f"{len(self.dense)} names, {patterns} of them with *,"
            raise UserError(
                f"dense={shown} is not possible; give parts of names of weights, such as down_proj or layers.0., "
                f"joined by +, at most {MOST_NAMES}, and {MOST_PATTERNS} with *"
            )

    def _except(self) -> str:
        if self.dense_share:
            return f",dense={(Decimal(repr(float(self.dense_share))) * 100).normalize():f}%"
        return f",dense={'+'.join(self.dense)}" if self.dense else ""

    @property
    def title(self) -> str:
        """As its text, but for a list of weights that is long."""
        return title(str(self))


@dataclass(frozen=True)
class Tile:
    """A piece of a weight `[out, in]` that is pruned or stays dense; those at the edges may be smaller. 0: all."""

    rows: int = 128
    columns: int = 128

    def __post_init__(self) -> None:
        wrong = [size for size in (self.rows, self.columns) if type(size) is not int or not 0 <= size <= LARGEST]
        if wrong or not (self.rows or self.columns):
            raise UserError(f"a tile of {brief(self.rows)} by {brief(self.columns)} is not possible; give {_TILES}")

    def __str__(self) -> str:
        return f"{self.rows or 'all'}x{self.columns or 'all'}"

    @classmethod
    def parse(cls, given: object) -> Tile:
        """The tile meant by ``128x128``, ``64xall`` or ``allx64``; UserError says what is allowed."""
        found = re.fullmatch(
            r"\s*([1-9][0-9]{0,8}|all)x([1-9][0-9]{0,8}|all)\s*", given if isinstance(given, str) else ""
        )
        if not found:
            raise UserError(f"tile={brief(given)} is not possible; give {_TILES}")
        rows, columns = (0 if size == "all" else int(size) for size in found.groups())
        return cls(rows, columns)


@dataclass(frozen=True)
class NM(_LeavesDense):
    """Keep ``n`` of every ``m`` consecutive inputs of each output row, groups starting at its first input."""

    n: int
    """Weights kept in a group."""
    m: int
    """Weights in a group."""
    dense: tuple[str, ...] = ()
    """Parts of the names of weights that are not pruned."""
    share: float = 1.0
    """Share of each weight that is pruned, in whole tiles; the other tiles stay dense."""
    tile: Tile | None = None
    """What a tile is, where the share is not 1."""
    dense_share: float = 0.0
    """Share of all prunable weights that is left dense at most, by whole weights that are still to be chosen."""

    def __post_init__(self) -> None:
        self._check_patterns()
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (self.n, self.m))
        if not whole or not 0 < self.n < self.m <= MAX_M:
            raise UserError(
                f"pattern {brief(self.n)}:{brief(self.m)} is not possible; N:M keeps N of every M inputs, "
                f"with whole numbers 0 < N < M <= {MAX_M}"
            )
        if type(self.share) not in (int, float) or not 0 < self.share <= 1:
            raise UserError(
                f"share {brief(self.share)} of {self.n}:{self.m} is not possible; give one above 0, below 1"
            )
        if self.share == 1:
            if self.tile is not None:
                raise UserError(f"tile={self.tile} is for a share of {self.n}:{self.m}, such as {self.n}:{self.m}@0.75")
            return
        if self.tile is None:
            object.__setattr__(self, "tile", Tile())
        if self.tiles.columns and self.tiles.columns % self.m:
            raise UserError(
                f"tile={self.tile} cuts groups of {self.m} inputs; give a multiple of {self.m} as its width"
            )

    @property
    def tiles(self) -> Tile:
        """Its tiles, where the share is not 1."""
        assert self.tile is not None, "every tile is pruned"
        return self.tile

    def __str__(self) -> str:
        tile = f",tile={self.tile}" if self.tile not in (None, Tile()) else ""
        return f"{self.n}:{self.m}{f'@{float(self.share)!r}' if self.share != 1 else ''}{tile}{self._except()}"

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        kept = self.n / self.m
        return kept if self.share == 1 else self.share * kept + 1 - self.share

    def check(self, in_features: int, name: str = "a linear layer") -> None:
        """Raise UserError when rows of ``in_features`` inputs do not divide into groups."""
        if in_features % self.m:
            raise UserError(
                f"{self} does not fit {name}: its {in_features} inputs are not a multiple of {self.m}; "
                "choose an M that divides them"
            )


@dataclass(frozen=True)
class Unstructured(_LeavesDense):
    """Remove a share of the weights, anywhere; the method says whether it counts per matrix or per row."""

    sparsity: float
    """Share of the weights removed, between 0 and 1, both excluded."""
    dense: tuple[str, ...] = ()
    """Parts of the names of weights that are not pruned."""
    spread: float = 0.0
    """How far apart the sparsities of the least and the most sparse layer may be; the whole meets `sparsity`."""
    dense_share: float = 0.0
    """Share of all prunable weights that is left dense at most, by whole weights that are still to be chosen."""

    def __post_init__(self) -> None:
        self._check_patterns()
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float)) or not 0 < self.sparsity < 1:
            raise UserError(
                f"sparsity {brief(self.sparsity)} is not possible; it is the share of weights removed, "
                "between 0 and 1 (both excluded)"
            )
        room = min(self.sparsity, 1 - self.sparsity)
        if type(self.spread) not in (int, float) or not 0 <= self.spread < room:
            raise UserError(
                f"spread {brief(self.spread)} of sparsity {self.sparsity} is not possible; allowed: below {room:g}"
            )

    def __str__(self) -> str:
        spread = f",spread={float(self.spread)!r}" if self.spread else ""
        return f"{float(self.sparsity)!r}{spread}{self._except()}"

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        return 1.0 - self.sparsity

    def check(self, in_features: int, name: str = "a linear layer") -> None:
        """Every width fits; here so that callers need not tell the targets apart."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a smaller model, in Megatron's names; what is left out stays as it is.

    With fewer query groups and no number of heads the groups keep their heads.
    """

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    """Of each expert."""
    moe_shared_expert_intermediate_size: int | None = None

    def __post_init__(self) -> None:
        given = self.given()
        wrong = [f"{key}={brief(value)}" for key, value in given.items() if type(value) is not int or value < 1]
        wrong += [f"{key}={brief(value)}" for key, value in given.items() if type(value) is int and value > LARGEST]
        if wrong or not given:
            raise UserError(
                f"target {', '.join(wrong) or 'without a size'} is not possible; give sizes of 1 or more, allowed: "
                f"{', '.join(field.name for field in fields(self))}"
            )

    def given(self) -> dict[str, int]:
        """The sizes that were asked for."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.given().items())


@dataclass(frozen=True)
class Budget:
    """What the smaller model may cost at most; the method looks for its shape."""

    limit: int
    measure: str = "parameters"
    """One of `MEASURES`, see `model/cost.py`, or `LATENCY`."""
    table: LatencyTable | None = field(default=None, compare=False, repr=False)
    """What a budget of latency is counted by."""

    def __post_init__(self) -> None:
        if self.measure not in (*MEASURES, LATENCY):
            allowed = ", ".join((*MEASURES, LATENCY))
            raise UserError(f"a budget of {brief(self.measure)} is not possible; allowed: {allowed}")
        if type(self.limit) is not int or not 1 <= self.limit <= LARGEST:
            raise UserError(
                f"target {self.measure}={brief(self.limit)} is not possible; give a whole number such as 100M, at most "
                f"{LARGEST}"
            )

    def __str__(self) -> str:
        return f"{self.measure}={self.limit}"


Target = NM | Unstructured
"""Of methods that decide about single weights."""
StructuredTarget = Shape | Budget
"""Of methods that remove whole units."""


def parse_target(given: object) -> Target:
    """As `parse_any_target`, where only single weights can be meant."""
    found = parse_any_target(given)
    if isinstance(found, (Shape, Budget)):
        raise UserError(f"target {found} is the size of a model; a pattern of weights is needed, such as 2:4 or 0.5")
    return found


def parse_any_target(given: object) -> Target | StructuredTarget:
    """The target meant by a string, a number, a mapping or a target; UserError says what is allowed."""
    if isinstance(given, (NM, Unstructured, Shape, Budget)):
        return given
    if isinstance(given, Mapping):
        return _from_mapping(given)
    if isinstance(given, str):
        return _from_string(given)
    if isinstance(given, float):
        return Unstructured(given)
    hint = "; in a YAML file put quotes around the pattern ('2:4')" if isinstance(given, int) else ""
    raise UserError(f"target {brief(given)} is not understood; give {_ALLOWED}{hint}")


def _from_string(text: str) -> Target | StructuredTarget:
    of_weights, comma, dense = text.partition(",dense=")
    if len(of_weights) > MOST_CHARACTERS:
        raise UserError(f"target {brief(text)} is not understood; give {_ALLOWED}")
    if comma:
        found = _from_string(of_weights)
        if isinstance(found, Shape | Budget):
            raise UserError(f"target {brief(text)}: dense= is for patterns of weights, such as 2:4,dense=down_proj")
        return replace(found, **_left_dense(dense.strip()))
    pattern = re.fullmatch(rf"\s*([0-9]{{1,9}})\s*:\s*([0-9]{{1,9}})\s*(?:@\s*({_NUMBER})\s*)?(?:,\s*tile=(.*))?", text)
    if pattern:
        n, m, share, tile = pattern.groups()
        return NM(int(n), int(m), (), float(share or 1), None if tile is None else Tile.parse(tile))
    sparsity = re.fullmatch(rf"\s*({_NUMBER})\s*(?:,\s*spread=\s*({_NUMBER})\s*)?", text)
    if sparsity:
        return Unstructured(float(sparsity[1]), (), float(sparsity[2] or 0))
    if "=" in text:
        return _from_mapping(dict(_pair(text, part) for part in text.split(",")))
    raise UserError(f"target {brief(text)} is not understood; give {_ALLOWED}")


def _from_mapping(given: Mapping[object, object]) -> Target | StructuredTarget:
    if (kind := _kind(given)) is not None:
        dense = given.get("dense", [])
        if isinstance(dense, str) and "%" in dense:
            found = _from_mapping({key: value for key, value in given.items() if key != "dense"})
            return replace(found, **_left_dense(dense))
        if not isinstance(dense, list | tuple) or not all(isinstance(each, str) for each in dense):
            raise UserError(
                f"target dense: {brief(dense)} is not possible; give a list of parts of names of weights, or a share "
                "such as 25%"
            )
        values: dict[str, Any] = {str(key): value for key, value in given.items()} | {"dense": tuple(dense)}
        if "tile" in values:
            values["tile"] = Tile.parse(values["tile"])
        return kind(**values)
    if len(given) == 1 and set(given) <= {*MEASURES, LATENCY}:
        ((measure, limit),) = given.items()
        return Budget(_count(limit), str(measure))
    names = [field.name for field in fields(Shape)]
    unknown = [str(key) for key in given if key not in names]
    if given and not unknown:
        return Shape(**{str(key): _count(value) for key, value in given.items()})
    near = difflib.get_close_matches(unknown[0][:100], [*names, *MEASURES, LATENCY], n=1) if unknown else []
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    shown = ", ".join(f"{brief(str(key), 30)}: {brief(value, 30)}" for key, value in list(given.items())[:3])
    raise UserError(f"target {{{shown}}} is not understood{hint}; give {_ALLOWED}")


def _kind(given: Mapping[object, object]) -> type[NM] | type[Unstructured] | None:
    """What of single weights has these keys."""
    if set(given) - {"dense", "share", "tile"} == {"n", "m"}:
        return NM
    return Unstructured if set(given) - {"dense", "spread"} == {"sparsity"} else None


def _left_dense(text: str) -> dict[str, Any]:
    """What ``dense=`` says: a share such as ``25%``, or names."""
    share = re.fullmatch(rf"({_NUMBER})\s*%", text) if len(text) <= MOST_CHARACTERS else None
    if not share:
        return {"dense": tuple(text.split("+"))}
    return {"dense_share": float(Decimal(share[1]) / 100) or math.nan}  # none is no share


def _pair(text: str, part: str) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    if not equals:
        raise UserError(f"target {brief(text)} is not understood: {brief(part)} has no '='; give {_ALLOWED}")
    return key.strip().replace("-", "_"), value.strip()


def _count(given: object) -> int:
    """A whole number; K, M and B (or G) stand for thousand, million and billion."""
    text = str(given).strip() if isinstance(given, str | float) or type(given) is int and given < 10**40 else ""
    number = re.fullmatch(r"([0-9]{1,40}(?:\.[0-9]{1,40})?)\s*([KMGB]?)", text, re.IGNORECASE)
    if not number:
        raise UserError(f"{brief(given)} is not a number of units; give a whole number such as 1152 or 1.1B")
    value = Fraction(number[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}[number[2].upper()]
    if value.denominator != 1:
        raise UserError(f"{brief(given)} is not a whole number of units; give one such as 1152 or 1.1B")
    return int(value)
