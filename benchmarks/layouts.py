"""The one-shot decisions on SmolLM2-135M itself in several layouts, weight by weight against one process.

    python benchmarks/layouts.py --model HF_DIRECTORY --shared ../shared

Real processes under torchrun, 16 calibration windows of 256 tokens. Exit status 1 when a decision differs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.results import MODEL, SHARED, arguments, write_result
from bench.study import Study, folder_name

CASES = [(method, target) for method in ("magnitude", "wanda", "sparsegpt") for target in ("2:4", "0.5")]
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp3": {"processes": 3, "tensor_model_parallel_size": 3},
    "pp2": {"processes": 2, "pipeline_model_parallel_size": 2},
    "dp2": {"processes": 2},
}


def decided(bench: Study, method: str, target: str, layout: str) -> Path:
    """The decision of one case in one layout."""
    run = bench.work / folder_name(method, target, layout)
    windows = {"calibration": bench.texts.c4, "calibration_samples": 16, "calibration_seq_length": 256}
    windows = {} if method == "magnitude" else windows
    what = {"input": bench.dense, "method": method, "target": target}
    bench.verb("prune", output=run, **what, **windows, **LAYOUTS[layout])
    return run / "decision"


def row(bench: Study, method: str, target: str) -> list[Any]:
    """Weights on which each layout differs from one process."""
    from megatron_prune.decision.masks import Masks

    one, *others = [Masks.load(decided(bench, method, target, layout)) for layout in LAYOUTS]
    differing = [sum(int((one.get(name) != other.get(name)).sum()) for name in one.names()) for other in others]
    return [method, target, *differing]


def main() -> int:
    """Run every case in every layout and compare."""
    given = arguments(__doc__, MODEL, SHARED)
    with tempfile.TemporaryDirectory() as work:
        bench = Study(Path(work), given.shared)
        bench.imported(given.model)
        rows = [row(bench, *case) for case in CASES]
    columns = ["method", "target", *(f"weights that differ, {layout}" for layout in list(LAYOUTS)[1:])]
    protocol = "Of 106,168,320 weights, against one process; 16 calibration windows of 256 tokens, bf16."
    write_result("layouts", given, columns, rows, protocol)
    return int(any(any(row[2:]) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
