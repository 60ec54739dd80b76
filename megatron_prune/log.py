"""What a run tells: process 0's console, `metrics.jsonl`, TensorBoard events and `environment.json`.

Every process may call everything here; only process 0 prints and writes. In a terminal, and in a notebook with
ipywidgets, long work shows a bar, elsewhere (log files, batch jobs) plain lines. Names of machines, users and folders
are never recorded.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import torch.distributed as dist
from pydantic import AfterValidator, Field
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megatron_prune.console import PipedConsole
from megatron_prune.device import has_cuda
from megatron_prune.files import write_json, write_text
from megatron_prune.foreign import parse_json, read_regular
from megatron_prune.schema import Count

PACKAGES = (
    "megatron-prune",
    "torch",
    "megatron-core",
    "transformers",
    "lm-eval",
    "safetensors",
    "numpy",
    "transformer-engine",
    "triton",
)
MOST_BYTES = 4_000_000_000
"""Of metrics.jsonl."""
_Value = None | bool | Annotated[float, Field(ge=-1e200, le=1e200)] | list[Count]


def _counted(record: dict[str, Any]) -> dict[str, Any]:
    step = record.get("step", 0)
    if type(step) is not int or step < 0:
        raise ValueError("key 'step': a whole number of at least 0 is allowed")
    return record


_Record = Annotated[dict[str, Annotated[int, Field(ge=-(2**63), lt=2**63)] | _Value], AfterValidator(_counted)]
"""Schema of a line: figures, and lists of numbers."""
METRICS = "metrics.jsonl"
LEFT_START = "differs_from_start_fraction"
"""Metric of runs that learn masks: the share of groups whose best pattern is another than at the start."""
PLAIN_INTERVAL_S = 10.0
"""Seconds between lines of progress outside a terminal."""


def is_leader() -> bool:
    """True on process 0, before and after the process group exists."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


@cache
def console() -> Console:
    """The one console of this process: standard output, silent on all processes but 0."""
    return PipedConsole(highlight=False, soft_wrap=True, emoji=False, quiet=not is_leader())


def say(message: str) -> None:
    """One plain line from process 0."""
    console().print(escape(message))


