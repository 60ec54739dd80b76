"""`tools/gpu_check.py` on a CPU: every check that can run passes, and none passes when what it checks is wrong."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip
import pytest
import torch

from megatron_prune.kernels import gumbel, second_order
from megatron_prune.kernels.compiled import DISABLE_VARIABLE
from tests.distributed.launch import environment
from tools import acceptance, gpu_checks, gpu_layouts
from tools.acceptance import TINY, Check, Found, Place, Skip, furthest, run, within

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "tools" / "gpu_check.py"
ON_GPUS = {"machine", "wide_index", "roofline", "memory"}


def check(*words: str) -> tuple[int, list[dict[str, Any]], str]:
    """(exit status, lines of JSON, stderr) of the program."""
    command = [sys.executable, str(PROGRAM), "--device", "cpu", *words]
    done = subprocess.run(command, env=environment(0), capture_output=True, text=True, timeout=900)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.slow
def test_all_that_a_cpu_can(tmp_path: Path) -> None:
    status, lines, said = check("--output", str(tmp_path / "result.json"))
    assert status == 0, said
    assert [line["name"] for line in lines] == [each.name for each in gpu_checks.CHECKS] and len(lines) == 15
    for line in lines:
        assert {"name", "pass", "value", "limit", "seconds"} <= line.keys()
        expected = None if line["name"] in ON_GPUS else True
        assert line["pass"] is expected and bool(line.get("skipped")) == (expected is None), line
        assert expected is None or (line["value"] and line["limit"]), line
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"columns", "rows", "protocol", "hardware", "date", "versions", "commit"} <= result.keys()
    assert result["checks"] == lines and "no GPU was used" in result["protocol"]
    assert all(len(row) == len(result["columns"]) for row in result["rows"])


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_layouts(processes: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, str(PROGRAM), "--device", "cpu", "--layouts"]
    done = subprocess.run(command, env=environment(0), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == [each.name for each in gpu_layouts.CHECKS]
    assert all(line["pass"] is True for line in lines.values()), lines


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "cpu", "--only", "roads"], "--only roads was given; allowed: machine mask_kernels"),
        (["--device", "cpu", "--layouts"], "--layouts is run by torchrun"),
    ],
)
def test_mistakes_are_one_line(words: list[str], told: str) -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), *words], env=environment(0), capture_output=True, text=True)
    assert done.returncode != 0 and told in done.stderr.splitlines()[-1] and not done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so() -> None:
    done = subprocess.run([sys.executable, str(PROGRAM)], env=environment(0), capture_output=True, text=True)
    assert done.returncode == 1 and "PyTorch sees no GPU; --device cpu" in done.stderr


def test_one_that_fails_is_the_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without its kernels in C; what was said stays, and the result file tells."""
    monkeypatch.setenv(DISABLE_VARIABLE, "0")
    folder, output = tmp_path / "made", tmp_path / "result.json"
    status, (line,), said = check("--only", "gradients", "--folder", str(folder), "--output", str(output))
    assert status == 1 and line["pass"] is False and "implementation 'cpu'" in line["error"]
    assert f"gradients failed; all that was said: {folder / 'log.txt'}" in said and (folder / "log.txt").exists()
    assert json.loads(output.read_text())["rows"][0][:2] == ["gradients", "FAILED"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, "cpu", TINY, TINY)


@pytest.mark.parametrize(
    ("work", "verdict", "key"),
    [
        (lambda place: within({"x": 1.0}, {"x": 1}), True, None),
        (lambda place: within({"x": 1.1}, {"x": 1}), False, None),
        (lambda place: within({"x": float("nan")}, {"x": 1}), False, None),
        (lambda place: Found(False, {"x": [float("inf")]}, 1), False, None),
        (lambda place: 1 / 0, False, "error"),
        (lambda place: place.no_such_thing, False, "error"),
    ],
)
def test_a_check_has_one_line_whatever_happens(place: Place, work: Any, verdict: bool, key: str | None) -> None:
    line = run(Check("name", work), place)
    assert line["pass"] is verdict and (key is None or line[key])
    json.dumps(line, allow_nan=False)


def test_what_is_skipped_says_why(place: Place) -> None:
    def skipped(place: Place) -> Found:
        raise Skip("nothing here")

    assert run(Check("a", skipped), place) | {"seconds": 0} == {
        "name": "a", "pass": None, "value": None, "limit": None, "seconds": 0, "skipped": "nothing here"
    }  # fmt: skip
    assert run(Check("a", skipped, "needs a GPU"), place)["skipped"] == "needs a GPU"


def test_a_verb_that_fails_is_the_checks_error(place: Place) -> None:
    line = run(Check("a", lambda place: place.verb("verify", input=place.path("nothing"))), place)
    assert line["pass"] is False and "verify ended with status 2" in line["error"]


