"""A run on TPUs is a run like any other: files, limits, damage, mistakes. In one process of MaxText's environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prune.__main__ import main
from megatron_prune.log import read_metrics
from tests.maxtext import environment
from tests.maxtext.test_maxtext import STEPS, verb
from tests.models import byte_tokenizer, tiny_llama, words

pytestmark = pytest.mark.slow
DAMAGED = {"short": "truncate", "unlisted": "manifest", "unreadable": "metadata"}
"""Copies of a run whose newest checkpoint is damaged, and how (`doctored.damage`)."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every call of these tests; `answers` has what was said."""
    environment.python()
    root = tmp_path_factory.mktemp("runs")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257, head_dim=16))
    byte_tokenizer(tiny_llama(root / "odd_hf", vocab_size=257, hidden_size=60, head_dim=16))
    verb("prune", "--input", root / "hf", "--output", root / "pruned", "--method", "magnitude", "--target", "2:4")
    verb("export", "--input", root / "pruned", "--output", root / "sparse", "--format", "maxtext")
    text = ["--input", words(root / "words.jsonl"), "--tokenizer", root / "hf", "--append-eod", "--workers", 1]
    verb("preprocess", *text, "--output", root / "tokens")
    model = ["--input", root / "sparse"]
    damage = ["call", "tests.maxtext.doctored", "damage"]
    calls: dict[str, list[object]] = {"train": training(root, "run", 4)}
    calls["verify"] = ["main", "verify", *model, "--checkpoint", root / "run"]
    for name, how in DAMAGED.items():
        calls[name] = [*damage, root / "run", root / name, how]
        for check in ("verify", "export"):
            out = ["--output", root / f"{name}_hf"] if check == "export" else []
            calls[f"{check} {name}"] = ["main", check, *model, "--checkpoint", root / name, *out]
    calls["short goes on"] = training(root, "short", 6)
    calls["broken model"] = [*damage, root / "sparse", root / "broken", "truncate"]
    calls["train broken"] = training(root, "of_broken", 2, model="broken")
    calls["score broken"] = ["call", "tests.maxtext.doctored", "load", root / "broken"]
    calls["unknown"] = [*training(root, "none", 2), "learning_rat=1"]
    calls["not a number"] = [*training(root, "none", 2), "learning_rate=much"]
    answers = environment.run(root, list(calls.values()))
    (root / "answers").write_text(json.dumps(dict(zip(calls, answers, strict=True))))
    return root


def training(root: Path, run: str, steps: int, model: str = "sparse") -> list[object]:
    data = ["--data", root / "tokens", "--data-cache", root / "cache", "--seq-length", 32]
    places = ["--input", root / model, "--output", root / run, "--steps", steps, "--save-interval", 1]
    return ["main", "train", *places, *data, "--settings", *STEPS]


def said(root: Path, call: str) -> str:
    """What a call answered: a verb's exit status first."""
    return str(json.loads((root / "answers").read_text())[call])


def refused(root: Path, call: str) -> str:
    """The line of a call that is refused as a mistake is: status 2, and one line on stderr."""
    answer = said(root, call)
    lines = [line for line in answer.splitlines() if "error:" in line]
    assert answer.startswith("2 ") and len(lines) == 1 and "Traceback" not in answer, answer
    return lines[0]


def test_checkpoints_are_limited(root: Path) -> None:
    """To as many as elsewhere."""
    assert said(root, "train").startswith("0 ")
    assert sorted(path.name for path in (root / "run" / "checkpoints").iterdir()) == ["2", "3"]


def test_metrics_are_left_and_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = read_metrics(root / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in records)
    assert list((root / "run" / "tensorboard").glob("events.out.tfevents.*"))
    about = json.loads((root / "run" / "run.json").read_text())
    assert (about["method"], about["target"], about["state"]) == ("train", "2:4", "trained")
    verb("report", "--inputs", root / "run", "--output", root / "report.html")
    page = (root / "report.html").read_text()
    assert page.count("<svg") == 2 and "learning rate" in page  # of the loss, too


def test_a_good_run_makes_no_noise(root: Path) -> None:
    assert said(root, "verify").count("\n") == 1 and "WARNING" not in said(root, "verify")
    assert len(said(root, "train").splitlines()) < 4 + 20


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("check", ["verify", "export"])
def test_damage_is_one_line(root: Path, check: str, name: str) -> None:
    assert "checkpoints/3" in refused(root, f"{check} {name}")
    assert "give an older step" in refused(root, f"{check} {name}") and not (root / f"{name}_hf").exists()


def test_a_damaged_newest_checkpoint_is_set_aside(root: Path) -> None:
    answer = said(root, "short goes on")
    assert answer.startswith("0 ") and "is set aside as" in answer
    assert (root / "short" / "damaged_step_3").is_dir()
    assert [record["step"] for record in read_metrics(root / "short")] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_model_is_one_line(root: Path) -> None:
    assert "broken/weights/0 is damaged" in refused(root, "train broken")
    assert "broken/weights/0 is damaged" in said(root, "score broken")


@pytest.mark.parametrize(("call", "message"), [
    ("unknown", "--settings 'learning_rat' is no setting of MaxText 0.2.5 (did you mean learning_rate?)"),
    ("not a number", "MaxText refuses its settings (learning_rate: Input should be a valid number"),
])  # fmt: skip
def test_wrong_settings_are_one_line(root: Path, call: str, message: str) -> None:
    assert message in refused(root, call)


def test_widths_that_do_not_divide_over_the_devices(root: Path) -> None:
    verb("export", "--input", root / "odd_hf", "--output", root / "odd", "--format", "maxtext")
    (answer,) = environment.run(root / "odd", [training(root, "odd_run", 1, model="odd")], devices=8)
    assert answer.startswith("2 ") and "does not divide over the devices" in answer, answer


def test_a_python_without_maxtext(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ordinary environment."""
    from megatron_prune.maxtext.__main__ import main as other

    assert other(["verify", "--input", str(root / "sparse")]) == 2
    complaint = capsys.readouterr().err
    assert "make it with tools/setup_maxtext.sh and use" in complaint and complaint.count("\n") == 1


def test_another_python_is_named(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One without the packages of either environment."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'jsonargparse'\" >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv("MEGATRON_PRUNE_MAXTEXT_PYTHON", str(python))
    words = ["--input", str(root / "hf"), "--output", str(tmp_path / "out"), "--format", "maxtext"]
    assert main(["export", *words]) == 2
    assert f"{python} is not the Python of MaxText's environment" in capsys.readouterr().err
