"""Kill every verb that takes time at random moments, give the same command again, and compare what comes out.

    python tools/kill_verbs.py --model HF_DIRECTORY --text FILE.jsonl --folder /tmp/kill_verbs --kills 100 \\
        --result benchmarks/results/kill_verbs_DATE.json

The model is best a small one. A verb is a process that is forked from this one, which has imported everything, so that
kills hit work and not imports; it and its children get a SIGKILL after a random part of the time that the verb takes.
After a kill the same command is given again, and in half of the cases killed again. Once it is let go it must end with
status 0 (or, when its output was complete before the kill, say so), and everything in its folder must be as after a
command that was left alone: the same names, the same bytes, the same curve of metrics. What depends on the clock, and
the note of each resumption, are left out. Each verb is run twice undisturbed first: what differs then could not show
anything.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from megatron_prune.__main__ import main  # noqa: E402
from tools.kill_test import curve  # noqa: E402

MODULES = (
    *(f"megatron_prune.jobs.{name}" for name in ("import_hf", "prune", "train")),
    *("megatron_prune.data.preprocess", "megatron_prune.exporting.export", "megatron_prune.search.evolution"),
    *("megatron_prune.evaluation.perplexity", "megatron_prune.evaluation.verify", "megatron_prune.fsdp.recover"),
    "torch.utils.tensorboard",
)
"""Imported before the first fork: what the verbs work with."""
CLOCK = ("seconds", "_s", "per_second", ".metadata", "common.pt", "metrics.jsonl")
"""Ends of keys in JSON files that depend on the clock, or are checksums of files that are compared otherwise."""
POLL_S = 0.002

TEXT = ["--calibration", "../inputs/text.jsonl", "--calibration-samples", "16", "--calibration-seq-length", "64"]
STEPS = ["--data", "../inputs/text.jsonl", "--seq-length", "64", "--global-batch-size", "2", "--lr", "3e-4"]
STEPS += ["--min-lr", "0", "--save-interval", "3", "--eval-interval", "1000", "--restartable"]
DENSE, SPARSE = ["--input", "../inputs/dense"], ["--input", "../inputs/sparse"]
SEARCH = ["--restartable", "--levels", "4", "--generations", "4", "--offspring", "4", "--survivors", "2,1"]
SEARCH += ["--fitness-tokens", "128,256", "--training-tokens", "256,512", "--training-batch", "2"]
COMMANDS: dict[str, list[str]] = {
    "preprocess": ["preprocess", "--input", "../inputs/text.jsonl", "--tokenizer", "../inputs/hf", "--workers", "2"],
    "import": ["import", "--input", "../inputs/hf"],
    "prune magnitude": ["prune", *DENSE, "--method", "magnitude", "--target", "0.5"],
    "prune wanda": ["prune", *DENSE, "--method", "wanda", "--target", "2:4", *TEXT],
    "prune sparsegpt": ["prune", *DENSE, "--method", "sparsegpt", "--target", "2:4", *TEXT],
    "prune flap, statistics": ["prune", *DENSE, "--method", "flap", "--target", "parameters=230K", *TEXT]
    + ["--statistics", "statistics"],
    "prune maskllm": ["prune", *DENSE, "--method", "maskllm", "--target", "2:4", "--prior", "wanda", *TEXT, *STEPS]
    + ["--train-iters", "12"],
    "prune maskllm, async": ["prune", *DENSE, "--method", "maskllm", "--target", "2:4", *STEPS, "--async-save"]
    + ["--train-iters", "12", "--train-weights"],
    "prune darwinlm": ["prune", *DENSE, "--method", "darwinlm", "--target", "parameters=200K", *TEXT, *SEARCH],
    "prune sheared_llama": ["prune", *DENSE, "--method", "sheared_llama", "--target", "num_layers=4", *STEPS]
    + ["--train-iters", "12"],
    "train": ["train", *SPARSE, *STEPS, "--train-iters", "12"],
    "train LoRA": ["train", *SPARSE, *STEPS, "--train-iters", "12", "--lora-rank", "4"],
    "train distillation": ["train", *SPARSE, *STEPS, "--train-iters", "12", "--teacher", "../inputs/dense"],
    "train fsdp": ["train", "--input", "../inputs/hf", "--engine", "fsdp", *STEPS, "--train-iters", "12"],
    "trim": ["trim", "--input", "../inputs/run"],
    "export": ["export", *SPARSE, "--format", "hf"],
    "evaluate": ["evaluate", *SPARSE, "--text", "../inputs/text.txt", "--window", "64", "--windows", "64"],
    "verify": ["verify", *SPARSE, "--against", "../inputs/hf_sparse"],
}
FILES = ("evaluate", "verify")
"""Commands whose output is a JSON file."""


@dataclass
class Verb:
    """One command in its folder below `place`."""

    name: str
    place: Path
    seconds: float = 0.0
    kills: int = 0
    comparisons: int = 0
    wrong: list[str] = field(default_factory=list)
    """What differed, or how a command ended that should not have."""

    @property
    def argv(self) -> list[str]:
        """The command, with its output."""
        return [*COMMANDS[self.name], "--output", "out.json" if self.name in FILES else "out"]

    def begin(self, folder: Path) -> int:
        """The process id of the command, started in `folder`."""
        return begin(self.argv, folder, folder.parent / "log.txt", folder.parent / "log.txt")

    def alone(self, folder: Path) -> dict[str, str]:
        """Let the command run in an empty folder; what it has written."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.monotonic()
        status = ended(self.begin(folder))
        self.seconds = time.monotonic() - began
        if status:
            raise RuntimeError(f"{self.name} ended with status {status} when left alone: see {folder.parent}/log.txt")
        return contents(folder)

    def kill(self, folder: Path, generator: random.Random) -> bool:
        """Start the command and kill it after a random part of its time; False when it ended before."""
        pid = self.begin(folder)
        until = time.monotonic() + generator.uniform(0.02, 1.0) * self.seconds
        while time.monotonic() < until:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(POLL_S)
        else:
            os.killpg(pid, signal.SIGKILL)
        return ended(pid) == -signal.SIGKILL

    def disturb(self, folder: Path, wanted: int, expected: dict[str, str], generator: random.Random) -> None:
        """Kill the command until it has been killed as often as wanted, and compare each time that it was let go."""
        idle = 0
        while self.kills < wanted and idle < 10 + 3 * wanted:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            before = self.kills
            while self.kills < wanted:
                if not self.kill(folder, generator):
                    break
                self.kills += 1
                if generator.random() < 0.5:
                    break
            idle = idle + 1 if self.kills == before else 0
            if self.kills > before:
                self.compare(folder, expected)

    def compare(self, folder: Path, expected: dict[str, str]) -> None:
        """Let the command end by itself and note what is not as it should be."""
        status = ended(self.begin(folder))
        self.comparisons += 1
        if status not in (0, 2):
            self.wrong.append(f"status {status}")
        found = contents(folder)
        self.wrong += [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]


