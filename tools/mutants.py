"""Plants small faults in the code that scores, solves and searches, and sees whether the tests notice.

    python tools/mutants.py --output mutants.json                    a sample of each module's faults
    python tools/mutants.py --output mutants.json --per-module 50 --only methods/flap.py statistics
    python tools/mutants.py --output mutants.json --record benchmarks/results/mutants_DATE.json

Each fault (`tools/mutant_operators.py`) is planted in a copy of the repository, and the tests of its module, a few
short files, run on it. Those that no test notices are survivors. tools/mutants.yaml explains the ones that no test can
notice, or need not; any other makes the exit status 1, as does an explanation whose fault is noticed or is not there.
A record lists every fault that was judged, in this run and in earlier ones, as long as it is there.

Faults are drawn by a hash of what they change, so the sample stays as it is where the code does. PyTorch and the other
libraries are imported once, in a server that is forked for each fault; a fault has `LIMIT` times the time that the
tests take without one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mutant_operators import Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]
EXPLAINED = ROOT / "tools" / "mutants.yaml"
PACKAGE = "megatron_prune"
EXPLAIN = "explained"
LIMIT, LEAST = 5.0, 60.0
"""Of the time of the tests without a fault, and seconds at least."""
PRELOADED = (
    *("torch", "torch._dynamo", "numpy", "scipy.optimize", "scipy.special", "pytest", "hypothesis", "yaml"),
    *("jsonargparse", "pydantic", "rich.progress", "accelerate", "safetensors.torch"),
    *("transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2"),
    *("transformers.models.nemotron.modeling_nemotron", "transformers.models.auto.modeling_auto"),
)
MEGATRON = ("megatron.core.models.gpt", "megatron.core.dist_checkpointing", "megatron.core.optimizer")
"""Libraries that the server has; those of megatron-core come after the package's backend."""

UNIT = "tests/unit"
STRUCTURED, KERNELS, STATISTICS = f"{UNIT}/structured", f"{UNIT}/kernels", f"{UNIT}/statistics"
ACTIVATIONS, TAYLOR = f"{STRUCTURED}/test_activation_scores.py", f"{STRUCTURED}/test_taylor_scores.py"
METHODS, INVARIANT = f"{STRUCTURED}/test_methods.py", f"{STRUCTURED}/test_invariances.py"
COMPENSATION, ONE_SHOT = f"{STRUCTURED}/test_compensation.py", f"{UNIT}/methods/test_one_shot.py"
EXPERTS, MERGED = f"{UNIT}/methods/test_experts.py", f"{UNIT}/methods/test_merged_experts.py"
BASE, OPTIONS = f"{UNIT}/methods/test_base.py", f"{UNIT}/test_config.py"
DARWINLM, SEARCH = f"{STRUCTURED}/test_darwinlm.py", f"{STRUCTURED}/test_search.py"
LEVELS, RACING = f"{STRUCTURED}/test_levels.py", f"{STRUCTURED}/test_racing.py"
GUMBEL, SECOND_ORDER = f"{KERNELS}/test_gumbel.py", f"{KERNELS}/test_second_order.py"
TESTS: dict[str, tuple[str, ...]] = {
    "methods/allocation.py": (f"{UNIT}/methods/test_allocation.py",),
    "methods/base.py": (BASE, ONE_SHOT),
    "methods/darwinlm.py": (DARWINLM,),
    "methods/depth.py": (ACTIVATIONS, TAYLOR, METHODS),
    "methods/fit.py": (f"{UNIT}/methods/test_fit.py",),
    "methods/flap.py": (ACTIVATIONS, METHODS),
    "methods/llm_pruner.py": (TAYLOR, METHODS),
    "methods/magnitude.py": (ONE_SHOT,),
    "methods/maskllm.py": (f"{UNIT}/methods/test_maskllm.py",),
    "methods/minitron.py": (ACTIVATIONS, METHODS),
    "methods/permutation.py": (f"{UNIT}/methods/test_permutation.py",),
    "methods/shape_search.py": (COMPENSATION, METHODS),
    "methods/ream.py": (MERGED,),
    "methods/reap.py": (EXPERTS,),
    "methods/scores.py": (ONE_SHOT,),
    "methods/sheared_llama.py": (OPTIONS, f"{STRUCTURED}/test_sheared.py"),
    "methods/shortened_llama.py": (TAYLOR, METHODS, OPTIONS),
    "methods/sparsegpt.py": (ONE_SHOT, BASE),
    "methods/structured.py": (ACTIVATIONS, TAYLOR, METHODS),
    "methods/taylor.py": (TAYLOR,),
    "methods/wanda.py": (ONE_SHOT,),
    "statistics/activations.py": (f"{STATISTICS}/test_statistics.py",),
    "statistics/channels.py": (ACTIVATIONS, COMPENSATION),
    "statistics/compensation.py": (COMPENSATION,),
    "statistics/experts.py": (EXPERTS, MERGED),
    "statistics/gradients.py": (TAYLOR, METHODS),
    "statistics/hessian.py": (f"{STATISTICS}/test_statistics.py",),
    "statistics/merging.py": (MERGED,),
    "statistics/passes.py": (ACTIVATIONS, METHODS),
    "statistics/reconstruction.py": (f"{STRUCTURED}/test_reconstruction.py",),
    "statistics/restoring.py": (f"{UNIT}/methods/test_dense_share.py",),
    "statistics/runner.py": (f"{STATISTICS}/test_layerwise.py",),
    "statistics/store.py": (f"{STATISTICS}/test_store.py", METHODS),
    "statistics/walk.py": (f"{STATISTICS}/test_walk.py", METHODS),
    "kernels/compiled.py": (f"{KERNELS}/test_compiled.py",),
    "kernels/definition.py": (f"{KERNELS}/test_definition.py",),
    "kernels/gumbel.py": (GUMBEL,),
    "kernels/gumbel_kernels.py": (GUMBEL,),
    "kernels/gumbel_wide_kernels.py": (GUMBEL,),
    "kernels/memory.py": (f"{KERNELS}/test_memory.py",),
    "kernels/philox.py": (f"{KERNELS}/test_philox.py",),
    "kernels/products.py": (f"{KERNELS}/test_products.py",),
    "kernels/descent.py": (f"{KERNELS}/test_descent.py",),
    "kernels/second_order.py": (SECOND_ORDER,),
    "kernels/second_order_kernels.py": (SECOND_ORDER,),
    "kernels/selection.py": (f"{KERNELS}/test_selection.py",),
    "kernels/tiles.py": (f"{KERNELS}/test_learned_tiles.py",),
    "kernels/triton_gumbel.py": (GUMBEL,),
    "kernels/triton_second_order.py": (SECOND_ORDER,),
    "search/candidates.py": (DARWINLM,),
    "search/evolution.py": (DARWINLM,),
    "search/fitness.py": (DARWINLM,),
    "search/held_out.py": (RACING,),
    "search/integer.py": (DARWINLM, f"{UNIT}/methods/test_dense_share.py"),
    "search/latency.py": (f"{STRUCTURED}/test_latency.py",),
    "search/levels.py": (LEVELS, DARWINLM),
    "search/memory.py": (SEARCH, DARWINLM),
    "search/mutation.py": (SEARCH, DARWINLM),
    "search/offspring.py": (DARWINLM,),
    "search/racing.py": (RACING, DARWINLM),
    "search/session.py": (SEARCH, DARWINLM),
    "search/space.py": (SEARCH, DARWINLM),
}
"""Module below the package -> the tests that are to notice its faults: every module of four packages that can have
any."""


