"""What damaged files, full disks and disks that fail do to every kind of file that the product reads or writes.

    python tools/storage_test.py --model HF_DIRECTORY --text FILE.jsonl --folder /tmp/storage_test \\
        --result benchmarks/results/storage_DATE.json [--tmpfs]

Between runs a file is cut, loses a bit, is emptied or goes; during runs the disk is full (a small tmpfs, which root can
mount: `--tmpfs`), a write or an fsync fails, or every one of them is slow (a library that is preloaded; needs a C
compiler). Then the command that reads the file is given. Right is either that it ends as if nothing had been (from the
last good state, or with what was damaged made anew), to the bit, or that it says one line with status 2, leaves nothing
half-written, and ends as if nothing had been once the file is restored or there is room. A run that ends otherwise than
without the fault is wrong, whatever it says.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.kill_verbs import SEARCH, begin, contents, ended, load, prepare

PATIENCE_S = 600.0
LONGEST = 500
"""Characters of a message."""
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/types.h>
#include <sys/uio.h>
static long left = -1;
static int hit(int fd, const char *call) {
    char link[64], path[4096];
    const char *where = getenv("SHIM_WHERE"), *what = getenv("SHIM_CALL"), *slow = getenv("SHIM_SLOW_US");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0 || !where) return 0;
    path[n] = 0;
    if (!strstr(path, where)) return 0;
    if (slow) { usleep(atoi(slow)); return 0; }
    if (!what || strcmp(what, call)) return 0;
    if (left < 0) left = atol(getenv("SHIM_AFTER"));
    if (left-- > 0) return 0;
    left = 0;
    errno = EIO;
    return 1;
}
ssize_t write(int fd, const void *data, size_t n) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    return hit(fd, "write") ? -1 : real(fd, data, n);
}
ssize_t writev(int fd, const struct iovec *v, int n) {
    static ssize_t (*real)(int, const struct iovec *, int);
    if (!real) real = dlsym(RTLD_NEXT, "writev");
    return hit(fd, "write") ? -1 : real(fd, v, n);
}
int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    return hit(fd, "fsync") ? -1 : real(fd);
}
"""

TEXT = ["--calibration", "../inputs/text.jsonl", "--calibration-samples", "16", "--calibration-seq-length", "64"]
STEPS = ["--seq-length", "64", "--global-batch-size", "2", "--lr", "3e-4", "--min-lr", "0", "--save-interval", "3"]
STEPS += ["--eval-interval", "1000", "--train-iters", "12", "--restartable"]
LEARN = ["prune", "--input", "../inputs/dense", "--method", "maskllm", "--target", "2:4", "--prior", "wanda", *TEXT]
LEARN += ["--data", "../inputs/text.jsonl", *STEPS]
FLAP = ["prune", "--input", "../inputs/dense", "--method", "flap", *TEXT, "--statistics", "statistics"]
DARWIN = ["prune", "--input", "../inputs/dense", "--method", "darwinlm", *TEXT, *SEARCH, "--database", "levels"]


