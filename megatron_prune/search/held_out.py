"""Calibration windows in two parts: what is fitted to text is judged on other text.

A fit is better on the windows that it was made from than on any others (levels of a small model by an eighth), and the
more so the more freedom it has; candidates that are compared there are compared by their luck.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prune.errors import UserError

if TYPE_CHECKING:
    from megatron_prune.statistics.passes import Passes

FEWEST = 2
"""Windows that judge: of one alone no error can be told."""


def split(passes: Passes) -> tuple[Passes, Passes]:
    """Passes over the first three quarters of the windows, for fits, and over the others, which judge. Collective.

    Windows are drawn at random and in no order, so the last are as good as any.
    """
    assert passes.tokens is not None
    count = len(passes.tokens)
    if count <= FEWEST:
        raise UserError(
            f"calibration has {count} windows, and {FEWEST} of them would judge what is fitted to the others: give "
            f"--calibration-samples {FEWEST + 1} or more"
        )
    first = count - max(FEWEST, count // 4)
    return passes.part(slice(0, first), "fit"), passes.part(slice(first, count))
