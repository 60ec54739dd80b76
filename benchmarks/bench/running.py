"""Running what is compared: commands and verbs, functions in processes of their own or side by side, and in turns.

Memory is resident memory as Linux counts it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
K = TypeVar("K")
Times = dict[str, float]
"""Seconds (and memory) by what they are of."""
GIB = 2**30
FEWEST = 3
"""Runs of which a spread can be told."""


def run(command: Sequence[object], **environment: str) -> tuple[Times, str]:
    """Run a command to its end: what it took with all its processes, `wall_s`, `cpu_s` and `peak_gib` (of the largest
    process, at least what this one has resident), and what it printed. SystemExit with the end of that when it fails.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        began = time.perf_counter()
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        log.seek(0)
        output = log.read()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{output[-4000:]}\n{' '.join(words)} failed with status {process.returncode}")
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / GIB
    return {"wall_s": wall, "cpu_s": cpu, "peak_gib": peak}, output


def verb(name: str, *words: object, processes: int = 1, **options: object) -> tuple[Times, str]:
    """Run a verb of megatron_prune, under torchrun on several processes; see `flags` for the options."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m"] if processes > 1 else []
    return run([sys.executable, "-m", *torchrun, "megatron_prune", name, *words, *flags(**options)])


def flags(**options: object) -> list[str]:
    """`seq_length=256` as `--seq-length 256`, True and False as `--x` and `--no-x`, all of a list; None is left out."""
    words: list[str] = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def kept(record: Path, measure: Callable[[], Any]) -> Any:
    """What `measure` returned when `record` was not there yet: it is kept there as JSON."""
    if not record.exists():
        record.write_text(json.dumps(measure()))
    return json.loads(record.read_text())


def apart(work: Callable[..., T], *arguments: Any, ranks: int = 1, threads: int | None = 1) -> list[T]:
    """What `work(*arguments)` returns on each rank, in new processes that find each other as under torchrun.

    `work` is a function of a module, its arguments and answers can be pickled. `threads`: of each process, None as many
    as it takes. SystemExit when one fails; its traceback has been printed.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    processes = [context.Process(target=_answer, args=(pipe[1], work, arguments), daemon=True) for pipe in pipes]
    for rank, (process, (_, answer)) in enumerate(zip(processes, pipes, strict=True)):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared if ranks > 1 else {}
        with _environment(own | limit):
            process.start()
        answer.close()
    try:
        found = [pipe[0].recv() for pipe in pipes]
    except EOFError:
        raise SystemExit(f"{work.__name__}{arguments} failed in a process of its own: see above") from None
    for process in processes:
        process.join()
    return found


def _answer(answer: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    answer.send(work(*arguments))


@contextlib.contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def forked(works: Sequence[Callable[[], Any]]) -> None:
    """Run all at once, each in a fork of this process, which has imported and loaded; RuntimeError when one fails."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_frozen, args=(work,)) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process failed; its traceback is above")


def _frozen(work: Callable[[], Any]) -> None:
    gc.freeze()  # what the collector would touch here would be copied
    work()


def side_by_side(sides: Mapping[str, Callable[[], Any]]) -> dict[str, Times]:
    """Seconds of each side, all started at the same moment, each in a fork of its own."""
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(len(sides)), context.SimpleQueue()

    def measured(name: str, work: Callable[[], Any]) -> None:
        gate.wait()
        results.put((name, seconds(work, clock=_with_children)))

    forked([partial(measured, name, work) for name, work in sides.items()])
    found = dict(results.get() for _ in sides)
    return {name: found[name] for name in sides}


def _with_children() -> float:
    """Processor seconds of this process and of all that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def seconds(
    work: Callable[[], Any], end: Callable[[], Any] | None = None, clock: Callable[[], float] = time.process_time
) -> Times:
    """`wall_s` and `cpu_s` of one run of `work`, of all threads, with `end` after it (a GPU's synchronisation)."""
    wall, cpu = time.perf_counter(), clock()
    work()
    if end is not None:
        end()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": clock() - cpu}


def in_turns(works: Mapping[K, Callable[[], T]], rounds: int, uncounted: int = 1) -> dict[K, list[T]]:
    """What each returned in every round, in which they take turns, after rounds that do not count."""
    found: dict[K, list[T]] = {name: [] for name in works}
    for number in range(uncounted + rounds):
        for name, work in works.items():
            one = work()
            if number >= uncounted:
                found[name].append(one)
    return found


def each(reduce: Callable[[list[float]], float], runs: Sequence[Times]) -> Times:
    """A number (`min`, `median`) of every key over the runs."""
    return {key: reduce([one[key] for one in runs]) for key in runs[0]}


def ratios(base: Sequence[Times], other: Sequence[Times], key: str) -> list[float]:
    """How many times as long the base took as the other, round by round, so that what slows both cancels."""
    return [one[key] / another[key] for one, another in zip(base, other, strict=True)]


def spread(values: Sequence[float]) -> Times:
    """Smallest, median and largest; ValueError for too few to tell."""
    if len(values) < FEWEST:
        raise ValueError(f"{len(values)} runs: a spread takes at least {FEWEST}")
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def process_bytes(field: str) -> int:
    """A field of /proc/self/status: `VmRSS`, what is resident, or `VmHWM`, its peak."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def restart_peak() -> None:
    """Let `VmHWM` begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(work: Callable[[], T], device: str = "cpu") -> tuple[T, int]:
    """What `work` returns, and what this process had at most meanwhile beyond what it had before: resident, or
    allocated on a GPU.
    """
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        result = work()
        return result, torch.cuda.max_memory_allocated() - allocated
    restart_peak()
    before = process_bytes("VmRSS")
    result = work()
    return result, process_bytes("VmHWM") - before


def cost(work: Callable[[], T], device: str = "cpu", repeats: int = 1) -> tuple[T, Times]:
    """What `work` returns, and the `best` of its `wall_s`, `cpu_s` and `peak_bytes`."""
    made: list[T] = []

    def once() -> Times:
        made.clear()
        return seconds(lambda: made.append(work()), _synchronise if device == "cuda" else None)

    found = [peak_bytes(once, device) for _ in range(repeats)]
    return made[0], best([times | {"peak_bytes": peak} for times, peak in found])


def best(costs: Sequence[Times]) -> Times:
    """The shortest times and the largest peak."""
    return each(min, costs) | {"peak_bytes": max(one["peak_bytes"] for one in costs)}


def _synchronise() -> None:
    import torch

    torch.cuda.synchronize()


def gpu_seconds(work: Callable[..., Any], events: int = 2) -> list[float]:
    """Between the events that `work` records, run behind a multiplication that outlasts its launches."""
    import torch

    made = [torch.cuda.Event(enable_timing=True) for _ in range(events)]
    blocker = torch.ones(8192, 8192, device="cuda")
    torch.mm(blocker, blocker)
    work(*made)
    torch.cuda.synchronize()
    return [made[i].elapsed_time(made[i + 1]) / 1e3 for i in range(events - 1)]
