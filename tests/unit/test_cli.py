"""The program as a user starts it: exit status, what goes to stderr, and how fast help is."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prune import __main__ as program
from megatron_prune import log, telling
from megatron_prune.command_line import parse
from megatron_prune.errors import UserError
from megatron_prune.helping import METHOD_OPTIONS, method_names
from megatron_prune.methods.base import methods
from megatron_prune.options import entries, flag


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
    """As `methods` and the command line call them, in a group of their own; what it has no use for is left out."""
    shown = helped(capsys, "prune", "--method", "sparsegpt")
    own = shown[shown.index("options of sparsegpt (Frantar and Alistarh 2023") :]
    assert "--percdamp X" in own and "--update-weights, --no-update-weights" in own
    assert "method-options" not in shown
    assert "--calibration " in shown and "--train-iters" not in shown
    assert "--train-iters" in helped(capsys, "prune", "--method", "maskllm")


def helped(capsys: pytest.CaptureFixture[str], *argv: str, all: bool = False) -> str:
    """What help prints."""
    with pytest.raises(SystemExit):
        program.main([*argv, "--help-all" if all else "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", program.VERBS)
def test_help_is_short_and_all_of_it_is_there_on_request(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = program.VERBS[verb].config
    keys = {entry.key for entry in entries(config)} - {METHOD_OPTIONS}
    assert set(config.basic) <= keys
    short, whole = helped(capsys, verb), helped(capsys, verb, all=True)
    assert all(flag(key) in whole for key in keys)
    assert all(flag(key) in short for key in config.basic)
    assert short.count("\n") < 70 and f"usage: megatron-prune {verb}" in short


@pytest.mark.parametrize("verb", program.VERBS)
def test_every_verb_has_two_examples_that_it_takes(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("method: maskllm\ntarget: 2:4\n")
    config = program.VERBS[verb].config
    assert len(config.examples) == 2
    for example in config.examples:
        parse(config, shlex.split(example), verb)


def test_methods_are_known_without_importing_them() -> None:
    assert method_names() == [info.name for info in methods()]


COMPLETIONS = [
    ("ev", "evaluate"),
    ("prune --method spar", "sparsegpt"),
    ("prune m r --perc", "--percdamp"),
    ("train --engine f", "fsdp"),
    ("evaluate --no-expert-l", "--no-expert-load"),
    ("methods wan", "wanda"),
    ("completion z", "zsh"),
    ("inspect a_fol", "a_folder"),
]


@pytest.fixture(scope="module")
def script() -> str:
    return start("completion", "bash").stdout


@pytest.mark.parametrize(("typed", "completed"), COMPLETIONS)
def test_bash_completes(script: str, typed: str, completed: str, tmp_path: Path) -> None:
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "script").write_text(script)
    words = ["megatron-prune", *typed.split()]
    asked = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _megatron_prune; echo ${{COMPREPLY[@]}}"
    command = ["bash", "-c", f"source ./script; {asked}"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.split() == [completed]


def test_zsh_reads_the_same_table(script: str) -> None:
    assert start("completion", "zsh").stdout.endswith(script)
    assert start("completion", "fish").stderr.count("allowed: bash or zsh") == 1


def test_no_text_is_taken_for_an_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["methods", "maskllm"]) == 0
    listed = capsys.readouterr().out
    assert "N:M: one logit per pattern" in listed and "wanda" not in listed
    log.console.cache_clear()
    log.say("runs:100: of N:M: [bold]")
    assert capsys.readouterr().out == "runs:100: of N:M: [bold]\n"
    assert program.main(["methods", "wand"]) == 2


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
