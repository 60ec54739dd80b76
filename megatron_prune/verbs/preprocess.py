"""The `preprocess` verb: text -> token ids in Megatron's .bin and .idx."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.config import PreprocessConfig
from megatron_prune.verbs import Verb, deliver

if TYPE_CHECKING:
    from megatron_prune.data.about import Report

VERB = Verb("preprocess", PreprocessConfig, "text -> token ids in Megatron's .bin and .idx", 10, alone=True, light=True)
SHOWN = 10
"""Bad lines shown on the console."""


def run(config: PreprocessConfig) -> Report:
    """Tokenise `config.input` into `config.output`, and say what came of it."""
    from megatron_prune.data.preprocess import preprocess

    report = preprocess(config)
    deliver(told(config.output, report))
    return report


def told(prefix: Path, report: Report) -> list[str]:
    """What came of it."""
    lines = [f"{report['documents']} documents, {report['tokens']} tokens ({report['dtype']}) in {prefix}.bin and .idx"]
    if report["bad_lines"]:
        lines.append(f"{report['bad_lines']} bad lines left out; {prefix}.json lists them:")
        lines += [f"  {line}" for line in report["listed_bad_lines"][:SHOWN]]
    return lines
