"""Every JSON file that verbs read, in every hostile form of `tests.hostile`: read, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.__main__ import main
from megatron_prune.apply import run_folder
from megatron_prune.apply.decision import MaskInfo, Masks
from megatron_prune.apply.trimming import Trim, is_trim
from megatron_prune.config import InspectConfig, ReportConfig
from megatron_prune.errors import UserError
from megatron_prune.inspect_run import run as inspect
from megatron_prune.log import read_metrics
from megatron_prune.model.checkpoint import check_manifest, damage_of
from megatron_prune.model.cost import parameters
from megatron_prune.model.description import Description, read_description
from megatron_prune.model.families import family_of
from megatron_prune.model.units import Units
from megatron_prune.report.report import run as report
from megatron_prune.training.checkpoints import read_about
from tests.hostile import assert_harmless, complaint
from tests.models import TINY_SIZES

CONFIG = family_of({"model_type": "llama"}).from_hf({"model_type": "llama", **TINY_SIZES["llama"]})
INFO = MaskInfo("wanda", "2:4", {"a": 1.5}, "llama", CONFIG.fingerprint(), 7, {"count": 2}, {"by": "test"})
RUN = {"input": "in", "method": "wanda", "target": "2:4", "state": "decided", "launch": None}


def put(file: Path, content: Any) -> Path:
    """A JSON file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def page(*inputs: Path) -> Callable[[], None]:
    """The `report` verb on these."""
    output = inputs[0].parent / "page.html"

    def run() -> None:
        output.unlink(missing_ok=True)
        report(ReportConfig(inputs=inputs, output=output))

    return run


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """A run with a decision of masks."""
    mask = torch.tensor([True, True, False, False]).repeat(8, 2)
    layers = [(n, {f"model.layers.{n}.mlp.up_proj.weight": mask}) for n in (0, 1)]
    put(tmp_path / "run" / "run.json", RUN)
    Masks.save(tmp_path / "run" / "decision", INFO, layers)
    return tmp_path / "run"


@pytest.fixture
def trimmed(tmp_path: Path) -> Path:
    """A run with a structured decision."""
    put(tmp_path / "run" / "run.json", {**RUN, "target": "num_layers=1", "method": "shortgpt"})
    Trim(INFO, Units.all(CONFIG).without_layers([0])).save(tmp_path / "run" / "decision", CONFIG)
    return tmp_path / "run"


def test_run_json(masks: Path) -> None:
    assert assert_harmless(masks / "run.json", page(masks)) > 100


def test_run_json_without_the_newer_key(masks: Path) -> None:
    put(masks / "run.json", {key: value for key, value in RUN.items() if key != "launch"})
    assert run_folder.read_run(masks).launch is None


def test_decision_json(masks: Path) -> None:
    def use() -> None:
        found = Masks.load(masks / "decision")
        found.summary()
        found.check()
        inspect(InspectConfig(input=masks))

    assert assert_harmless(masks / "decision" / "decision.json", use) > 400


def test_trim_json(trimmed: Path) -> None:
    assert is_trim(trimmed / "decision")
    show = page(trimmed)

    def use() -> None:
        inspect(InspectConfig(input=trimmed))
        show()

    assert assert_harmless(trimmed / "decision" / "trim.json", use) > 300


def test_megatron_prune_json(tmp_path: Path) -> None:
    Description(CONFIG, {"import": "hf", "mask": None}).write(tmp_path / "model")

    def use() -> None:
        inspect(InspectConfig(input=tmp_path / "model"))
        parameters(read_description(tmp_path / "model").config)

    assert assert_harmless(tmp_path / "model" / "megatron_prune.json", use) > 400


def test_manifest_json(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"12345")
    file = put(tmp_path / "manifest.json", {"a.bin": 5})
    assert assert_harmless(file, lambda: check_manifest(tmp_path)) > 50
    for name in ("../a", "/etc/passwd", "a/../b", ".", "", "a\0b", "x" * 2000):
        put(file, {name: 5})
        assert complaint(lambda: check_manifest(tmp_path)) is not None, name