def test_curves_of_other_lengths_are_infinitely_far() -> None:
    assert furthest([1.0, 2.0], [1.0, 2.1]) == pytest.approx(0.1 / 2.1)
    assert furthest([1.0], [1.0, 2.0]) == furthest([], []) == float("inf")


def test_a_kernel_that_is_wrong_does_not_pass(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_checks.mask_kernels(place).passed and gpu_checks.gradients(place).passed
    right = gumbel._functions

    def wrong(implementation: str) -> Any:
        found = right(implementation)
        other = lambda weight, logits, call: right("eager").forward(weight, 1.01 * logits, call)  # noqa: E731
        return found._replace(forward=other) if implementation == "cpu" else found

    monkeypatch.setattr(gumbel, "_functions", wrong)
    assert not gpu_checks.mask_kernels(place).passed and not gpu_checks.gradients(place).passed


def test_a_solver_that_is_wrong_does_not_pass(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_checks.sparsegpt(place).passed
    right = second_order._fast

    def wrong(device: torch.device) -> Any:
        def sweep(weight: torch.Tensor, *rest: Any) -> None:
            right(device)(weight, *rest)  # type: ignore[misc]
            weight.mul_(1.01)

        return sweep

    monkeypatch.setattr(second_order, "_fast", wrong)
    assert not gpu_checks.sparsegpt(place).passed


def test_the_machine_is_described_and_a_cpu_is_no_gpu(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_checks.machine(place)
    assert not found.passed and "RMSNorm" in found.value["modules"] and "torch.optim" in found.value["adam"]
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    monkeypatch.setattr(gpu_checks, "open_model", lambda path: _Nothing())
    monkeypatch.setattr(gpu_checks.backend, "running", lambda layout: _Nothing())
    assert gpu_checks.machine(place).passed
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert not gpu_checks.machine(place).passed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


class _Nothing:
    """A model without modules, and process groups that are none."""

    chunks = ()

    def load(self, layout: Any) -> _Nothing:
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def test_the_plan_is_compared_with_the_peak(place: Place) -> None:
    """The arithmetic alone: what a GPU's allocator says is not to be had here."""
    with pytest.raises(Skip, match="needs the run"):
        gpu_checks.memory(place)
    place.path("road").mkdir()
    place.verb("plan", input=place.large_checkpoint, method="maskllm", target="2:4", processes=1,
               output=place.path("before.json"), **place.learning(20))  # fmt: skip
    planned = sum(json.loads(place.path("before.json").read_text())["stages"][0].values()) / acceptance.GIB
    for factor, passes in ((0.9, False), (1.0, True), (1.1, True), (1.2, False)):
        record = {"step": 1, "loss": 1.0, "peak_memory_gib": factor * planned}
        (place.path("road") / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        assert gpu_checks.memory(place).passed is passes
        place.path("plan.json").unlink()


def test_windows_go_to_a_gpu_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From other memory the copy waits for all that the GPU was given before, in every micro-batch."""
    from megatron_prune.training import loop

    windows, seen = torch.arange(6).view(2, 3), []
    assert loop.to_device(windows) is windows
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    monkeypatch.setattr(backend, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (seen.append("pinned"), self)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **more: (seen.append((args, more)), self)[1])
    loop.to_device(windows)
    assert seen == ["pinned", ((torch.device("cuda", 0),), {"non_blocking": True})]


@pytest.mark.parametrize(("loss", "bits", "passes"), [(1.0, 0, True), (1.0001, 0, False), (1.0, 1, False)])
def test_a_layout_that_learns_otherwise_does_not_pass(place: Place, loss: float, bits: int, passes: bool) -> None:
    for name, value, byte in (("data_parallel", 1.0, 0), ("other", loss, bits)):
        (place.path(name) / "decision").mkdir(parents=True)
        (place.path(name) / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": value}) + "\n")
        (place.path(name) / "decision" / "layer.safetensors").write_bytes(bytes([byte, 0, 0]))
        place.made.add(name)
    assert gpu_layouts.compared(place, place.path("other")).passed is passes


def test_the_models_fit_their_layouts() -> None:
    """Eight processes can share each layer; sizes are those of a LLaMA."""
    for sizes in (gpu_layouts.LARGE, gpu_layouts.SMALL):
        whole = dataclasses.asdict(sizes)
        assert not any(whole[key] % 8 for key in ("heads", "groups", "ffn", "hidden"))
        assert sizes.layers % 2 == 0 and sizes.heads % sizes.groups == 0
    assert gpu_layouts.mixed(8) == {
        "pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True,
        "context_parallel_size": 2,
    }  # fmt: skip
    assert gpu_layouts.mixed(2) == {"pipeline_model_parallel_size": 2}
