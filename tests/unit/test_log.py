"""metrics.jsonl survives a crash and a resume; environment.json names no machine."""

from __future__ import annotations

import errno
import io
import json
import platform
import threading
from pathlib import Path

import pytest
from rich.console import Console

from megatron_prune import log


def steps(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with log.MetricsLog(tmp_path) as metrics:
        metrics.resume_at(0)
        for step in (1, 2, 3):
            metrics.write({"step": step, "loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with log.MetricsLog(tmp_path) as metrics:
        metrics.resume_at(2)
        metrics.write({"step": 3, "loss": 0.5})
    assert steps(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.5}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_values_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    with log.MetricsLog(tmp_path) as metrics:
        metrics.write({"step": 1, "loss": float("nan")})
    assert steps(tmp_path) == [{"step": 1, "loss": None}]


def test_only_process_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with log.MetricsLog(tmp_path) as metrics:
        metrics.resume_at(0)
        metrics.write({"step": 1})
    log.write_environment(tmp_path)
    assert not list(tmp_path.iterdir())


def test_console_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.console.cache_clear()
    with log.MetricsLog(tmp_path, name="step") as metrics, metrics.steps(2):
        metrics.write({"step": 2, "loss": 1 / 3, "tokens": 7})
        metrics.write({"step": 2, "loss": 1 / 3, "tokens": 7}, shown=("loss", "absent"))
    assert capsys.readouterr().out == "step 2/2  loss 0.33333  tokens 7\nstep 2/2  loss 0.33333\n"


def test_time_left_counts_from_where_the_run_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.console.cache_clear()
    with log.MetricsLog(tmp_path) as metrics:
        metrics.resume_at(6)
        with metrics.steps(8):
            metrics._began -= 100.0
            metrics.write({"step": 7, "loss": 2.0})
    assert capsys.readouterr().out == "step 7/8  loss 2  left 2 min\n"


def test_bar_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, color_system=None, highlight=False)
    monkeypatch.setattr(log, "console", lambda: terminal)
    with log.MetricsLog(tmp_path) as metrics:
        metrics.resume_at(1)
        with metrics.steps(4):
            metrics.write({"step": 2, "loss": 2.5, "tokens": 7}, shown=("loss", "tokens"))
            metrics.write({"step": 2, "eval_loss": 2.25})
    shown = screen.getvalue()
    assert "step  loss 2.5" in shown and "2/4" in shown and "tokens" not in shown
    assert "step 2/4  eval_loss 2.25" in shown
    assert [record["step"] for record in steps(tmp_path)] == [2, 2]


@pytest.mark.parametrize(("total", "end"), [(3, "gone, -:--:-- left"), (None, "0/? layers passed 0:00:00 gone")])
def test_a_bar_says_what_is_left_where_that_is_known(
    total: int | None, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, color_system=None, highlight=False)
    monkeypatch.setattr(log, "console", lambda: terminal)
    with log.progress("a search", total, "layers passed"):
        pass
    assert end in screen.getvalue() and ("left" in screen.getvalue()) == (total is not None)


def test_plain_progress(capsys: pytest.CaptureFixture[str]) -> None:
    log.console.cache_clear()
    with log.progress("wanda 2:4", 3, "layers") as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr().out.startswith("wanda 2:4: 3/3 layers (")


def test_progress_of_nobody_knows_how_much(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, and does not say that it is done: methods that cut depth pass over a model as often as they need."""
    log.console.cache_clear()
    monkeypatch.setattr(log, "PLAIN_INTERVAL_S", 0.0)
    with log.progress("minitron", None, "layers") as advance:
        for _ in range(3):
            advance(1)
    assert [line.partition(" (")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"minitron: {count} layers" for count in (1, 2, 3)
    ]


def test_environment_names_no_machine(tmp_path: Path) -> None:
    log.write_environment(tmp_path, seed=3)
    text = (tmp_path / "environment.json").read_text()
    content = json.loads(text)
    assert content["seed"] == 3 and content["packages"]["torch"] and content["devices"]
    assert platform.node() not in text and str(Path.home()) not in text


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fails_tensorboard_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By whoever writes the metrics, not as a traceback of TensorBoard's thread."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back at the end
    metrics = log.MetricsLog(tmp_path)
    metrics.write({"step": 1, "loss": 1.0})
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(OSError, match="Input/output"):
        for step in range(2, 50):
            metrics.write({"step": step, "loss": 1.0})
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("notebook", "widgets", "terminal", "quiet", "bars"),
    [
        (False, False, True, False, True),
        (False, True, False, False, False),
        (True, True, False, False, True),
        (True, False, False, False, False),  # where rich would warn in every line
        (True, True, False, True, False),
        (False, False, True, True, False),
    ],
)
def test_bars_move_in_terminals_and_in_notebooks_with_widgets(
    monkeypatch: pytest.MonkeyPatch, notebook: bool, widgets: bool, terminal: bool, quiet: bool, bars: bool
) -> None:
    monkeypatch.setattr("megatron_prune.log.find_spec", lambda name: object() if widgets else None)
    screen = Console(force_jupyter=notebook, force_terminal=terminal, quiet=quiet)
    assert log.shows_bars(screen) == bars