def test_metrics_jsonl(masks: Path) -> None:
    file = masks / "metrics.jsonl"
    honest = {"step": 1, "loss": 2.5, "mask_entropy": None, "replaced": True, "parent": [0, 1]}
    show = page(masks)

    def lines() -> None:
        if not file.read_bytes().endswith(b"\n"):
            file.write_bytes(file.read_bytes() + b"\n")

    put(file, honest)
    assert assert_harmless(file, lambda: read_metrics(masks), lines) > 100
    for value in (None, True, [1], 1e199, -(2**63), 2**63 - 1):
        for step in (0, 2**63 - 1):
            file.write_text("".join(json.dumps({"step": n, "loss": value}) + "\n" for n in (step, 1)))
            complaint(show)
    file.write_bytes(b'{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert len(read_metrics(masks)) == 1


RESULTS: dict[str, dict[str, Any]] = {
    "evaluate": {
        "perplexity": 20.5,
        "loss": 3.0,
        "predicted_tokens": 31,
        "protocol": "windows of 32",
        "text": {"source": "t.txt", "sha256": "00", "tokens": 5},
        "input": "model",
        "kind": "megatron",
    },
    "tasks": {
        "results": [
            {
                "model": "m",
                "kind": "megatron",
                "tasks": {
                    "piqa": {
                        "metrics": {"acc": 0.5},
                        "standard_errors": {"acc": None},
                        "items": 2,
                        "num_fewshot": 0,
                        "version": 1.0,
                        "items_sha256": "ab",
                        "right": {"acc": "01"},
                    }
                },
                "groups": {"all": {"metrics": {"acc": 0.5}, "standard_errors": {"acc": 0.1}}},
            }
        ],
        "limit": None,
        "environment": {},
    },
    "verify": {
        "input": "m",
        "kind": "run",
        "pattern": {"target": "2:4", "broken_groups": {}, "too_dense": [], "holds": True},
        "zeros": {"zeros": 5, "negative_zeros": 0, "holds": True},
        "density": {"weights": 10, "density": 0.5, "per_weight": {}},
        "shape": {"target": "num_layers=1", "holds": True},
        "logits": {"against": "x", "max_absolute_difference": 0.0, "holds": True},
        "holds": True,
    },
    "bench": {
        "benchmark": "dense against 2:4",
        "input": "m",
        "no_sparse_kernels": None,
        "dense": [{"batch_size": 1, "prefill_tokens_per_s": 5.0, "decode_tokens_per_s": 5.0, "peak_bytes": 5}],
        "sparse": [{"batch_size": 1, "prefill_tokens_per_s": 5.0, "decode_tokens_per_s": 5.0, "peak_bytes": 5}],
    },
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results(tmp_path: Path, kind: str) -> None:
    file = put(tmp_path / "result.json", RESULTS[kind])
    assert assert_harmless(file, page(file)) > 50


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
def test_text_that_a_report_shows(masks: Path, name: str) -> None:
    (masks / name).write_bytes(b"caf\xe9")
    assert name in (complaint(page(masks)) or "")
    (masks / name).write_bytes(b"x" * 20_000_000)
    assert "allowed: at most" in (complaint(page(masks)) or "")


def test_latest_json(masks: Path) -> None:
    file = put(masks / "checkpoints" / "latest.json", {"step": 5})
    assert assert_harmless(file, lambda: run_folder.latest_step(masks)) > 30


def test_checkpoint_json(tmp_path: Path) -> None:
    folder = tmp_path / "step_0000005"
    file = put(folder / "checkpoint.json", {"step": 5, "seed": 0, "method": "maskllm"})
    assert assert_harmless(file, lambda: read_about(folder)) > 40


@pytest.mark.parametrize("name", ["manifest.json", "checksums.json"])
def test_a_damaged_list_of_files_is_damage_of_the_checkpoint(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another checkpoint is used then; nothing may be raised."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda box, mine: box.__setitem__(0, mine))
    (tmp_path / "a.bin").write_bytes(b"12345")
    put(tmp_path / "checksums.json", {"a.bin": "cbf53a1c"})
    size = (tmp_path / "checksums.json").stat().st_size
    put(tmp_path / "manifest.json", {"a.bin": 5, "checksums.json": size})
    assert damage_of(tmp_path) == []
    silent: list[str] = []

    def look() -> None:
        if not damage_of(tmp_path):
            silent.append((tmp_path / name).read_text())

    assert_harmless(tmp_path / name, look)
    honest = (tmp_path / name).read_text()
    assert all(json.loads(text) == json.loads(honest) for text in silent)


def test_inspect_ends_with_status_2(masks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (masks / "run.json").write_text("[]")
    assert main(["inspect", "--input", str(masks)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "run.json" in line
    with pytest.raises(UserError):
        read_description(masks)
