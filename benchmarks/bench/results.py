"""Arguments that programs have in common, and the file that each writes: what was measured, when, and on what.

    RESULTS/NAME_DATE.json      columns, rows, protocol, hardware, date; versions, commit, command, processor

`tools/readme_table.py` makes a document's table of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from .running import FEWEST

HERE = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "megatron-core", "transformers", "numpy")
INSTRUCTIONS = ("amx_tile", "avx512f", "avx2", "avx", "sse4_2", "sve2", "sve", "asimd")
"""Of x86 and of ARM, the widest first, as /proc/cpuinfo names them."""


class Option(NamedTuple):
    """An argument of `argparse`."""

    names: tuple[str, ...]
    how: dict[str, Any]


def option(*names: str, **how: Any) -> Option:
    """As `ArgumentParser.add_argument`."""
    return Option(names, how)


def work(folder: str) -> Option:
    """Where intermediate results are kept."""
    return option("--work", type=Path, default=Path(folder), help="what is kept here is not done again")


def note(default: str = "") -> Option:
    """A sentence for the result file."""
    return option("--note", default=default, help="what the result file must say of how these rows came about")


def rounds(default: int) -> Option:
    """How often what is compared takes turns."""
    return option("--rounds", "--repeats", type=_several, default=default, metavar="N", help=f"at least {FEWEST}")


def _several(text: str) -> int:
    if int(text) < FEWEST:
        raise argparse.ArgumentTypeError(f"{text} rounds are too few, the fewest are {FEWEST}")
    return int(text)


MODEL = option("--model", type=Path, required=True, help="Hugging Face directory")
SHARED = option("--shared", type=Path, default=Path("../shared"), help="has data/c4, data/wikitext2, data/zeroshot ...")
CALIBRATION = option("--calibration", type=Path, required=True, help="text, a document a line")
DEVICE = option("--device", choices=["cpu", "cuda"], default="cpu")
OUTPUT = option("--output", type=Path, default=HERE / "results", help="folder of the result file")


def arguments(doc: str | None, *options: Option) -> argparse.Namespace:
    """What was given on the command line; every program has `--output` and, unless it has its own, `--note`.

    Programs whose imports take seconds ask before those imports, so that `--help` and mistakes are answered at once.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = [OUTPUT] if any("--note" in names for names, _ in options) else [OUTPUT, note()]
    for names, how in (*options, *common):
        parser.add_argument(*names, **how)
    given = parser.parse_args()
    if getattr(given, "device", None) == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda was given and PyTorch sees no GPU")
    given.load_before = os.getloadavg()[0]
    if hasattr(given, "work"):
        given.work.mkdir(parents=True, exist_ok=True)
    return given


def write_result(
    name: str,
    given: argparse.Namespace,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    protocol: str,
    *,
    versions: dict[str, str] | None = None,
    device: str | None = None,
    **more: Any,
) -> Path:
    """Write and name the result file of today; see `contents`."""
    result = contents(given, columns, rows, protocol, versions=versions, device=device, **more)
    path = given.output / f"{name}_{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path)
    return path


def contents(
    given: argparse.Namespace,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    protocol: str,
    *,
    versions: dict[str, str] | None = None,
    device: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What a result file holds. `device`: what was measured on, where it was not the processor.

    ValueError for a row with more or fewer cells than there are columns.
    """
    if any(len(row) != len(columns) for row in rows):
        raise ValueError("a row has not as many cells as there are columns")
    processor = describe_processor()
    return {
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "protocol": f"{protocol} {given.note}".rstrip(),
        "hardware": device or f"{processor['name']}, {processor['cores']} cores",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()} | installed(*PACKAGES) | (versions or {}),
        **more,
        "load_before": given.load_before,  # other work on the machine
        "commit": commit(HERE),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": processor,
    }


def describe_processor(table: str | None = None) -> dict[str, Any]:
    """Model name, cores and widest instruction set, by /proc/cpuinfo (`table`) where there is one."""
    source = Path("/proc/cpuinfo")
    text = table if table is not None else source.read_text() if source.exists() else ""
    fields = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.+)$", text, re.MULTILINE))
    known = f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
    return {
        "name": fields.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "instruction_set": next((name for name in INSTRUCTIONS if name in known), platform.machine()),
    }


def installed(*packages: str) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit(folder: Path) -> str | None:
    """The commit that a folder is at, with `-dirty` behind it where files differ from it; None outside of git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
