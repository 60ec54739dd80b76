"""Which of two candidates is better, and how sure that is: paired differences over windows, with their error.

Candidates are judged on the same windows, so that what is hard about a window cancels. A difference counts when it is
beyond its error; until then both get more windows, and those that are clearly worse get none (racing: Maron and Moore
1994; F-Race: Birattari et al. 2002). Windows are added, never drawn anew, so a candidate's good luck is not forgotten
when it has bad luck, nor the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

CONFIDENCE = 0.9
"""Of one side: 1.28 standard errors of many windows, 1.64 of four, 3.08 of two (Student's t)."""


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean of `[windows]`; infinite for a single one, and where one of them is no number or infinite."""
    if len(scores) < 2 or not all(map(math.isfinite, scores)):
        return math.inf
    return stdev(scores) / math.sqrt(len(scores))


def better(scores: Sequence[float], others: Sequence[float]) -> bool:
    """Whether `scores [windows]` are lower than others of the same windows by more than the error of that."""
    if not all(map(math.isfinite, scores)):
        return False
    if not all(map(math.isfinite, others)):
        return True
    differences = [a - b for a, b in zip(scores, others, strict=True)]
    if len(differences) < 2:
        return False
    return fmean(differences) + _errors(len(differences)) * standard_error(differences) < 0


def _errors(windows: int) -> float:
    """How many standard errors a mean of so many windows must be away from zero."""
    from scipy.special import stdtrit

    return float(stdtrit(windows - 1, CONFIDENCE))


def looks(first: int, last: int) -> list[int]:
    """Numbers of windows at which candidates are compared: `first`, doubled until it is `last`."""
    found = [min(first, last)]
    while found[-1] < last:
        found.append(min(2 * found[-1], last))
    return found


def race(
    judged: Callable[[int, slice], Sequence[float]], count: int, counts: Sequence[int], fewest: int
) -> dict[int, list[float]]:
    """Of candidates 0 to `count` - 1 those that none was better than, the lowest mean first, with their scores.

    `judged(candidate, windows)` is asked for more windows at each of `counts`; at most half of the candidates go on, or
    `fewest`.
    """
    found: dict[int, list[float]] = {n: [] for n in range(count)}
    seen = 0
    for number in counts:
        for n, scores in found.items():
            scores += judged(n, slice(seen, number))
        seen = number
        order = sorted(found, key=lambda n: (lowest_first(found[n]), n))
        close = [n for n in order if not better(found[order[0]], found[n])]
        found = {n: found[n] for n in close[: max(fewest, len(order) // 2)]}
    return found


def lowest_first(scores: Sequence[float]) -> float:
    """The mean, infinite where it is no number: what candidates are sorted by."""
    mean = fmean(scores)
    return math.inf if math.isnan(mean) else mean
