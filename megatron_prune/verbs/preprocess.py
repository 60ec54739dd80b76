"""The `preprocess` verb: text -> token ids in Megatron's .bin and .idx."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.config import PreprocessConfig
from megatron_prune.data.about import Report
from megatron_prune.data.preprocess import preprocess
from megatron_prune.log import say

SHOWN = 10
"""Bad lines shown on the console."""


def run(config: PreprocessConfig) -> None:
    """Tokenise `config.input` into `config.output`, and say what came of it."""
    _tell(config.output, preprocess(config))


def _tell(prefix: Path, report: Report) -> None:
    say(f"{report['documents']} documents, {report['tokens']} tokens ({report['dtype']}) in {prefix}.bin and .idx")
    if report["bad_lines"]:
        say(f"{report['bad_lines']} bad lines left out; {prefix}.json lists them:")
        for line in report["listed_bad_lines"][:SHOWN]:
            say(f"  {line}")