def begin(argv: list[str], folder: Path, out: Path, err: Path) -> int:
    """The process id of a verb that runs in `folder`, at the head of a process group of its own."""
    pid = os.fork()
    with contextlib.suppress(OSError):  # both do it: neither knows which is first
        os.setpgid(pid, pid or os.getpid())
    if pid:
        return pid
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    status = 70
    try:
        status = main(argv)
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001  (as Python does at its end)
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Wait for a process; its exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder, by name; of what depends on the clock only that it is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "tensorboard" in path.parts or path.name.startswith("config.resumed."):
            continue
        found[name] = "folder" if path.is_dir() else digest(path)
    return found


def digest(path: Path) -> str:
    """What must be the same of a file."""
    if path.name in ("environment.json", ".metadata"):  # the second has a random number for each save
        return "there"
    if path.name == "common.pt":  # whose bytes depend on which tensors were views
        return repr(plain(torch.load(path, weights_only=True)))
    if path.name == "metrics.jsonl":
        content = json.dumps(curve(path.parent)).encode()
    else:
        content = path.read_bytes()
        with contextlib.suppress(ValueError):  # what is damaged counts as it is
            content = (
                json.dumps(without_clock(json.loads(content)), sort_keys=True).encode()
                if path.suffix == ".json"
                else content
            )
    return hashlib.sha256(content).hexdigest()


