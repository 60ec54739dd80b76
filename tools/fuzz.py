"""Hostile inputs to every verb: nothing may run code, end in a traceback, hang, leave or change something, or ramble.

    python tools/fuzz.py --processes 2 --output fuzz.json         every case, about half an hour on two cores
    python tools/fuzz.py --group tokenizers --group YAML          some groups
    python tools/fuzz.py --case tokenizers:17                     one case with the real command, its folder kept

One process imports everything once and forks a child for each case, which calls the command line's `main` in a folder
of its own, so a case takes about a second. The cases are drawn from their group's name and number: the same everywhere.
A command may succeed on an input that is hostile but not wrong; where the input is wrong beyond doubt it must not.
Printed is a table of tried and wrong by group and every wrong case; the exit status is 1 when there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fuzz_cases as cases

PREFIX = "megatron-prune: error: "
LIMIT_S = 10.0
"""Of CPU time; a case that waits without computing gets `PATIENCE_S` of wall time, for machines under load."""
PATIENCE_S = 40.0
MEMORY = 6 << 30
"""Bytes of address space that a case may add to what the imports take."""
RESIDENT = 4 << 20
"""KiB that a case may occupy."""
NOISE = ("Warning", "WARNING", "Traceback", "it/s", "%|", "ERROR", "[rank", "INFO")
MATPLOTLIB = "home/.config"
"""Made by matplotlib, as whoever uses it expects."""
HARNESS = 99
"""Exit status of a case that could not be made: a mistake in these tools."""


@dataclass
class Verdict:
    """What was wrong with a case; nothing when `faults` is empty."""

    name: str
    number: int
    note: str
    command: list[str]
    status: int | None
    seconds: float
    faults: list[str] = field(default_factory=list)
    error: str = ""


# --- what a folder holds ---


def snapshot(folder: Path) -> dict[str, list[Any]]:
    """Kind, content and time of everything below a folder, by relative name."""
    found: dict[str, list[Any]] = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(parent, name)
            found[os.path.relpath(path, folder)] = _signature(path)
    return found


def _signature(path: str) -> list[Any]:
    about = os.lstat(path)
    kind = stat.S_IFMT(about.st_mode)
    if stat.S_ISLNK(about.st_mode):
        return [kind, os.readlink(path)]
    if not stat.S_ISREG(about.st_mode):
        return [kind]
    if about.st_size > 1 << 30:
        return [kind, about.st_size, about.st_mtime_ns]
    with open(path, "rb") as file:
        return [kind, about.st_size, about.st_mtime_ns, hashlib.file_digest(file, "sha1").hexdigest()]


def _below(name: str, owners: tuple[str, ...]) -> bool:
    return any(name == owner or name.startswith(owner.rstrip("/") + "/") for owner in owners if owner)


# --- one case ---


def box_environment(box: Path) -> dict[str, str]:
    """Temporary files and the home of the case; caches are shared."""
    return {"TMPDIR": str(box / "tmp"), "HOME": str(box / "home")}


def make_case(box: Path, name: str, number: int, bases: Path) -> cases.Case:
    """Prepare the folder of a case and write down what it held."""
    for folder in ("tmp", "home"):
        (box / folder).mkdir(parents=True)
    case = cases.prepare(name, number, box / "in", bases)
    about = asdict(case) | {"before": snapshot(box / "in")}
    (box / "case.json").write_text(json.dumps(about))
    return case


def _limits() -> None:
    """Bounds of the address space and of core dumps, from here on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _redirect(box: Path) -> None:
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "out.txt", os.O_WRONLY), (2, "err.txt", os.O_WRONLY)):
        handle = os.open(box / name, flags | os.O_CREAT | os.O_APPEND if number else flags)
        os.dup2(handle, number)
        os.close(handle)


