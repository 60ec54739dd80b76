"""The program as a user starts it: exit status, what goes to stderr, and how fast help is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prune import __main__ as program
from megatron_prune import telling
from megatron_prune.errors import UserError


def start(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_prune", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_a_mistake_is_one_line_and_status_2() -> None:
    done = start("evaluate", "--input", "a", "--text", "b", "--windw", "3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "megatron-prune: error: unknown option --windw (windw in YAML); did you mean --window?\n"


def test_help_lists_the_verbs_quickly() -> None:
    began = time.perf_counter()
    done = start("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in program.VERBS)
    heavy = "import sys, megatron_prune.__main__; print({'torch', 'transformers', 'megatron'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True)
    assert loaded.stdout == "set()\n"
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("verb", program.VERBS)
def test_help_of_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        program.main([verb, "--help"])
    assert left.value.code == 0
    assert f"usage: megatron-prune {verb}" in capsys.readouterr().out


def test_help_names_the_hyper_parameters_of_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["prune", "--method", "maskllm", "--help"])
    assert "--method-options.prior-strength X" in capsys.readouterr().out


@pytest.mark.parametrize("verb", program.VERBS)
def test_every_verb_has_a_function(verb: str) -> None:
    assert callable(program.VERBS[verb].module.run) and program.VERBS[verb].name == verb


def test_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["evalute"]) == 2
    assert "unknown verb 'evalute'; did you mean evaluate?" in capsys.readouterr().err


def test_no_verb_shows_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 2
    assert "verbs:" in capsys.readouterr().out


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert "maskllm" in listed and "arXiv:2409.17481" in listed and "--prior-strength" in listed


@pytest.mark.parametrize("raised, status", [(UserError("no"), 2), (KeyboardInterrupt(), 130)])
def test_status_of_what_a_verb_raises(raised: BaseException, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_run", lambda argv: (_ for _ in ()).throw(raised))
    assert program.main(["methods"]) == status


def test_other_processes_speak_later_and_say_who_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(telling.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "3")
    assert program.main(["nothing"]) == 2
    assert slept and capsys.readouterr().err.startswith("megatron-prune: error: [process 3] unknown verb")


def test_a_verb_gets_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("megatron_prune.verbs.methods.run", lambda config: seen.append(config))
    assert program.main(["methods"]) == 0
    assert isinstance(seen[0], program.VERBS["methods"].config)