def plain(value: Any) -> Any:
    """A value of a training state with the numbers of its tensors to the bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def without_clock(value: Any) -> Any:
    """JSON without what depends on the clock."""
    if isinstance(value, dict):
        return {key: without_clock(inner) for key, inner in value.items() if not key.endswith(CLOCK)}
    return [without_clock(inner) for inner in value] if isinstance(value, list) else value


def prepare(model: Path, text: Path, inputs: Path) -> None:
    """What the commands read; made in a process of its own, so that this one has computed nothing when it forks."""
    if inputs.exists():
        return
    inputs.mkdir(parents=True)
    shutil.copytree(model, inputs / "hf")
    shutil.copy(text, inputs / "text.jsonl")
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    (inputs / "text.txt").write_text("\n\n".join(documents))
    commands = [
        ["import", "--input", "hf", "--output", "dense"],
        ["prune", "--input", "dense", "--output", "run", "--method", "magnitude", "--target", "2:4"],
        ["trim", "--input", "run", "--output", "sparse"],
        ["export", "--input", "sparse", "--output", "hf_sparse", "--format", "hf"],
    ]
    for command in commands:
        pid = os.fork()
        if not pid:
            os.chdir(inputs)
            os._exit(main(command))
        if ended(pid):
            raise RuntimeError(f"{' '.join(command)} failed")


def load() -> None:
    """Import what the verbs need."""
    for module in MODULES:
        importlib.import_module(module)


def table(verbs: Sequence[Verb], note: str) -> dict[str, Any]:
    """The result file."""
    from megatron_prune.log import environment

    about = environment()
    kills, wrong = sum(verb.kills for verb in verbs), sum(bool(verb.wrong) for verb in verbs)
    rows = [
        [verb.name, verb.seconds, verb.kills, verb.comparisons, "yes" if not verb.wrong else "NO"] for verb in verbs
    ]
    return {
        "columns": ["command", "seconds left alone", "kills", "comparisons", "equal bit for bit"],
        "rows": rows,
        "hardware": f"{about['devices'][0]}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), **about["packages"]},
        "protocol": (
            f"{kills} kills (SIGKILL of all processes at a random moment), each followed by the same command; "
            f"{len(verbs) - wrong} of {len(verbs)} commands ended as if left alone, nothing foreign left behind.{note}"
        ),
        "wrong": {verb.name: sorted(set(verb.wrong)) for verb in verbs if verb.wrong},
    }


def run() -> int:
    """Exit status 0 when every command ended as if it had been left alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(COMMANDS), help="these commands of the table")
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    load()
    os.environ["XDG_CACHE_HOME"] = str(given.folder.resolve() / "cache")
    prepare(given.model, given.text, given.folder / "inputs")
    generator = random.Random(given.seed)
    verbs = []
    for number, name in enumerate(given.only):
        verb = Verb(name, given.folder)
        expected, again = (verb.alone(given.folder / which) for which in ("whole", "again"))
        verb.wrong += [f"differs by itself: {key}" for key in expected if expected[key] != again.get(key)]
        share = given.kills * (number + 1) // len(given.only) - given.kills * number // len(given.only)
        verb.disturb(given.folder / "killed", share, expected, generator)
        verbs.append(verb)
        print(
            f"{name}: {verb.kills} kills, {verb.comparisons} comparisons, wrong: {sorted(set(verb.wrong))}", flush=True
        )
    if given.result:
        given.result.write_text(json.dumps(table(verbs, ""), indent=1) + "\n")
    return int(any(verb.wrong for verb in verbs) or sum(verb.kills for verb in verbs) < given.kills)


if __name__ == "__main__":
    sys.exit(run())