def child(box: Path, name: str, number: int, bases: Path) -> int:
    """What the forked process does; its exit status."""
    os.setsid()
    try:
        case = make_case(box, name, number, bases)
    except Exception:  # noqa: BLE001
        (box / "harness.txt").write_text(traceback.format_exc())
        return HARNESS
    os.environ.update(box_environment(box))
    tempfile.tempdir = None
    os.chdir(box / "in")
    sys.argv = ["megatron-prune", *case.command]
    _redirect(box)
    _limits()
    (box / "started").touch()
    return _call(case.command)


def _call(command: list[str]) -> int:
    from megatron_prune.__main__ import main

    try:
        return main(command)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        return 1


@dataclass
class Running:
    """A child and where it works."""

    process: int
    box: Path
    name: str
    number: int
    begun: float

    def seconds(self) -> float:
        """Wall time since the command began; 0 while its input is being made."""
        started = self.box / "started"
        return time.time() - started.stat().st_mtime if started.exists() else 0.0

    def cpu_seconds(self) -> float:
        """CPU time of the child so far."""
        try:
            fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def hangs(self) -> bool:
        """Whether it has computed, or waited, for too long."""
        wall = self.seconds()
        return wall > PATIENCE_S or (wall > LIMIT_S and self.cpu_seconds() > LIMIT_S) or time.time() - self.begun > 120


def start(work: Path, name: str, number: int) -> Running:
    """Fork a child for a case."""
    box = work / "boxes" / f"{name}_{number}".replace(" ", "_").replace("/", "_")
    shutil.rmtree(box, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if not process:
        status = HARNESS
        try:
            status = child(box, name, number, work / "bases")
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status & 0xFF)
    return Running(process, box, name, number, time.time())


# --- judgement ---


def _text(path: Path, most: int = 1 << 22) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return file.read(most).decode("utf-8", "replace")


def judge(box: Path, name: str, number: int, status: int | None, seconds: float, resident: int) -> Verdict:
    """Compare what a case has done with what is allowed; `status` None: it was ended because it hung."""
    if not (box / "case.json").exists():
        return Verdict(name, number, "", [], status, seconds, ["harness"], _text(box / "harness.txt"))
    case = json.loads((box / "case.json").read_text())
    out, err = _text(box / "out.txt"), _text(box / "err.txt")
    errors = [line for line in err.splitlines() if PREFIX in line]
    verdict = Verdict(name, number, case["note"], case["command"], status, round(seconds, 2))
    verdict.faults = [
        *(["code"] if (box / "marker").exists() else []),
        *(["hang"] if status is None else _faults_of_status(status, case, out, err)),
        *_faults_of_files(box, case, status, errors),
        *(["memory"] if resident > RESIDENT else []),
    ]
    verdict.error = (errors[0] if len(errors) == 1 and "traceback" not in verdict.faults else err[-1500:])[:1500]
    return verdict


def _faults_of_status(status: int, case: dict[str, Any], out: str, err: str) -> Iterator[str]:
    traced = "Traceback (most recent call last)" in out + err
    lines = [line for line in err.splitlines() if PREFIX in line]
    if traced:
        yield "traceback"
    if case["succeed"] and status != 0:
        yield "refused"
    if status == 0 and case["refuse"]:
        yield "accepted"
    if status == 1 and case["command"][0] == "verify" and not traced and not lines:
        return
    if status not in (0, 2):
        yield f"status {status}"
    if status == 2:
        if len(lines) != 1 and not (len(lines) == 0 and out.startswith("usage")):
            yield f"{len(lines)} lines"
        if any(len(line) > cases.MOST for line in lines):
            yield "long"
        if any(word in line for line in err.splitlines() if PREFIX not in line for word in NOISE):
            yield "noise"


