"""Runs in MaxText's environment: a list of calls in one process, because starting it takes longer than most of them.

["main", VERB, ...]                     a verb of `python -m megatron_prune.maxtext`; answers its exit status and errors
["logits", FOLDER, IN, OUT, SETTING...] logits of the array `tokens` of IN.npz, saved as `logits` in OUT.npz
["call", MODULE, FUNCTION, ...]         a function of tests.maxtext
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np


def answer(kind: str, *words: str) -> str:
    if kind == "main":
        from megatron_prune.maxtext.__main__ import main

        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = main(words)
        return f"{status} {said.getvalue()}"
    if kind == "logits":
        from megatron_prune.maxtext.model import logits

        folder, tokens, output, *settings = words
        np.savez(output, logits=logits(Path(folder), np.load(tokens)["tokens"], ["dtype=float32", *settings]))
        return "done"
    module, function, *rest = words
    return str(getattr(importlib.import_module(module), function)(*rest))


if __name__ == "__main__":
    calls, answers = sys.argv[1:]
    Path(answers).write_text(json.dumps([answer(*call) for call in json.loads(Path(calls).read_text())]))
