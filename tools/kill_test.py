"""Kill a mask-learning run at random moments, resume it each time, and compare it with one that was left alone.

    python tools/kill_test.py --kills 20 --folder /tmp/kill_test -- \\
        --input dense --method maskllm --target 2:4 --data text.jsonl --train-iters 400 --save-interval 10 ...

What follows `--` are flags of `prune` without --output. A kill is SIGKILL, drawn from three kinds: while the process
starts up, after a random number of steps, or while a checkpoint is being written. The run must end with the loss curve,
the gradient norms and the masks of the run that was left alone, bit for bit; otherwise the exit status is 1. Both runs
stay in the folder, `whole` and `killed`. On GPUs runs differ in their last bits unless `--deterministic` is among the
flags; `--tolerance 1e-3` allows each number of the curve that much of itself, and masks as large a share of other bits.

    python tools/kill_test.py --every 120 --result FILE.json --folder /tmp/goodput -- --input ...

kills every 120 seconds instead, while the run that is left alone goes on beside it, and tells where the time went
(`goodput.py`); the tensors of the last checkpoints are compared, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__:
    from tools import goodput
else:
    import goodput

POLL_S = 0.001
PATIENCE_S = 300.0
STARTUP_S = 6.0
SAVE_S = 0.04
"""Longest waits drawn before a kill: while starting up, and inside a save."""
TIMINGS = ("tokens_per_s", "step_s", "model_tflop_per_s", "model_flop_utilisation", "peak_memory_gib")


def start(flags: Sequence[str], run: Path) -> subprocess.Popen[bytes]:
    """The run as a process of its own, beginning or going on."""
    command = [sys.executable, "-m", "megatron_prune", "prune", *flags, "--output", str(run), "--restartable"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)


def last_step(run: Path) -> int:
    """The newest step in the metrics, 0 without any."""
    path = run / "metrics.jsonl"
    complete = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return json.loads(complete[-1])["step"] if complete else 0


def half_written(run: Path) -> set[tuple[int, int]]:
    """What tells checkpoints that are being written, or were when the run was killed, from each other."""
    found = set()
    for path in (run / "checkpoints").glob("*.partial"):
        with contextlib.suppress(FileNotFoundError):  # it may have got its name meanwhile
            found.add((path.stat().st_ino, path.stat().st_ctime_ns))
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Poll until the condition holds or the process has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the run neither went on nor ended")
        time.sleep(POLL_S)


def kill_once(process: subprocess.Popen[bytes], run: Path, wanted: int, generator: random.Random) -> str:
    """End a run that has just been started, after step `wanted`; says where: `ended` when the run was quicker."""
    moment = generator.choices(["starting", "stepping", "saving"], weights=[1, 5, 4])[0]
    left = half_written(run)
    if moment == "starting":
        until = time.monotonic() + generator.uniform(0, STARTUP_S)
        wait_until(lambda: time.monotonic() > until, process)
    else:
        before = metrics_version(run)
        wait_until(lambda: metrics_version(run) != before, process)
        wait_until(lambda: last_step(run) >= wanted, process)
        if moment == "saving":
            wait_until(lambda: bool(half_written(run) - left), process)
            time.sleep(generator.uniform(0, SAVE_S))
    if process.poll() is not None:
        return "ended"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if half_written(run) - left:
        return "while saving"
    return "while starting" if moment == "starting" else "between saves"


def metrics_version(run: Path) -> tuple[int, int] | None:
    """What changes whenever the metrics do."""
    path = run / "metrics.jsonl"
    return (path.stat().st_ino, path.stat().st_size) if path.exists() else None


def kill_and_resume(flags: Sequence[str], run: Path, kills: int, steps: int, seed: int = 0) -> Counter[str]:
    """Do a run of `steps` optimizer steps with `kills` interruptions spread over it; how many happened where."""
    generator = random.Random(seed)
    counts: Counter[str] = Counter()
    for number in range(kills):
        process = start(flags, run)
        wanted = int((number + generator.random()) * steps / (kills + 1))
        counts[kill_once(process, run, wanted, generator)] += 1
        print(f"killed {sum(counts.values())} of {kills}: {dict(counts)}, step {last_step(run)}", flush=True)
    finish(start(flags, run), run)
    return counts


def finish(process: subprocess.Popen[bytes], run: Path) -> None:
    """Let a run end by itself; RuntimeError when it fails."""
    if process.wait(timeout=3600) != 0:
        raise RuntimeError(f"{run} failed: see {run.name}.log beside it")


def curve(run: Path) -> list[dict[str, float]]:
    """The metrics without what depends on the clock."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]