@dataclass(frozen=True)
class Outcome:
    """What became of a fault."""

    key: str
    state: str
    """`noticed`, `survived`, or `endless` when its time was up."""
    seconds: float


def sample(per_module: int, only: Sequence[str]) -> list[Mutant]:
    """Faults of every module, as many of each, the same ones as long as the code is."""
    chosen: list[Mutant] = []
    for module in TESTS:
        if not only or module.startswith(tuple(only)):
            path = f"{PACKAGE}/{module}"
            found = mutants(path, (ROOT / path).read_text())
            chosen += sorted(found, key=lambda m: hashlib.sha256(m.key.encode()).digest())[:per_module]
    return chosen


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """A copy of what the tests need, which faults are planted in; gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy.mkdir()
        for name in (PACKAGE, "tests", "examples", "tools", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if (ROOT.parent / "shared").exists():
            (Path(folder) / "shared").symlink_to((ROOT.parent / "shared").resolve())
        subprocess.run([sys.executable, "-m", "compileall", "-q", PACKAGE], cwd=copy, check=True)
        yield copy


class Server:
    """Runs tests on the copy, each time in a fork of this process, which holds the libraries and nothing of the copy
    but its backend, which megatron-core must come after.
    """

    def __init__(self, copy: Path) -> None:
        self.copy = copy
        self.usual: dict[str, float] = {}
        """Seconds of a module's tests without a fault."""
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)  # of the processes that tests start
        sys.dont_write_bytecode = True
        if not importlib.import_module("torch").cuda.is_available():
            os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py has it: before Triton is imported
        for name in (*PRELOADED, f"{PACKAGE}.backend", *MEGATRON):
            importlib.import_module(name)
        self.held = [name for name in sys.modules if name in _dotted()]
        """Modules that the backend brought with it; every fork imports them anew."""

    def run(self, module: str, limit: float) -> tuple[int | None, float]:
        """Exit status of a module's tests, None when the time is up, and seconds."""
        began, child = time.monotonic(), os.fork()
        if child == 0:
            self._child(module)
        while time.monotonic() - began < limit:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), time.monotonic() - began
            time.sleep(0.05)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None, time.monotonic() - began

    def _child(self, module: str) -> None:
        """Never returns."""
        import pytest

        os.setsid()
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        status = 2
        with contextlib.suppress(BaseException):
            _forget(self.held)
            words = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=0", *TESTS[module]]
            status = int(pytest.main(words))
        os._exit(status)

    def measure(self, module: str) -> None:
        """How long the tests take without a fault; an error where they fail."""
        status, seconds = self.run(module, 3600)
        if status != 0:
            raise SystemExit(f"the tests of {module} fail without any fault: {' '.join(TESTS[module])}")
        self.usual[module] = seconds

    def judge(self, mutant: Mutant) -> Outcome:
        """Plant one fault, run the tests, take it out."""
        module = mutant.path.removeprefix(f"{PACKAGE}/")
        if module not in self.usual:
            self.measure(module)
        file = self.copy / mutant.path
        source = file.read_text()
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
            compiled.unlink()
        try:
            file.write_text(mutant.apply(source))
            status, seconds = self.run(module, max(LEAST, LIMIT * self.usual[module]))
        finally:
            file.write_text(source)
        state = "endless" if status is None else "survived" if status == 0 else "noticed"
        return Outcome(mutant.key, state, round(seconds, 1))


