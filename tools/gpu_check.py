"""Whether the GPU path works on this machine, in 15 checks and within eight minutes on an H100.

    python tools/gpu_check.py [--only NAMES] [--output FILE.json] [--device cpu]
    torchrun --nproc-per-node 8 tools/gpu_check.py --layouts [--output FILE.json]

Each check prints one line of JSON: `name`, `pass` (null: skipped, and why), `value`, `limit`, `seconds`. The exit
status is 1 when one fails. Models are random and written on the spot; nothing is fetched. What verbs print goes to a
file, whose end is shown when a check fails. `--device cpu` runs the same checks in small, all that a CPU can, so that
they do not rot.

`--layouts` is for the owner of eight GPUs: tensor, pipeline and context parallelism, checkpoints that move between
layouts, the distributed optimizer and FSDP, against data parallelism alone; with `--device cpu` on a CPU. Two or four
processes do, too, with smaller layouts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 420.0
"""No check begins later."""


def arguments() -> argparse.Namespace:
    """What was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="checks to run; left out: all")
    parser.add_argument("--output", type=Path, help="JSON file for the result; left out: printed only")
    parser.add_argument("--layouts", action="store_true", help="checks of several processes, under torchrun")
    parser.add_argument("--folder", type=Path, help="for what is made, kept afterwards; left out: temporary")
    return parser.parse_args()


def set_up(given: argparse.Namespace) -> None:
    """What must be said before PyTorch and the package are imported."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic runs of this process
    if given.device == "cpu":
        os.environ["MEGATRON_PRUNE_DEVICE"] = "cpu"
    import torch

    import megatron_prune  # noqa: F401  (before PyTorch)

    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_check: PyTorch sees no GPU; --device cpu runs what can be run without")


def chosen(given: argparse.Namespace) -> list[Any]:
    """The checks to run; SystemExit for a name that there is not."""
    if given.layouts:
        from tools.gpu_layouts import CHECKS
    else:
        from tools.gpu_checks import CHECKS
    names = [check.name for check in CHECKS]
    unknown = [name for name in given.only or () if name not in names]
    if unknown:
        raise SystemExit(f"gpu_check: --only {' '.join(unknown)} was given; allowed: {' '.join(names)}")
    return [check for check in CHECKS if given.only is None or check.name in given.only]


def run_all(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every check's line, printed as it is known."""
    from tools.acceptance import BILLION, SMALL, TINY, Place, output_to, run

    large, small = (TINY, TINY) if given.device == "cpu" else (BILLION, SMALL)
    checks, began, lines = chosen(given), time.monotonic(), []
    if given.layouts:
        from tools import gpu_layouts

        large = gpu_layouts.SMALL if given.device == "cpu" else gpu_layouts.LARGE
    place = Place(folder, given.device, large, small)
    with output_to(folder / "log.txt") as say:
        for check in checks:
            if time.monotonic() - began > LIMIT_S:
                line: dict[str, Any] = {"name": check.name, "pass": None, "value": None, "limit": None, "seconds": 0.0}
                line["skipped"] = f"no time was left; --only {check.name}"
            else:
                line = run(check, place)
            if is_leader():
                say(json.dumps(line))
            lines.append(line)
    return lines


def is_leader() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def a_folder(given: argparse.Namespace) -> Path:
    """The same for all processes."""
    folder = given.folder or Path(tempfile.mkdtemp(prefix="gpu_check_"))
    if given.layouts:
        from megatron_prune.ranks import from_leader
        from tools.gpu_layouts import connect

        connect()
        folder = from_leader(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(given: argparse.Namespace, lines: list[dict[str, Any]]) -> None:
    """The result file, of the form that all of benchmarks/results have."""
    import torch
    from bench.results import contents

    gpu = torch.cuda.get_device_name() if given.device == "cuda" else None
    rows = [[line["name"].replace("_", " "), _outcome(line), line["seconds"]] for line in lines]
    protocol = "tools/gpu_check.py" + (" --layouts" if given.layouts else "")
    if given.device == "cpu":
        protocol += " --device cpu: tiny models, no GPU was used"
    content = contents(given, ["check", "outcome", "seconds"], rows, f"{protocol}.", device=gpu, checks=lines)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _outcome(line: dict[str, Any]) -> str:
    """A cell of the table."""
    if line["pass"] is None:
        return f"skipped: {line['skipped']}"
    return "passed" if line["pass"] else "FAILED"


def main() -> int:
    """Exit status 0 when no check fails."""
    given = arguments()
    given.note, given.load_before = "", os.getloadavg()[0]
    set_up(given)
    chosen(given)
    folder = a_folder(given)
    lines = run_all(given, folder)
    failed = [line["name"] for line in lines if line["pass"] is False]
    if given.output and is_leader():
        write(given, lines)
    if given.layouts:
        import megatron_prune.backend as backend

        backend.shutdown()
    if not is_leader():
        return 1 if failed else 0
    if failed:
        print((folder / "log.txt").read_text(errors="replace")[-3000:], file=sys.stderr)
        print(f"gpu_check: {', '.join(failed)} failed; all that was said: {folder / 'log.txt'}", file=sys.stderr)
    elif given.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