def _faults_of_files(box: Path, case: dict[str, Any], status: int | None, errors: list[str]) -> Iterator[str]:
    before, after = case["before"], snapshot(box / "in")
    changes = tuple(case["changes"])
    kept = status == 0 or any("checkpoint is kept" in line for line in errors)
    new = [name for name in after if name not in before and not _below(name, changes)]
    left = [name for name in new if not (kept and _below(name, tuple(case["outputs"])))]
    left += [name for name in new if name.endswith(".partial") and name not in left]
    if status is not None and left:
        yield "left: " + ", ".join(sorted(left)[:3])
    changed = [name for name in before if after.get(name) != before[name] and not _below(name, changes)]
    if changed:
        yield "changed: " + ", ".join(sorted(changed)[:3])
    strays = [str(path.relative_to(box)) for folder in ("tmp", "home") for path in (box / folder).iterdir()]
    strays = [name for name in strays if name != MATPLOTLIB]
    if status is not None and strays:
        yield "stray: " + ", ".join(sorted(strays)[:3])


def finish(running: Running, result: tuple[int, Any] | None, keep: bool) -> Verdict:
    """Judge a child that has ended, or end one that hangs (`result` None), and tidy up."""
    seconds = running.seconds()
    survivors = _end_group(running.process)
    if result is None:
        _, code, usage = os.wait4(running.process, 0)
        status: int | None = None
    else:
        code, usage = result
        status = os.waitstatus_to_exitcode(code)
    verdict = judge(running.box, running.name, running.number, status, seconds, usage.ru_maxrss)
    if survivors and result is not None:
        verdict.faults.append("processes left")
    cases.unmount(running.box / "in/disk")
    if not (keep and verdict.faults):
        shutil.rmtree(running.box, ignore_errors=True)
    return verdict


def _end_group(process: int) -> bool:
    """Kill what is left of a child's session, after a moment for helpers to end; whether there was any."""
    for _ in range(20):
        try:
            os.killpg(process, 0)
        except ProcessLookupError:
            return False
        state = _states(process)
        if not state:
            return False
        time.sleep(0.05)
    os.killpg(process, signal.SIGKILL)
    return True


