"""The one-shot decisions on SmolLM2-135M itself in several layouts, weight by weight against one process.

    PYTHONPATH=. python benchmarks/layouts.py --model HF_DIRECTORY --shared ../shared

Real processes under torchrun, 16 calibration windows of 256 tokens. Writes benchmarks/results/layouts_DATE.json; exit
status 1 when a decision differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from megatron_prune.decision.masks import Masks
from tests.distributed.launch import DP2, ONE, PP2, TP3, Layout, launch, must_pass

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quality import write_result

TIMEOUT_S = 3600
CASES = [
    ("magnitude", "2:4"),
    ("magnitude", "0.5"),
    ("wanda", "2:4"),
    ("wanda", "0.5"),
    ("sparsegpt", "2:4"),
    ("sparsegpt", "0.5"),
]
LAYOUTS = [TP3, PP2, DP2]


def command(root: Path, c4: Path, method: str, target: str, layout: Layout) -> list[str]:
    """The prune verb of one case."""
    words = ["prune", "--input", str(root / "dense"), "--output", str(folder(root, method, target, layout))]
    calibration = ["--calibration", str(c4), "--calibration-samples", "16", "--calibration-seq-length", "256"]
    return [*words, "--method", method, "--target", target, *calibration, *layout.flags()]


def folder(root: Path, method: str, target: str, layout: Layout) -> Path:
    """Run folder of one case."""
    return root / f"{method}_{target.replace(':', '-')}_{layout.name}"


def differing(a: Masks, b: Masks) -> int:
    """Number of weights on which two decisions differ."""
    return sum(int((a.get(name) != b.get(name)).sum()) for name in a.names())


def main() -> int:
    """Run every case in every layout and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    given = parser.parse_args()
    c4 = given.shared / "data" / "c4" / "c4_en_sample.jsonl"
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        first = ["import", "--input", str(given.model), "--output", str(root / "dense")]
        must_pass(launch(1, [first, *(command(root, c4, *case, ONE) for case in CASES)], root / "commands", TIMEOUT_S))
        for layout in LAYOUTS:
            commands = [command(root, c4, *case, layout) for case in CASES]
            must_pass(launch(layout.processes, commands, root / "commands", TIMEOUT_S))
        for method, target in CASES:
            one = Masks.load(folder(root, method, target, ONE) / "decision")
            others = [Masks.load(folder(root, method, target, layout) / "decision") for layout in LAYOUTS]
            rows.append([method, target, *(differing(one, other) for other in others)])
            print(rows[-1], flush=True)
    result = {
        "columns": ["method", "target", *(f"weights that differ, {layout.name}" for layout in LAYOUTS)],
        "rows": rows,
        "protocol": "Of 106,168,320 weights, against one process; 16 calibration windows of 256 tokens, bf16.",
    }
    write_result("layouts", result)
    return int(any(any(row[2:]) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