def truncated(file: Path, generator: random.Random) -> None:
    """The end is missing."""
    file.write_bytes(file.read_bytes()[: -max(1, file.stat().st_size // 3)])


def flipped(file: Path, generator: random.Random) -> None:
    """One bit is another, anywhere."""
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)


def missing(file: Path, generator: random.Random) -> None:
    """It is gone."""
    file.unlink()


def empty(file: Path, generator: random.Random) -> None:
    """Its name is there and nothing in it, as after a power failure."""
    file.write_bytes(b"")


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": truncated,
    "flipped bit": flipped,
    "another flipped bit": flipped,
    "missing": missing,
    "empty": empty,
}


@dataclass(frozen=True)
class Scene:
    """A command, what must have been done before it, and the files that it reads."""

    name: str
    before: tuple[list[str], ...]
    """Commands that make its folder."""
    command: list[str]
    files: tuple[str, ...]
    """Below its folder; the first that matches a pattern."""
    kinds: tuple[str, ...] = ()
    """Of damage; all when left out."""
    reopen: bool = False
    """The last command of `before` is a run that looks then as if it had died behind its last checkpoint."""


CHECKPOINT = "out/checkpoints/step_0000012/"
SCENES = (
    Scene(
        "training checkpoint",
        ([*LEARN, "--output", "out"],),
        [*LEARN, "--output", "out"],
        (
            *(CHECKPOINT + name for name in ("__0_0.distcp", "common.pt", ".metadata", "checkpoint.json")),
            *(CHECKPOINT + name for name in ("checksums.json", "manifest.json", "metadata.json")),
            *("out/checkpoints/latest.json", "out/metrics.jsonl", "out/run.json"),
            *("out/prior/decision.json", "out/prior/layer_00001.safetensors"),
        ),
        reopen=True,
    ),
    Scene(
        "model checkpoint",
        (["import", "--input", "../inputs/hf", "--output", "model"],),
        ["export", "--input", "model", "--output", "out"],
        (
            *("model/megatron_prune.json", "model/manifest.json", "model/tokenizer/tokenizer.json"),
            *("model/weights/__0_0.distcp", "model/weights/common.pt", "model/weights/.metadata"),
            *("model/weights/checksums.json", "model/checksums.json"),
        ),
    ),
    Scene(
        "decision of masks",
        (["prune", "--input", "../inputs/dense", "--method", "wanda", "--target", "2:4", *TEXT, "--output", "run"],),
        ["trim", "--input", "run", "--output", "out"],
        ("run/run.json", "run/decision/decision.json", "run/decision/layer_00001.safetensors"),
    ),
    Scene(
        "decision of units",
        ([*FLAP, "--target", "parameters=230K", "--output", "run"],),
        ["trim", "--input", "run", "--output", "out"],
        ("run/decision/trim.json", "run/decision/units.safetensors", "run/weights/weights/__0_0.distcp"),
    ),
    Scene(
        "statistics",
        ([*FLAP, "--target", "parameters=230K", "--output", "run"],),
        [*FLAP, "--target", "parameters=220K", "--output", "out"],
        ("statistics/statistics.json", "statistics/00001.*.safetensors", "statistics/00003.*.safetensors"),
    ),
    Scene(
        "levels",
        ([*DARWIN, "--target", "parameters=200K", "--output", "run"],),
        [*DARWIN, "--target", "parameters=180K", "--output", "out"],
        ("levels/levels.json", "levels/statistics.json", "levels/00001.mlp.safetensors"),
    ),
    Scene(
        "preprocessed text",
        (["preprocess", "--input", "../inputs/text.jsonl", "--tokenizer", "../inputs/hf", "--output", "text"],),
        ["train", "--input", "../inputs/sparse", "--data", "text", *STEPS, "--data-cache", "order", "--output", "out"],
        ("text.bin", "text.idx", "text.json"),
    ),
    Scene(
        "order of preprocessed text",
        (
            ["preprocess", "--input", "../inputs/text.jsonl", "--tokenizer", "../inputs/hf", "--output", "text"],
            ["train", "--input", "../inputs/sparse", "--data", "text", *STEPS, "--data-cache", "order"]
            + ["--output", "first"],
        ),
        ["train", "--input", "../inputs/sparse", "--data", "text", *STEPS, "--data-cache", "order", "--output", "out"],
        ("order/*/*document_index.npy", "order/*/*sample_index.npy", "order/*/*shuffle_index.npy"),
    ),
    Scene(
        "tokens of a text",
        ([*LEARN, "--output", "first"],),
        [*LEARN, "--output", "out"],
        ("../cache/megatron_prune/tokens-*/tokens.npy",),
    ),
    Scene(
        "Hugging Face directory",  # which states no checksums: a bit of its weights is another model
        (["export", "--input", "../inputs/sparse", "--output", "hf"],),
        ["import", "--input", "hf", "--output", "out"],
        ("hf/config.json", "hf/model.safetensors"),
        ("truncated", "missing", "empty"),
    ),
    Scene(
        "mask .npz",
        (["export", "--input", "../inputs/run", "--format", "mask-npz", "--output", "mask.npz"],),
        ["import", "--input", "../inputs/hf", "--mask", "mask.npz", "--output", "out"],
        ("mask.npz",),
    ),
)

WRITING = {
    "preprocess": ["preprocess", "--input", "../inputs/text.jsonl", "--tokenizer", "../inputs/hf"],
    "import": ["import", "--input", "../inputs/hf"],
    "prune one-shot": ["prune", "--input", "../inputs/dense", "--method", "sparsegpt", "--target", "2:4", *TEXT],
    "prune learned": LEARN,
    "train": ["train", "--input", "../inputs/sparse", "--data", "../inputs/text.jsonl", *STEPS],
    "trim": ["trim", "--input", "../inputs/run"],
    "export": ["export", "--input", "../inputs/sparse"],
}
SHARES = (0.05, 0.35, 0.65, 0.95)
"""Of the room that a command needs."""


@dataclass
class Verdict:
    """What a fault did."""

    scene: str
    fault: str
    ending: str
    """`same` or `one line`; anything else is wrong."""
    message: str = ""

    @property
    def right(self) -> bool:
        """Whether it ended as it must."""
        return self.ending in ("same", "one line")


class Stage:
    """Runs commands in folders below `root`."""

    def __init__(self, root: Path, seed: int, kinds: Sequence[str]) -> None:
        self.root = root
        self.kinds = kinds
        self.generator = random.Random(seed)
        self.verdicts: list[Verdict] = []

    def do(self, argv: list[str], folder: Path) -> tuple[int, str]:
        """A verb's exit status and what it said on standard error."""
        err = self.root / "err.txt"
        err.unlink(missing_ok=True)
        pid = begin(argv, folder, self.root / "log.txt", err)
        deadline = time.monotonic() + PATIENCE_S
        while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        return ended(pid), err.read_text(errors="replace")

    def must(self, argv: list[str], folder: Path) -> None:
        """A verb that nothing stands in the way of."""
        status, said = self.do(argv, folder)
        if status:
            raise RuntimeError(f"{' '.join(argv)} ended with status {status}: {said[-600:]}")

    def judge(self, name: str, fault: str, status: int, said: str, same: bool, after: Callable[[], str]) -> None:
        """Add a verdict; `after` says what comes of the same command without the fault, `same` when it is well."""
        lines = [line for line in said.splitlines() if "error" in line or "Traceback" in line]
        message = lines[-1] if lines else ""
        if status == 0:
            ending = "same" if same else "UNNOTICED: another result"
        elif status == 2 and len(lines) == 1 and "Traceback" not in said and len(message) < LONGEST + 30:
            ending = after()
            ending = "one line" if ending == "same" else f"one line, then {ending}"
        else:
            ending = f"status {status}, {len(lines)} lines"
        self.verdicts.append(Verdict(name, fault, ending, message))
        print(f"{'ok' if self.verdicts[-1].right else 'WRONG'}  {name}: {fault}: {ending}  {message}", flush=True)

    def scene(self, scene: Scene) -> None:
        """All kinds of damage to all files of a scene."""
        start, place = self.root / "start", self.root / "place"
        cache = self.root / "cache"
        for path in (start, place, cache):
            shutil.rmtree(path, ignore_errors=True)
        place.mkdir(parents=True)
        for command in scene.before:
            self.must(command, place)
        if scene.reopen:
            reopen(place / "out")
        shutil.copytree(place, start)
        self.must(scene.command, place)
        expected = contents(place / "out")
        kept = self.root / "kept_cache"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(cache, kept) if cache.exists() else kept.mkdir()
        for pattern in scene.files:
            for kind in scene.kinds or self.kinds:
                damage = KINDS[kind]
                for target, source in ((place, start), (cache, kept)):
                    shutil.rmtree(target, ignore_errors=True)
                    shutil.copytree(source, target)
                files = sorted(place.glob(pattern)) if ".." not in pattern else sorted(self.root.glob(pattern[3:]))
                good, file, times = files[0].read_bytes(), files[0], files[0].stat()
                damage(file, self.generator)
                status, said = self.do(scene.command, place)
                same = not status and contents(place / "out") == expected
                told = f"{pattern}: {kind}"

                def after(file: Path = file, good: bytes = good, times: os.stat_result = times) -> str:
                    left = [] if scene.reopen else [path.name for path in place.iterdir() if "out" in path.name]
                    file.write_bytes(good)
                    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
                    status, said = self.do(scene.command, place)
                    return outcome(status, said, contents(place / "out"), expected, left)

                self.judge(scene.name, told, status, said, same, after)

    def full(self, name: str, command: list[str]) -> None:
        """A disk with too little room, then with enough."""
        place = self.root / "place"
        argv = [*command, "--output", "out"]
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self.must(argv, place)
        expected, needed = contents(place), size_of(place)
        for share in SHARES:
            with small_disk(place, max(4096, int(needed * share))) as grow:
                status, said = self.do(argv, place)
                left = sorted(path.name for path in place.iterdir() if path.name != "out" or name not in RESUMED)
                same = not status and contents(place) == expected

                def after(grow: Callable[[], None] = grow, left: list[str] = left) -> str:
                    grow()
                    status, said = self.do(argv, place)
                    return outcome(status, said, contents(place), expected, left)

                self.judge(f"full disk, {name}", f"{share:.0%} of the room", status, said, same, after)

    def failing(self, name: str, command: list[str], library: Path) -> None:
        """Writes or fsyncs that fail, and slow ones."""
        place = self.root / "place"
        argv = [*command, "--output", "out"]
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self.must(argv, place)
        expected = contents(place)
        faults: dict[str, dict[str, str]] = {
            "first write fails": {"SHIM_CALL": "write", "SHIM_AFTER": "0"},
            "a later write fails": {"SHIM_CALL": "write", "SHIM_AFTER": "12"},
            "first fsync fails": {"SHIM_CALL": "fsync", "SHIM_AFTER": "0"},
            "slow disk": {"SHIM_SLOW_US": "20000"},
        }
        for fault, settings in faults.items():
            shutil.rmtree(place)
            place.mkdir()
            more = {**settings, "SHIM_WHERE": str(place), "LD_PRELOAD": str(library)}
            words = [sys.executable, "-m", "megatron_prune", *argv]
            done = subprocess.run(words, cwd=place, env=os.environ | more, capture_output=True, text=True, check=False)
            left = sorted(path.name for path in place.iterdir() if path.name != "out" or name not in RESUMED)
            same = not done.returncode and contents(place) == expected

            def after(left: list[str] = left) -> str:
                status, said = self.do(argv, place)
                return outcome(status, said, contents(place), expected, left)

            self.judge(f"failing disk, {name}", fault, done.returncode, done.stderr, same, after)


RESUMED = ("prune learned", "train", "preprocess")
"""Commands that may leave what they go on from."""


def outcome(status: int, said: str, found: dict[str, str], expected: dict[str, str], left: list[str]) -> str:
    """`same`, or what is not as it was to be once the fault was gone."""
    if status:
        return f"status {status}: {said[-200:]}"
    other = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    if other or left:
        return f"other {', '.join(other)}; left behind {', '.join(left)}"
    return "same"


def reopen(run: Path) -> None:
    """Make a whole run look as if it had died behind its last checkpoint."""
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"state": "learning"}, indent=2) + "\n")
    shutil.rmtree(run / "decision")


