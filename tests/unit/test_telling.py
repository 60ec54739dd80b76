"""Of a mistake that several processes see one tells, once, however late the others are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megatron_prune import __main__ as program
from megatron_prune import telling
from tests.distributed.launch import environment as common
from tests.models import byte_tokenizer, tiny_llama, words

LATE = """
import os, sys, time
if "megatron_prune" in " ".join(sys.orig_argv) and os.environ.get("RANK") == os.environ["LATE"]:
    time.sleep(float(os.environ["LATE_S"]))
"""
"""Of a rank on a loaded machine."""


def torchrun(folder: Path, *argv: str, late: str = "none", late_s: float = 0) -> tuple[int, list[str], str]:
    """Run a verb on two processes, of which one is late: status, the program's own lines on stderr, and all of it."""
    (folder / "path").mkdir(exist_ok=True)
    (folder / "path" / "sitecustomize.py").write_text(LATE)
    path = os.pathsep.join([str(folder / "path"), str(Path(__file__).parents[2])])
    environment = {**common(), "PYTHONPATH": path, "LATE": late, "LATE_S": str(late_s)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "megatron_prune", *argv], capture_output=True, text=True, env=environment, timeout=300
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("megatron-prune: error: ")]
    return done.returncode, told, done.stderr


@pytest.fixture
def root(tmp_path: Path) -> Path:
    words(tmp_path / "words.jsonl")
    byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    return tmp_path


@pytest.mark.parametrize(("late", "late_s"), [("none", 0), ("0", 12), ("1", 12)])
def test_a_verb_for_one_process_is_refused_once(root: Path, late: str, late_s: float) -> None:
    output = root / "out"
    words = ["--input", str(root / "words.jsonl"), "--tokenizer", str(root / "hf"), "--output", str(output)]
    status, told, err = torchrun(root, "preprocess", *words, late=late, late_s=late_s)
    assert status != 0 and len(told) == 1, err
    assert "2 processes were started; preprocess takes one: leave torchrun out" in told[0]
    assert not list(root.glob("*out*"))


@pytest.mark.parametrize(("late", "late_s"), [("none", 0), ("0", 12)])
def test_a_mistake_that_both_see_is_told_once(root: Path, late: str, late_s: float) -> None:
    words = ["--input", str(root / "hf"), "--output", str(root / "hf")]
    status, told, err = torchrun(root, "import", *words, late=late, late_s=late_s)
    assert status != 0 and len(told) == 1 and "already exists" in told[0], err
    assert told[0].startswith("megatron-prune: error: --output") is (late == "none"), told


def test_a_mistake_of_one_is_told_and_the_lost_connection_is_not(root: Path) -> None:
    """Process 0 alone sees that another run has the output; process 1 waits for it in vain."""
    from megatron_prune.claims import claimed

    with claimed(root / "x"):
        words = ["--input", str(root / "hf"), "--output", str(root / "x")]
        status, told, err = torchrun(root, "import", *words)
    assert status != 0 and len(told) == 1 and "another process is writing" in told[0], err
    assert "RuntimeError" not in err and "DistStoreError" not in err, err
    assert not list(root.glob("*x"))


# --- who tells, without starting anything ---


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], None]:
    """Makes this process one of a launch of three, whose launcher has a store."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(telling, "PATIENCE_S", 0.3)
    errors = tmp_path / "attempt_0" / "0" / "error.json"
    errors.parent.mkdir(parents=True)
    for name, value in {
        "WORLD_SIZE": "3",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_ERROR_FILE": str(errors),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }.items():
        monkeypatch.setenv(name, value)

    def become(rank: int, keep: object = store) -> None:
        monkeypatch.setenv("RANK", str(rank))

    return become


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("shared", ["store", "folder"])
def test_the_first_tells(
    launch: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...], shared: str
) -> None:
    if shared == "folder":  # the launcher's store is gone, or never was
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    told = []
    for rank in order:
        launch(rank)
        assert telling.another_told() is bool(told)
        if telling.first_to_tell():
            told.append(rank)
    assert told == [order[0]]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # a new attempt may tell anew
    if shared == "store":
        assert telling.first_to_tell()


def test_a_process_of_its_own_always_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert telling.first_to_tell() and telling.first_to_tell() and not telling.another_told()


def test_a_lost_connection_is_silent_only_when_somebody_told(
    launch: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(argv: list[str]) -> int:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(program, "_run", lost)
    monkeypatch.setattr(program, "_told_to_launcher", lambda function: function)
    launch(1)
    with pytest.raises(RuntimeError, match="Connection closed"):
        program.main(["methods"])
    launch(0)
    assert telling.first_to_tell()
    launch(1)
    assert program.main(["methods"]) == 2 and not capsys.readouterr().err