def _states(group: int) -> list[str]:
    """States of the living processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(fields[0])
    return found


# --- a whole run ---


def run_all(work: Path, wanted: list[tuple[str, int]], processes: int, keep: bool) -> Iterator[Verdict]:
    """Verdicts of all cases, in the order in which they end."""
    todo, running = list(reversed(wanted)), {}
    while todo or running:
        while todo and len(running) < processes:
            one = start(work, *todo.pop())
            running[one.process] = one
        ended = 0
        for process, one in list(running.items()):
            found, code, usage = os.wait4(process, os.WNOHANG)
            if found or one.hangs():
                yield finish(running.pop(process), (code, usage) if found else None, keep)
                ended += 1
        if not ended:
            time.sleep(0.01)


def prepare_environment(work: Path) -> None:
    """What all cases share: offline, one thread, caches inside the folder of the run."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    shared = {
        "HF_HOME": str(work / "hf_home"),
        "XDG_CACHE_HOME": str(work / "cache"),
        "TRITON_CACHE_DIR": str(work / "triton"),
    }
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_MONITOR_INTERVAL": "0"}
    path = {"PYTHONPATH": f"{cases.ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    os.environ.update(one | shared | fixed | path)


def make_bases(work: Path) -> None:
    """Good inputs, made in a process of its own: this one must not have computed before it forks."""
    if (work / "bases").exists():
        return
    code = "import sys, fuzz_cases; from pathlib import Path; fuzz_cases.make_bases(Path(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", code, str(work / cases.MAKING)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise SystemExit(f"the good inputs cannot be made:\n{made.stdout[-2000:]}{made.stderr[-3000:]}")
    (work / cases.MAKING).rename(work / "bases")


def one_case(work: Path, name: str, number: int) -> int:
    """Run a case with the real command in a process of its own; its folder stays."""
    box = work / "one"
    shutil.rmtree(box, ignore_errors=True)
    case = make_case(box, name, number, work / "bases")
    command = [sys.executable, "-m", "megatron_prune", *case.command]
    begun = time.time()
    with (box / "out.txt").open("wb") as out, (box / "err.txt").open("wb") as err:
        process = subprocess.Popen(
            command,
            cwd=box / "in",
            env=os.environ | box_environment(box),
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    verdict = judge(box, name, number, status, time.time() - begun, 0)
    cases.unmount(box / "in/disk")
    print(f"{case.note}\ncd {box / 'in'}; megatron-prune {' '.join(case.command)[:2000]}")
    print((box / "out.txt").read_text(errors="replace")[-1000:] + (box / "err.txt").read_text(errors="replace")[-6000:])
    print(f"status {status}, {verdict.seconds} s: {'; '.join(verdict.faults) or 'right'}")
    return int(bool(verdict.faults))


def table(verdicts: list[Verdict]) -> str:
    """Tried and wrong, by group."""
    lines = ["| group | tried | wrong | refused | accepted |", "| --- | --- | --- | --- | --- |"]
    for name in [*dict.fromkeys(each.name for each in verdicts)]:
        of = [each for each in verdicts if each.name == name]
        counts = [len(of), sum(bool(each.faults) for each in of), sum(each.status == 2 for each in of)]
        lines.append(f"| {name} | " + " | ".join(map(str, [*counts, sum(each.status == 0 for each in of)])) + " |")
    wrong = sum(bool(each.faults) for each in verdicts)
    return "\n".join([*lines, f"| all | {len(verdicts)} | {wrong} | | |"])


def report(verdicts: list[Verdict], output: Path | None, seconds: float) -> None:
    """Print the table and the wrong cases; write both as JSON."""
    wrong = [each for each in verdicts if each.faults]
    kinds = Counter(fault.partition(":")[0] for each in wrong for fault in each.faults)
    print(table(verdicts))
    print(f"{seconds:.0f} s; faults: {dict(kinds)}")
    if output is not None:
        groups = {
            name: {
                "tried": sum(each.name == name for each in verdicts),
                "wrong": sum(each.name == name for each in wrong),
            }
            for name in dict.fromkeys(each.name for each in verdicts)
        }
        found = {
            "tried": len(verdicts),
            "wrong": len(wrong),
            "seconds": round(seconds),
            "faults": kinds,
            "groups": groups,
        }
        output.write_text(json.dumps(found | {"wrong_cases": [asdict(each) for each in wrong]}, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--group", action="append", choices=list(cases.GROUPS), help="only this group; may be given again"
    )
    parser.add_argument("--case", help="GROUP:NUMBER: only this one, with the real command in a process of its own")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each group (default: 1)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each group")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work and to keep wrong cases; left out: a temporary one")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


def main() -> int:
    """Runs what is asked for."""
    arguments = parse_arguments()
    work = (arguments.folder or Path(tempfile.mkdtemp(prefix="fuzz_"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    prepare_environment(work)
    make_bases(work)
    if arguments.case:
        name, _, number = arguments.case.rpartition(":")
        return one_case(work, name, int(number))
    cases.load_all()
    begun, verdicts = time.time(), []
    names = arguments.group or list(cases.GROUPS)
    wanted = [
        (name, arguments.first + number)
        for name in names
        for number in range(max(1, round(cases.GROUPS[name][0] * arguments.share)))
    ]
    for verdict in run_all(work, wanted, arguments.processes, keep=arguments.folder is not None):
        verdicts.append(verdict)
        with (work / "verdicts.jsonl").open("a") as file:
            file.write(json.dumps(asdict(verdict)) + "\n")
        if verdict.faults:
            print(json.dumps(asdict(verdict), ensure_ascii=True)[:3000], flush=True)
    report(verdicts, arguments.output, time.time() - begun)
    if arguments.folder is None:
        shutil.rmtree(work, ignore_errors=True)
    return int(any(each.faults for each in verdicts))


if __name__ == "__main__":
    sys.exit(main())