@contextlib.contextmanager
def progress(title: str, total: int | None, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Yields `advance(count)` for work of `total` pieces called `unit`; None: nobody knows yet how many."""
    screen = console()
    if shows_bars(screen):
        with _bar(screen, unit, known=total is not None) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count: bar.advance(task, count)
        return
    plain = _PlainProgress(title, total, unit)
    yield plain.advance


def shows_bars(screen: Console) -> bool:
    """Whether a bar can move there: in a terminal, or in a Jupyter notebook that has widgets."""
    if screen.is_jupyter:
        return not screen.quiet and find_spec("ipywidgets") is not None
    return screen.is_terminal and not screen.quiet


def _bar(screen: Console, unit: str, auto_refresh: bool = True, known: bool = True) -> Progress:
    """`known`: whether how many pieces there are is known, and so what is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    ahead = (TimeRemainingColumn(), TextColumn("left")) if known else ()
    times = (TimeElapsedColumn(), TextColumn("gone" + "," * known), *ahead)
    return Progress(*columns, *times, console=screen, auto_refresh=auto_refresh)


class _PlainProgress:
    """Progress as lines, one every `PLAIN_INTERVAL_S` seconds and one at the end, where that is known."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0
        self.began = self.told = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told >= PLAIN_INTERVAL_S or (self.total is not None and self.done >= self.total):
            self.told = now
            unit = f" {self.unit}" if self.unit else ""
            of_all = "" if self.total is None else f"/{self.total}"
            gone = now - self.began
            ahead = "" if not self.total or self.done >= self.total else f", {self._left(gone):.0f} s left"
            say(f"{self.title}: {self.done}{of_all}{unit} ({gone:.0f} s{ahead})")

    def _left(self, gone: float) -> float:
        assert self.total is not None
        return gone / max(1, self.done) * (self.total - self.done)


class MetricsLog:
    """The metrics of one run folder: `metrics.jsonl` (append-only, flushed) and TensorBoard events."""

    def __init__(self, folder: Path, name: str = "step") -> None:
        """`name` is what the console calls a step."""
        self.path = folder / METRICS
        self.name = name
        self._folder = folder
        self._file: TextIO | None = None
        self._events: Any = None
        self._first = self._done = self._total = 0
        self._began = 0.0
        self._bar: tuple[Progress, TaskID] | None = None

    def resume_at(self, done: int, checkpoint: Path | None = None) -> None:
        """Forget what was written about steps after `done`, everything at 0 (a run that died behind a checkpoint).

        The metrics in a `checkpoint` have been compared with their checksum; where it has some, they are used.
        """
        self._first = self._done = done
        kept_there = checkpoint is not None and (checkpoint / METRICS).is_file()
        if not is_leader() or not (kept_there or self.path.exists()):
            return
        self.close()
        source = checkpoint if checkpoint is not None and kept_there else self._folder
        kept = [record for record in read_metrics(source) if record.get("step", 0) <= done] if done else []
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    @contextlib.contextmanager
    def steps(self, total: int) -> Iterator[None]:
        """While a run goes from where it resumed to step `total`: a bar in a terminal, elsewhere the time left."""
        self._total, self._began = total, time.monotonic()
        screen = console()
        if not shows_bars(screen):
            yield
            return
        with _bar(screen, "", auto_refresh=False) as bar:  # no thread of its own: a background save forks
            self._bar = bar, bar.add_task(self.name, total=total, completed=self._first)
            try:
                yield
            finally:
                self._bar = None

    def write(self, record: dict[str, Any], shown: Sequence[str] | None = None) -> None:
        """One line; `step` counts finished steps. Numbers go to TensorBoard too, a summary to the console.

        `shown` are the keys for the console, all when left out; where there is a bar, the first of them stands in it
        and no line is printed. Values not finite become null.
        """
        if not is_leader():
            return
        if self._file is None:
            self._file = self._open()
        self._file.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")
        self._file.flush()
        if "step" in record:
            self._write_events(record)
            self._done = record["step"]
        if self._bar is None or shown is None:
            say(self._line(record, shown))
        else:
            bar, task = self._bar
            title = f"{self.name}  {_words(record, shown[:1])}"
            bar.update(task, completed=self._done, description=escape(title), refresh=True)

    def sync(self) -> None:
        """Push the metrics to the disk, as a checkpoint that counts on them is."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files; a later `write` opens them again."""
        if self._file is not None:
            self._file.close()
            self._events.close()
        self._file = self._events = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> TextIO:
        from torch.utils.tensorboard import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        threading.excepthook = _not_twice
        self._events = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._first + 1)
        return self.path.open("a", encoding="utf-8")

    def _write_events(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                self._events.add_scalar(key, value, record["step"])
        self._events.flush()

    def _line(self, record: dict[str, Any], shown: Sequence[str] | None) -> str:
        words = _words(record, [key for key in record if key != "step"] if shown is None else shown)
        if "step" not in record:
            return words
        head = f"{self.name} {record['step']}" + (f"/{self._total}" if self._total else "")
        return "  ".join([head, words, *self._time_left()])

    def _time_left(self) -> list[str]:
        steps = self._done - self._first
        if steps < 1 or self._done >= self._total:
            return []
        left = (time.monotonic() - self._began) / steps * (self._total - self._done)
        return [f"left {left / 60:.0f} min" if left >= 90 else f"left {left:.0f} s"]


_excepthook = threading.excepthook


def _not_twice(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread would show a full or failing disk as a traceback; `flush` raises the same in ours."""
    foreign = type(failure.thread).__module__.startswith("tensorboard.")
    if not (foreign and issubclass(failure.exc_type, OSError)):
        _excepthook(failure)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run folder's metrics.jsonl, none where there is no such file.

    A last line without its end, which a process is writing or died in, is left out. UserError for a damaged one.
    """
    path = folder / METRICS
    data = read_regular(path, "a run", MOST_BYTES) if path.is_file() else b""
    return [_record(line, f"{path}:{number}") for number, line in enumerate(data.split(b"\n")[:-1], 1)]


def left_start(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the groups whose pattern was another at the end than at the start; None for what learns no masks."""
    return next((line[LEFT_START] for line in reversed(metrics) if LEFT_START in line), None)


def _record(line: bytes, where: str) -> dict[str, Any]:
    record: dict[str, Any] = parse_json(line, where, _Record, "restore the run folder")
    return record


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _words(record: dict[str, Any], keys: Sequence[str]) -> str:
    return "  ".join(f"{key} {_short(record[key])}" for key in keys if key in record)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def write_environment(folder: Path, **more: Any) -> None:
    """`environment.json`: versions, devices and process count, plus what the caller adds."""
    if not is_leader():
        return
    write_json(folder / "environment.json", {**environment(), **more})


def environment() -> dict[str, Any]:
    """Versions, devices, whether they round to TF32 or must give the same bits in every run, threads and processes."""
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _installed(name))},
        "devices": device_names(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cpu_threads": torch.get_num_threads(),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "platform": f"{sys.platform} {platform.machine()}",
    }


def device_names() -> list[str]:
    """Names of the GPUs, or of the processor when none is used."""
    gpus = range(torch.cuda.device_count()) if has_cuda() else ()
    return [torch.cuda.get_device_name(index) for index in gpus] or [_processor()]


def _processor() -> str:
    """The processor's product name where the system tells it, otherwise its architecture."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
