"""What a pruned weight must look like: N:M patterns and unstructured sparsity.

Written ``2:4`` or ``0.5`` on the command line, ``{n: 2, m: 4}`` or ``{sparsity: 0.5}`` in a file.
**N:M means N kept of every M consecutive inputs of an output row**; several other tools count N removed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from megatron_prune.errors import UserError

MAX_M = 16
_ALLOWED = "N:M such as 2:4 (N kept of every M inputs) or a sparsity between 0 and 1 such as 0.5 (share removed)"


def pruned_count(size: int, sparsity: float) -> int:
    """Number of the ``size`` weights that ``sparsity`` removes, rounded down.

    The sparsity is read as the decimal that was written: 0.29 of 100 is 29, though ``100 * 0.29 < 29``.
    """
    return math.floor(Fraction(repr(float(sparsity))) * size)


@dataclass(frozen=True)
class NM:
    """Keep ``n`` of every ``m`` consecutive inputs of each output row, groups starting at its first input."""

    n: int
    """Weights kept in a group."""
    m: int
    """Weights in a group."""

    def __post_init__(self) -> None:
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (self.n, self.m))
        if not whole or not 0 < self.n < self.m <= MAX_M:
            raise UserError(
                f"pattern {self.n}:{self.m} is not possible; N:M keeps N of every M inputs, "
                f"with whole numbers 0 < N < M <= {MAX_M}"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        return self.n / self.m

    def check(self, in_features: int, name: str = "a linear layer") -> None:
        """Raise UserError when rows of ``in_features`` inputs do not divide into groups."""
        if in_features % self.m:
            raise UserError(
                f"{self} does not fit {name}: its {in_features} inputs are not a multiple of {self.m}; "
                "choose an M that divides them"
            )


@dataclass(frozen=True)
class Unstructured:
    """Remove a share of the weights, anywhere; the method says whether it counts per matrix or per row."""

    sparsity: float
    """Share of the weights removed, between 0 and 1, both excluded."""

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float)) or not 0 < self.sparsity < 1:
            raise UserError(
                f"sparsity {self.sparsity} is not possible; it is the share of weights removed, "
                "between 0 and 1 (both excluded)"
            )

    def __str__(self) -> str:
        return repr(float(self.sparsity))

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        return 1.0 - self.sparsity

    def check(self, in_features: int, name: str = "a linear layer") -> None:
        """Every width fits; here so that callers need not tell the targets apart."""


Target = NM | Unstructured


def parse_target(given: object) -> Target:
    """The target meant by a string, a number, a mapping or a target; UserError says what is allowed."""
    if isinstance(given, (NM, Unstructured)):
        return given
    if isinstance(given, Mapping):
        return _from_mapping(given)
    if isinstance(given, str):
        return _from_string(given)
    if isinstance(given, float):
        return Unstructured(given)
    hint = "; in a YAML file put quotes around the pattern ('2:4')" if isinstance(given, int) else ""
    raise UserError(f"target {given!r} is not understood; give {_ALLOWED}{hint}")


def _from_string(text: str) -> Target:
    pattern = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if pattern:
        return NM(int(pattern[1]), int(pattern[2]))
    try:
        return Unstructured(float(text))
    except UserError:
        raise
    except ValueError:
        raise UserError(f"target {text!r} is not understood; give {_ALLOWED}") from None


def _from_mapping(given: Mapping[object, object]) -> Target:
    if set(given) == {"n", "m"}:
        return NM(given["n"], given["m"])  # type: ignore[arg-type]  # NM checks
    if set(given) == {"sparsity"}:
        return Unstructured(given["sparsity"])  # type: ignore[arg-type]  # Unstructured checks
    raise UserError(f"target {dict(given)} is not understood; give {{n: 2, m: 4}} or {{sparsity: 0.5}}")
