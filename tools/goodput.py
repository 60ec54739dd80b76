"""What a run loses to being killed every so often: `kill_test.py --every S` uses this.

Two arms start side by side, with the same flags and one thread each, so that what else the machine does slows both:
`whole` is left alone, `killed` gets a SIGKILL for its whole process group every S seconds and is started again with the
same command until it is done. While the killed arm still runs and the whole one is done, a third run (`beside`) takes
its place, so that the load stays what it was. Every process's life is told apart by what it leaves behind:

    start-up    from its start until its run folder says that it begins or goes on: imports, text, the dense model
    load        from there to its first step: the prior, the optimizer, the checkpoint checked and read
    steps       optimizer steps, kept or lost: those after the last whole checkpoint, which the next process does again
    between     what is between the steps: saves, metrics
    end         after its last line of metrics: a step or save that was cut off, or the decision that was written

The clock is the wall's, or with `cpu` the seconds of processor time that an arm has used, which others on a shared
machine change little.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

POLL_S = 0.05
TICKS = os.sysconf("SC_CLK_TCK")
RESUMED = re.compile(r"resumed from \S*step_(\d+)")
PHASES = ("start_up", "load", "kept", "lost", "between", "end")


@dataclass
class Life:
    """One process of an arm; times on its arm's clock and, for what files tell, on the wall's."""

    began: float
    born: float
    """Wall-clock time."""
    first: int | None = None
    """Steps done by the checkpoint that it went on from; None when it did not come so far."""
    ready: float | None = None
    """Wall-clock time at which its run folder said that it begins or goes on."""
    steps: list[tuple[int, float, float]] = field(default_factory=list)
    """(number, seconds, wall-clock time at which its line of metrics was there)"""
    ended: float = 0.0
    died: float = 0.0
    """Wall-clock time."""
    killed: bool = False

    def phases(self, kept: int) -> dict[str, float]:
        """Wall seconds by phase, when the steps up to `kept` did not have to be done again."""
        ready = self.ready or self.died
        first_step = self.steps[0][2] - self.steps[0][1] if self.steps else self.died
        last = self.steps[-1][2] if self.steps else self.died
        within = sum(seconds for _number, seconds, _at in self.steps)
        done = sum(seconds for number, seconds, _at in self.steps if number <= kept)
        between = last - first_step - within if self.steps else 0.0
        spent = (ready - self.born, first_step - ready, done, within - done, between, self.died - last)
        return dict(zip(PHASES, spent, strict=True))


class Arm:
    """A run that is started, watched and, when it is its lot, killed."""

    def __init__(self, start: Callable[[Path], subprocess.Popen[bytes]], run: Path, every: float | None, clock: str):
        self.start, self.run, self.every, self.clock = start, run, every, clock
        self.log = run.parent / f"{run.name}.log"
        self.lives: list[Life] = []
        self.used = 0.0
        """Processor seconds of processes that have ended."""
        self.born = time.time()
        self.process = self._begin()

    def _begin(self) -> subprocess.Popen[bytes]:
        self.resumptions = self._resumptions()
        self.said = self.log.stat().st_size if self.log.exists() else 0
        self.left = self._metrics()
        self.lives.append(Life(self.now(), time.time()))
        return self.start(self.run)

    def now(self) -> float:
        """Seconds on the arm's clock since it began."""
        return time.time() - self.born if self.clock == "wall" else self.cpu()

    def cpu(self) -> float:
        """Processor seconds of all its processes so far."""
        return self.used + (_cpu_of(self.process.pid) if self.lives and hasattr(self, "process") else 0.0)

    def _metrics(self) -> int | None:
        """What tells the metrics of this process from those that it found: it writes them anew when it goes on."""
        path = self.run / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None

    def _resumptions(self) -> int:
        return len(list(self.run.glob("config.resumed.*.yaml")))

    def watch(self) -> bool:
        """Note what has happened and kill when it is time; False once the run is done. RuntimeError when it failed."""
        life = self.lives[-1]
        status = self._ended(life)
        self._look(life)
        if status is not None:
            if status != 0:
                raise RuntimeError(f"{self.run} ended with status {status}: see {self.log}")
            return False
        if self.every is not None and self.now() - life.began >= self.every:
            return self._kill(life)
        return True

    def _ended(self, life: Life) -> int | None:
        found, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not found:
            return None
        self._settle(life, usage)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode

    def _settle(self, life: Life, usage: Any) -> None:
        self.used += usage.ru_utime + usage.ru_stime
        life.died = time.time()
        life.ended = self.used if self.clock == "cpu" else life.died - self.born

    def _kill(self, life: Life) -> bool:
        """Kill the process and begin the next one; False when the run was done by then."""
        os.killpg(self.process.pid, signal.SIGKILL)
        _found, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self._settle(life, usage)
        self._look(life)
        life.killed = self.process.returncode == -signal.SIGKILL
        print(f"killed {sum(x.killed for x in self.lives)} times, step {self.last_step()}", flush=True)
        done = json.loads((self.run / "run.json").read_text())["state"] == "decided" if life.ready else False
        if not done:
            self.process = self._begin()
        return not done

    def _look(self, life: Life) -> None:
        """Read what the process has left behind since the last look."""
        if life.ready is None:
            new = self._resumptions() > self.resumptions or (len(self.lives) == 1 and (self.run / "run.json").exists())
            life.ready = time.time() if new else None
        if life.ready is not None and life.first is None:
            life.first = self._resumed()
        if life.first is not None and self._metrics() not in (None, self.left):
            self._read_steps(life)

    def _resumed(self) -> int | None:
        """Steps done by the checkpoint that the present process has read; 0 once it has begun without one."""
        found = RESUMED.findall(self.log.read_bytes()[self.said :].decode(errors="replace"))
        if found:
            return int(found[-1])
        return 0 if b"step 1/" in self.log.read_bytes()[self.said :] else None

    def _read_steps(self, life: Life) -> None:
        path = self.run / "metrics.jsonl"
        now = path.stat().st_mtime
        seen = life.steps[-1][0] if life.steps else life.first or 0
        for record in map(json.loads, path.read_text().rpartition("\n")[0].splitlines()):
            if record["step"] > seen and "step_s" in record:
                life.steps.append((record["step"], record["step_s"], now))

    def last_step(self) -> int:
        """The newest step that any of its processes has done."""
        return max((step for life in self.lives for step, _s, _at in life.steps), default=0)

    def stop(self) -> None:
        """End it wherever it is."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            os.wait4(self.process.pid, 0)
            self.process.returncode = -signal.SIGKILL

    def account(self) -> dict[str, Any]:
        """Where its time went, in seconds of the wall's clock by phase."""
        sums = dict.fromkeys(PHASES, 0.0)
        again = 0
        for number, life in enumerate(self.lives):
            later = [x.first for x in self.lives[number + 1 :] if x.first is not None]
            kept = later[0] if later else self.last_step()
            again += sum(step > kept for step, _s, _at in life.steps)
            for phase, seconds in life.phases(kept).items():
                sums[phase] += seconds
        return {
            "wall_s": self.lives[-1].died - self.born,
            "cpu_s": self.used,
            "processes": len(self.lives),
            "kills": sum(life.killed for life in self.lives),
            "steps": self.last_step(),
            "steps_done_again": again,
            "phases_s": sums,
            "lives": [asdict(life) for life in self.lives],
        }


