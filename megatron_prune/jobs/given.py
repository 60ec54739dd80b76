"""Whether a method has a use for everything that the user gave; what it has none for is refused, never passed over."""

from __future__ import annotations

from megatron_prune.config import PruneConfig
from megatron_prune.errors import UserError
from megatron_prune.methods.base import CALIBRATION, DATA, LOSSES, PRIOR, STATISTICS, PruningMethod, methods_that
from megatron_prune.option_groups import Calibration, Losses, Training
from megatron_prune.options import entries, flag, flatten, given

TEXT = "text"
"""What methods that look at calibration text or learn from text use."""
LONG = "resumable"
"""What methods that take hours use: they may be stopped, go on, and draw at random."""
USED_BY = {
    "apply_chat_template": TEXT,
    **{entry.key: CALIBRATION for entry in entries(Calibration)},
    **{entry.key: DATA for entry in entries(Training) if entry.key != "deterministic"},
    **dict.fromkeys(("seed", "time_limit", "resume"), LONG),
    **dict.fromkeys(("prior", "initial_logits"), PRIOR),
    **{entry.key: LOSSES for entry in entries(Losses)},
    "statistics": STATISTICS,
}
"""Key of an option of `prune` -> the kind of method that uses it; options that are not here serve all methods."""
WORDS = {
    CALIBRATION: "that look at calibration text",
    DATA: "that learn from text",
    TEXT: "that read text",
    PRIOR: "that start from a mask",
    LOSSES: "that weigh losses and learn from a teacher",
    STATISTICS: "that keep statistics",
    LONG: "that take hours and can go on",
}


def check_given(config: PruneConfig, method: PruningMethod) -> None:
    """UserError for options that were given and that the method, or its other options, have no use for."""
    chosen = given(config)
    for kind, words in WORDS.items():
        unused = [flag(key) for key in chosen if USED_BY.get(key) == kind and not uses(method, kind)]
        if unused:
            able = ", ".join(methods_that(lambda cls, kind=kind: uses(cls, kind)))  # type: ignore[misc]
            raise UserError(
                f"{', '.join(unused)} was given and method {method.name} has no use for it; for methods {words}: {able}"
            )
    for key, beside in method.idle(flatten(config)).items():
        if key in config.method_options or key in chosen:
            raise UserError(f"{flag(key)} was given and has no effect {beside}: leave it out")


def uses(method: PruningMethod | type[PruningMethod], kind: str) -> bool:
    """Whether a method uses options of a kind."""
    if kind == LONG:
        return method.resumable
    used = (*method.needs, *method.takes)
    return CALIBRATION in used or DATA in used if kind == TEXT else kind in used