def _dotted() -> list[str]:
    return [f"{PACKAGE}.{module.removesuffix('.py').replace('/', '.')}" for module in TESTS]


def _forget(modules: Sequence[str]) -> None:
    """Have these modules imported anew by whoever asks for them next."""
    for name in modules:
        package, _, last = name.rpartition(".")
        del sys.modules[name]
        delattr(sys.modules[package], last)


def explanations() -> dict[str, str]:
    """Key of a fault -> why no test notices it."""
    return {entry["fault"]: entry["why"] for entry in yaml.safe_load(EXPLAINED.read_text())}


def verdict(outcomes: Sequence[Outcome], explained: dict[str, str], known: set[str]) -> dict[str, Any]:
    """What is told, and what is wrong: survivors without an explanation, explanations without a survivor.

    `known`: keys of all faults of the modules that were looked at.
    """
    survivors = {outcome.key for outcome in outcomes if outcome.state == "survived"}
    noticed = {outcome.key for outcome in outcomes} - survivors
    looked_at = {key.split(" ")[0] for key in known}
    gone = {key for key in explained if key.split(" ")[0] in looked_at and key not in known}
    return {
        "counts": dict(Counter(outcome.state for outcome in outcomes)),
        "unexplained": sorted(survivors - set(explained)),
        "needless": sorted(noticed & set(explained)) + sorted(gone),
    }


def recorded(earlier: dict[str, str], outcomes: Sequence[Outcome], explained: dict[str, str]) -> dict[str, Any]:
    """What became of each fault, `earlier` and now, module by module; those that are no longer there are left out."""
    judged = earlier | {
        o.key: o.state if o.state != "survived" or o.key not in explained else EXPLAIN for o in outcomes
    }
    rows, faults = [], {}
    for module in TESTS:
        known = {mutant.key for mutant in sample(10**6, [module])}
        found = {key: state for key, state in sorted(judged.items()) if key in known}
        counts = Counter(found.values())
        rows.append([module, len(known), len(found), counts["noticed"] + counts["endless"], counts[EXPLAIN]])
        faults |= found
    columns = ["module", "faults", "judged", "noticed", EXPLAIN]
    whole = ["all", *(sum(row[at] for row in rows) for at in range(1, len(columns)))]
    return {"columns": columns, "rows": [*rows, whole], "faults": faults}


def write_record(path: Path, outcomes: Sequence[Outcome], explained: dict[str, str]) -> None:
    """Add outcomes to a record, which need not be there yet."""
    earlier = json.loads(path.read_text())["faults"] if path.exists() else {}
    path.write_text(json.dumps(recorded(earlier, outcomes, explained), indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    """Judge the sample and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--record", type=Path, help="file of all that were judged; what is in it stays")
    parser.add_argument("--per-module", type=int, default=6)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of modules, such as methods/flap.py")
    given = parser.parse_args()
    output, record = given.output.resolve(), given.record and given.record.resolve()
    chosen = sample(given.per_module, given.only)
    outcomes: list[Outcome] = []
    with copied() as copy:
        server = Server(copy)
        for mutant in chosen:
            outcomes.append(server.judge(mutant))
            print(f"{outcomes[-1].state:9} {outcomes[-1].seconds:6.1f} s  {mutant.key}", flush=True)
        os.chdir(ROOT)
    known = {mutant.key for mutant in sample(10**6, given.only)}
    found = verdict(outcomes, explanations(), known)
    mutants_found = [vars(outcome) for outcome in outcomes]
    output.write_text(json.dumps({**found, "mutants": mutants_found}, indent=1) + "\n")
    if record:
        write_record(record, outcomes, explanations())
    print(json.dumps(found, indent=1))
    return 1 if found["unexplained"] or found["needless"] else 0


if __name__ == "__main__":
    sys.exit(main())