def masks(run: Path) -> dict[str, bytes]:
    """The bytes of every mask file of a run."""
    return {path.name: path.read_bytes() for path in (run / "decision").glob("*.safetensors")}


def near(found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]], tolerance: float) -> bool:
    """Whether two curves have the same numbers, each within `tolerance` of itself; without one, bit for bit."""
    if not tolerance:
        return found == expected
    if len(found) != len(expected):
        return False
    return all(
        record.keys() == other.keys()
        and all(math.isclose(record[key], other[key], rel_tol=tolerance, abs_tol=tolerance**2) for key in record)
        for record, other in zip(found, expected, strict=True)
    )


def other_bits(found: dict[str, bytes], expected: dict[str, bytes]) -> float:
    """Share of the bits of mask files that differ; 1 where there are none, or other files or sizes."""
    sizes = {name: len(data) for name, data in expected.items()}
    if not sizes or sizes != {name: len(data) for name, data in found.items()}:
        return 1.0
    differing = [int.from_bytes(found[name]) ^ int.from_bytes(expected[name]) for name in sizes]
    return sum(number.bit_count() for number in differing) / (8 * sum(sizes.values()))


def alike(killed: Path, whole: Path, tolerance: float) -> dict[str, bool]:
    """What of two runs agrees."""
    return {
        "curve": near(curve(killed), curve(whole), tolerance),
        "masks": other_bits(masks(killed), masks(whole)) <= tolerance,
    }


def kill_every(given: argparse.Namespace) -> int:
    """Kill a run every so many seconds and write what that cost; exit status 0 when it equals one left alone."""
    found = goodput.side_by_side(lambda run: start(given.flags, run), given.folder, given.every, given.clock)
    whole, killed, result = given.folder / "whole", given.folder / "killed", given.result
    same = alike(killed, whole, given.tolerance)
    if not given.tolerance:
        same["last checkpoint"] = goodput.tensors(killed) == goodput.tensors(whole)
    content = goodput.describe(found, same, given.flags, whole, given.tolerance)
    if result is not None:
        result.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({"columns": content["columns"], "rows": content["rows"], "same": same}, indent=1))
    return 0 if all(same.values()) else 1


def main() -> int:
    """Exit status 0 when the killed run equals the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=float, help="seconds between kills, instead of --kills at random moments")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="whose seconds --every counts")
    parser.add_argument("--result", type=Path, help="JSON file for what --every finds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=0.0, help="by which the runs may differ; 0: not a bit")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("flags", nargs="+", help="flags of prune, after --")
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    if given.every is not None:
        return kill_every(given)
    whole, killed = given.folder / "whole", given.folder / "killed"
    finish(start(given.flags, whole), whole)
    steps = last_step(whole)
    counts = kill_and_resume(given.flags, killed, given.kills, steps, given.seed)
    same = alike(killed, whole, given.tolerance)
    key = f"within_{given.tolerance:g}" if given.tolerance else "bit_identical"
    print(json.dumps({"kills": sum(counts.values()), **counts, "steps": steps, key: same}))
    return 0 if all(same.values()) and not counts["ended"] else 1


if __name__ == "__main__":
    sys.exit(main())
