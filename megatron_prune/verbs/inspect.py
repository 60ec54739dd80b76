"""The `inspect` verb: what a checkpoint, a run folder, a decision or a mask file holds, without loading a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_prune.options import REQUIRED, Options, option
from megatron_prune.verbs import Verb, deliver


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Options):
    """What is in a checkpoint, a run folder, a decision, a mask file or a Hugging Face directory"""

    examples: ClassVar[tuple[str, ...]] = (
        "run",
        "masks.npz",
    )

    input: Path = option(REQUIRED, "Megatron checkpoint, run folder, decision, mask .npz or Hugging Face directory")


VERB = Verb("inspect", InspectConfig, "show what a checkpoint, run or decision holds", 120, alone=True, light=True)


def run(config: InspectConfig) -> list[str]:
    """Print what `config.input` is."""
    from megatron_prune.jobs.inspect import described

    lines = described(config.input)
    deliver(lines)
    return lines