def size_of(folder: Path) -> int:
    """Bytes that the files of a folder take, in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[Callable[[], None]]:
    """A tmpfs of so many bytes at `place`; yields what makes it large."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", place], check=True) and None
    finally:
        subprocess.run(["umount", place], check=True)


def build_shim(folder: Path) -> Path:
    """The library that makes writes fail."""
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, folder / "shim.c", "-ldl"], check=True)
    return library.resolve()


def table(verdicts: list[Verdict]) -> dict[str, Any]:
    """The result file: right and wrong by scene, and every verdict."""
    from megatron_prune.log import environment

    about = environment()
    scenes = list(dict.fromkeys(verdict.scene for verdict in verdicts))
    rows = []
    for scene in scenes:
        found = Counter(v.ending if v.right else "wrong" for v in verdicts if v.scene == scene)
        rows.append([scene, sum(found.values()), found["same"], found["one line"], found["wrong"]])
    wrong = sum(not verdict.right for verdict in verdicts)
    return {
        "columns": ["what was damaged, or wrote", "faults", "as without it", "one line, then as without it", "wrong"],
        "rows": rows,
        "hardware": f"{about['devices'][0]}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), **about["packages"]},
        "protocol": (
            f"{len(verdicts) - wrong} of {len(verdicts)} storage faults ended in the last good state, to the bit, or "
            "in one line with status 2, after which the same command did once the fault was gone."
        ),
        "verdicts": [vars(verdict) for verdict in verdicts],
    }


def run() -> int:
    """Exit status 0 when nothing went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of scenes, `full disk` or `failing disk`")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="of damage")
    parser.add_argument("--tmpfs", action="store_true", help="fill small disks, too; needs root")
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    load()
    root = given.folder.resolve()
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    prepare(given.model, given.text, root / "inputs")
    stage = Stage(root, given.seed, given.kinds)
    for scene in SCENES:
        if not given.only or scene.name in given.only:
            stage.scene(scene)
    if given.tmpfs and (not given.only or "full disk" in given.only):
        for name, command in WRITING.items():
            stage.full(name, command)
    if not given.only or "failing disk" in given.only:
        for name in ("import", "prune learned", "preprocess"):
            stage.failing(name, WRITING[name], build_shim(root))
    if given.result:
        given.result.write_text(json.dumps(table(stage.verdicts), indent=1) + "\n")
    return int(not all(verdict.right for verdict in stage.verdicts))


if __name__ == "__main__":
    sys.exit(run())
