"""The launch files of TPUs, run with programs in place of MaxText, xpk and Kubernetes that say what they are given."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "tpu"
VARIABLES = re.findall(r"^([A-Z_]+)=\$\{\1:-", (EXAMPLE / "run.sh").read_text(), re.MULTILINE)


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A program that prints its arguments, one a line, after the number it was given."""
    for name in ("python", "xpk"):
        file = tmp_path / name
        file.write_text('#!/bin/sh\necho "RANK=$RANK"\nprintf "%s\\n" "$@"\n')
        file.chmod(0o755)
    return tmp_path


def run(told: Path, *words: str, **variables: str) -> list[str]:
    """What the program was given."""
    clean = {key: value for key, value in os.environ.items() if key not in (*VARIABLES, "RANK")}
    pythons = dict.fromkeys(("MEGATRON_PRUNE_MAXTEXT_PYTHON", "MEGATRON_PRUNE_PYTHON"), str(told / "python"))
    environment = clean | pythons | {"PATH": f"{told}:{os.environ['PATH']}"} | variables
    done = subprocess.run(["bash", *words], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize(("step", "flag", "expected"), [
    ("train", "--output", "elsewhere"),
    ("verify", "--checkpoint", "elsewhere"),
    ("export", "--checkpoint", "elsewhere"),
    ("export", "--output", "elsewhere_hf"),
    ("evaluate", "--checkpoint", "elsewhere"),
])  # fmt: skip
def test_one_output_for_all_steps(told: Path, step: str, flag: str, expected: str) -> None:
    words = run(told, "examples/tpu/run.sh", step, OUTPUT="elsewhere", TPU_WORKER_ID="0")
    assert after(words, flag) == expected and after(words, "--input") == "runs/tpu/sparse"


def test_outputs_are_under_root_where_nothing_is_said(told: Path) -> None:
    for step, flag in (("train", "--output"), ("verify", "--checkpoint"), ("export", "--checkpoint")):
        assert after(run(told, "examples/tpu/run.sh", step, ROOT="/r"), flag) == "/r/trained"


@pytest.mark.parametrize(("variables", "rank"), [
    ({"TPU_WORKER_ID": "3"}, 3),
    ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c,d", "MEGASCALE_SLICE_ID": "2"}, 9),
    ({"RANK": "5", "TPU_WORKER_ID": "1"}, 5),
])  # fmt: skip
def test_hosts_that_evaluate_know_their_number(told: Path, variables: dict[str, str], rank: int) -> None:
    words = run(told, "examples/tpu/run.sh", "evaluate", "--text", "t.txt", MORE="attention=dot_product", **variables)
    assert words[0] == f"RANK={rank}" and after(words, "--text") == "t.txt"
    assert words[words.index("--settings") :][-1] == "attention=dot_product"


def test_the_table_names_every_variable_and_all_are_forwarded(told: Path) -> None:
    """By xpk.sh, values with blanks as they are, and by the Job."""
    table = re.findall(r"^\| `([A-Z_]+)` \|", (EXAMPLE / "README.md").read_text(), re.MULTILINE)
    assert len(VARIABLES) > 8 and set(table) == {*VARIABLES, "MORE"}
    given = {name: f"{name} of mine" for name in table}
    words = run(told, "examples/tpu/xpk.sh", "train", "--seed", "3", CLUSTER="c", IMAGE="i", **given)
    line = after(words, "--command").replace("examples/tpu/run.sh", "env; echo")
    environment = {"PATH": os.environ["PATH"]}
    seen = subprocess.run(["bash", "-c", line.replace("env; echo", "env #")], env=environment, capture_output=True)
    for name, value in given.items():
        assert f"{name}={value}\n" in seen.stdout.decode()
    assert after(words, "--command").endswith("examples/tpu/run.sh train --seed 3")
    _service, job = yaml.safe_load_all((EXAMPLE / "gke.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert {entry["name"] for entry in container["env"]} == set(table)


def test_the_image_has_both_environments() -> None:
    """What `evaluate` and `preprocess` need lies beside MaxText's."""
    lines = (ROOT / "docker" / "Dockerfile.tpu").read_text()
    assert "tools/setup_maxtext.sh" in lines and "--editable '.[eval]'" in lines


def test_a_teacher_is_asked_for_where_one_is_named(told: Path) -> None:
    words = run(told, "examples/tpu/run.sh", "train", "--hidden-weight", "1", TEACHER="/r/dense model")
    assert after(words, "--teacher") == "/r/dense model" and after(words, "--hidden-weight") == "1"
    assert "--teacher" not in run(told, "examples/tpu/run.sh", "train")
    assert "--teacher" not in run(told, "examples/tpu/run.sh", "verify", TEACHER="x")