def _cpu_of(pid: int) -> float:
    """Processor seconds of a process and its threads."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / TICKS


def side_by_side(
    start: Callable[[Path], subprocess.Popen[bytes]], folder: Path, every: float, clock: str
) -> dict[str, Any]:
    """Run both arms to their ends; what they took."""
    whole = Arm(start, folder / "whole", None, clock)
    killed = Arm(start, folder / "killed", every, clock)
    beside: Arm | None = None
    loads = []
    arms, goes_on = (whole, killed), {whole: True, killed: True}
    try:
        while goes_on[killed] or goes_on[whole]:
            time.sleep(POLL_S)
            for arm in arms:
                goes_on[arm] = goes_on[arm] and arm.watch()
            if not goes_on[whole] and beside is None:
                beside = Arm(start, folder / "beside", None, clock)
            loads.append(os.getloadavg()[0])
    finally:
        for arm in filter(None, (whole, killed, beside)):
            arm.stop()
    a, b = whole.account(), killed.account()
    return {
        "every_s": every,
        "clock": clock,
        "wall_ratio": b["wall_s"] / a["wall_s"],
        "cpu_ratio": b["cpu_s"] / a["cpu_s"],
        "load": {"mean": sum(loads) / len(loads), "least": min(loads), "most": max(loads)},
        "cores": os.cpu_count(),
        "whole": a,
        "killed": b,
    }


def tensors(run: Path) -> dict[str, bytes]:
    """The bytes of the tensors in the last checkpoint of a run."""
    last = max((run / "checkpoints").glob("step_*"))
    return {f"{last.name}/{path.name}": path.read_bytes() for path in last.glob("*.distcp")}


def rows(result: dict[str, Any]) -> Sequence[Sequence[Any]]:
    """Lines of the result's table: an arm, its wall and processor seconds, then its phases."""
    return [
        [name, arm["kills"], arm["wall_s"], arm["cpu_s"], *(arm["phases_s"][phase] for phase in PHASES)]
        for name, arm in (("left alone", result["whole"]), ("killed", result["killed"]))
    ]


def describe(
    found: dict[str, Any], same: dict[str, bool], flags: Sequence[str], run: Path, tolerance: float = 0.0
) -> dict[str, Any]:
    """The result file: a table, and all that was measured; hardware and versions are the run's own.

    `same`: what is equal within `tolerance`, 0: bit for bit.
    """
    how = f"within {tolerance:g}" if tolerance else "bit for bit"
    environment = json.loads((run / "environment.json").read_text())
    ratio, cpu, load = found["wall_ratio"], found["cpu_ratio"], found["load"]
    last = f"step {found['whole']['steps']}"
    return {
        "columns": ["run", "kills", "wall s", "CPU s", *(f"{phase.replace('_', '-')} s" for phase in PHASES)],
        "rows": rows(found),
        "hardware": f"{environment['devices'][0]}, {found['cores']} cores",
        "date": datetime.date.today().isoformat(),
        "versions": environment["packages"],
        "protocol": (
            f"Masks learned to {last}, killed every {found['every_s']:g} s ({found['clock']} clock) and started again, "
            f"beside the same run left alone, one thread each: {ratio:.2f} times its wall time, {cpu:.2f} times its "
            f"CPU seconds; {'equal' if all(same.values()) else 'NOT equal'} {how} in {', '.join(same)}. Load of "
            f"the machine {load['least']:.1f} to {load['most']:.1f}, mean {load['mean']:.1f}."
        ),
        how.replace(" ", "_") if tolerance else "bit_identical": same,
        "flags": [re.sub(r"^/.*/", "", word) for word in flags],
        **found,
    }
