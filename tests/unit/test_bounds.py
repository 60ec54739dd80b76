"""Numbers, targets, texts and YAML that no run could use: one short line each, before anything is made."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from megatron_prune import config
from megatron_prune.__main__ import VERBS, main
from megatron_prune.command_line import parse
from megatron_prune.decision.target import NM, parse_any_target
from megatron_prune.errors import UserError
from megatron_prune.jobs.plan import held
from megatron_prune.kernels.definition import MAX_M
from megatron_prune.methods.base import get_method, methods
from megatron_prune.options import REQUIRED, Entry, Options, entries, flag
from tests.hostile import complaint

NUMBERS = (
    *("1e30", "1e400", "-1e400", "nan", "inf", "-inf", "9" * 5000, "0." + "9" * 5000, "9" * 40, "-1", "0x10", "-0"),
    *("１", " 5 ", "", "1_0", "[1]", "{a: 1}", "null", "true", "5,6", "1/2", "0b1", "1j", str(2**63), str(2**64)),
    *("[" * 5000, "\t5", "5\n6", "--", "=", "a" * 100_000, "!!python/object:os.system x", "&a [*a]"),
)
FEW = ("1e30", "nan", "9" * 5000, "１", str(2**63), "[" * 5000)
REQUIRED_ARGUMENTS = {
    "input": "in",
    "output": "out",
    "shell": "bash",
    "method": "wanda",
    "target": "2:4",
    "tokenizer": "t",
    "processes": "1",
}


def arguments(verb: type[Options], *more: str) -> list[str]:
    """A verb's required options and some more."""
    needed = [entry.key for entry in entries(verb) if entry.required]
    found = [word for key in needed for word in (flag(key), REQUIRED_ARGUMENTS[key])]
    one_of = {config.EvaluateConfig: ["--text", "t"], VERBS["plan"].config: ["--processes", "2"]}
    return [*found, *one_of.get(verb, []), *more]


def numeric(entry: Entry) -> bool:
    """Whether an option is a number, or a list of numbers."""
    kinds = {entry.kind, *get_args(entry.kind)}
    return bool({int, float} & kinds)


OPTIONS = {
    (entry.group, entry.key): (name, entry)
    for name, verb in VERBS.items()
    for entry in entries(verb.config)
    if numeric(entry)
}
"""Each numeric option of each group once, with a verb that has it."""


@pytest.mark.parametrize("verb", sorted({name for name, _ in OPTIONS.values()}))
def test_every_number_of_every_verb(verb: str) -> None:
    """What is accepted is a number that the code beneath can take."""
    kind = VERBS[verb].config
    for entry in (entry for name, entry in OPTIONS.values() if name == verb):
        for value in NUMBERS if entry.key in ("seed", "lr", "batch_sizes", "limit") else FEW:
            words = arguments(kind, f"{flag(entry.key)}={value}")
            found: list[Any] = []
            told = complaint(lambda words=words, found=found: found.append(parse(kind, words, "x")))  # type: ignore[misc]
            assert told or found, (entry.key, value[:30])
            if found:
                given = found[0]
                for name in entry.path:
                    given = getattr(given, name)
                for number in given if isinstance(given, tuple) else (given,):
                    assert number is None or -(2**63) < number < 2**63 or abs(number) <= 1e100, (entry.key, value[:30])


@pytest.mark.parametrize("value", ["1e30", str(2**63), "9" * 5000, "nan"])
@pytest.mark.parametrize(
    "key",
    "seed calibration_samples train_iters global_batch_size seq_length micro_batch_size eval_windows".split(),
)
def test_sizes_of_a_run(key: str, value: str) -> None:
    assert flag(key) in (
        complaint(lambda: parse(config.PruneConfig, arguments(config.PruneConfig, flag(key), value), "x")) or ""
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--train-iters", "100000000", "--global-batch-size", "1048576"), "--train-iters x --global-batch-size"),
        (("--calibration-samples", "1048576", "--calibration-seq-length", "1048576"), "tokens in all"),
        (("--distributed-timeout-minutes", "1e30"), "at most 1000000"),
        (("--time-limit", "1e30"), "at most"),
        (("--output", "a\ud800"), "--output"),
        (("--calibration-documents", "9" * 5000), "first K"),
        (("--calibration-documents", "１:２"), "first K"),
        (("--data-split", "9" * 5000), "two or three numbers"),
        (("--" + "x" * 100_000, "1"), "unknown option"),
        (("--method", "x" * 100_000), "unknown method"),
        (("--seed", "1", "2" * 100_000), "one whole number"),
    ],
)
def test_what_cannot_be_done(given: tuple[str, ...], said: str) -> None:
    told = complaint(lambda: parse(config.PruneConfig, arguments(config.PruneConfig, *given), "x"))
    assert told is not None and said in told


def test_hyper_parameters_are_numbers_that_the_code_can_take() -> None:
    for method in methods():
        for knob in method.hyperparameters:
            if knob.type not in ("int", "float"):
                continue
            for value in ("nan", "9" * 5000, str(2**63)):
                words = arguments(config.PruneConfig, "--method", method.name, f"{flag(knob.name)}={value}")
                if knob.type == "int" or value != str(2**63):
                    assert complaint(partial(parse_and_make, words)), (method.name, knob.name, value[:20])


def parse_and_make(words: list[str]) -> None:
    """What `prune` does first."""
    found = parse(config.PruneConfig, words, "x")
    get_method(found.method, **found.method_options)


@pytest.mark.parametrize("survivors", ["9" * 5000, "1e3", "-1", "", "１", "8,4,", "1," * 1000 + "1"])
def test_lists_in_words(survivors: str) -> None:
    assert complaint(lambda: get_method("darwinlm", survivors=survivors)) is not None


TARGETS: tuple[Any, ...] = (
    *(
        "9" * 5000,
        f"{'9' * 5000}:4",
        f"2:{'9' * 5000}",
        "0." + "9" * 5000,
        "parameters=" + "9" * 400,
        "num_layers=" + "9" * 5000,
    ),
    *(
        "２:４",
        "2:4:8",
        "2:",
        ":4",
        "0:4",
        "4:4",
        "-2:4",
        "2.0:4",
        "5:3",
        "16:32",
        "8:17",
        "",
        " ",
        "nan",
        "inf",
        "-1",
        "1",
        "0",
    ),
    *(
        "a" * 100_000,
        "num_layers=1," * 10_000,
        "num_layers",
        "=",
        "x=1",
        "parameters=1.5",
        "parameters=0",
        "parameters=-5",
    ),
    *(
        None,
        True,
        5,
        10**400,
        [],
        {},
        {"n": 10**400, "m": 4},
        {"n": "2", "m": 4},
        {"sparsity": 10**400},
        {"sparsity": "x"},
    ),
    *(
        {"x" * 5000: 1},
        {"num_layers": 10**400},
        {"num_layers": [1]},
        {"parameters": None},
        {1: 2},
        {"parameters": 10**400},
    ),
    *(
        {"num_layers": "１"},
        {str(n): n for n in range(10_000)},
        {"n": 2},
        {"m": float("nan"), "n": 1},
        float("nan"),
        1e308,
    ),
)


@pytest.mark.parametrize("target", TARGETS, ids=[str(number) for number in range(len(TARGETS))])
def test_targets(target: Any) -> None:
    assert complaint(lambda: parse_any_target(target)) is not None


@pytest.mark.parametrize("pattern", ["8:16", "4:16", "5:9"])
def test_learned_masks_refuse_more_patterns_than_they_have_logits_for(
    pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the run folder is begun; the line names the methods that take them."""
    words = ["prune", "--input", str(tmp_path / "none"), "--output", str(tmp_path / "run"), "--target", pattern]
    assert main([*words, "--method", "maskllm"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"up to {MAX_M}" in line and "magnitude, sparsegpt, wanda" in line and list(tmp_path.iterdir()) == []
    words[0] = "plan"
    assert main([*words, "--method", "maskllm", "--processes", "1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"up to {MAX_M}" in line and list(tmp_path.iterdir()) == []


def test_methods_in_one_shot_take_them() -> None:
    for name in ("magnitude", "sparsegpt", "wanda"):
        get_method(name).accept(NM(8, 16))
    get_method("maskllm").accept(NM(4, 8))


YAML = {
    "twice": b"seed: 1\nseed: 2\n",
    "twice inside": b"method_options: {a: 1, a: 2}\n",
    "bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 107)),
    "mapping bomb": b"a: &a {x: y}\n"
    + b"".join(
        b"%c: &%c {%s}\n" % (c, c, b",".join(b"k%d: *%c" % (n, c - 1) for n in range(9))) for c in range(98, 107)
    ),
    "loop": b"a: &a [*a]\n",
    "deep": b"a: " + b"[" * 5000,
    "deep mapping": b"{a: " * 5000,
    "NUL": b"a\0b: 1\n",
    "escaped NUL": b'output: "a\\0b"\n',
    "surrogate": b'output: "a\\ud800"\n',
    "not utf-8": b"a: \xff\n",
    "list": b"[1, 2]\n",
    "text": b"x" * 100_000,
    "tag": b"a: !!python/object/apply:os.system [x]\n",
    "long value": b"seed: " + b"x" * 1_000_000,
    "long key": b"x" * 1000 + b": 1\n",
    "many keys": b"".join(b"k%d: 1\n" % n for n in range(10_000)),
    "key that is a list": b"[1, 2]: 3\n",
    "nested": b"seed: {a: {b: [1, [2, {c: d}]]}}\n",
    "digits": b"seed: " + b"9" * 5000,
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "target": b"target: " + b"2" * 100_000,
    "method": b"method: " + b"x" * 100_000,
    "tab": b"\tseed: 1\n",
    "merge": b"a: &a {seed: 1}\n<<: *a\n",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(name: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(YAML[name])
    words = arguments(config.PruneConfig, "--config", str(file))
    kept = [
        word
        for word in words
        if name not in ("target", "method") or word not in ("--target", "2:4", "--method", "wanda")
    ]
    if name in ("escaped NUL", "surrogate"):
        kept = [word for word in kept if word not in ("--output", "out")]
    told = complaint(lambda: parse_target_too(parse(config.PruneConfig, kept, "x")))
    assert told is not None


def parse_target_too(found: config.PruneConfig) -> None:
    """What `prune` does next."""
    get_method(found.method, **found.method_options)
    parse_any_target(found.target)


def test_an_output_that_is_no_name_ends_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for name, verb in VERBS.items():
        fields = {field.name: field for field in dataclasses.fields(verb.config)}
        if "output" in fields and name != "report":
            words = [word for word in arguments(verb.config) if word not in ("--output", "out")]
            for place in (".", "/", ".."):
                assert main([name, *words, "--output", place]) == 2
                (line,) = capsys.readouterr().err.strip().splitlines()
                assert "new file or folder" in line, name


def test_a_closed_output_is_no_failure() -> None:
    """As `methods >&-` does in a shell."""
    command = [sys.executable, "-c", "import os, sys; os.close(1); os.execv(sys.executable, sys.argv[1:])"]
    words = [sys.executable, "-m", "megatron_prune", "methods"]
    ended = subprocess.run([*command, *words], stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_more_memory_than_there_is_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def ask(_: object) -> int:
        torch.empty(2**55)
        return 0

    monkeypatch.setattr("megatron_prune.verbs.methods.run", ask)
    assert main(["methods"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "more memory" in line


def test_a_defect_of_the_program_shows_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr("megatron_prune.verbs.methods.run", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["methods"])


@pytest.mark.parametrize("verb", ["inspect", "export", "verify", "prune", "train", "import", "plan", "report"])
def test_places_that_are_none(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names too long, paths through files, circles of links."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for place in ("x" * 300, "file/model", "circle", "circle/model", "y/" * 3000):
        output = [] if verb in ("inspect", "verify") else ["--output", str(tmp_path / "out")]
        words = [word for word in arguments(VERBS[verb].config) if word not in ("--input", "in", "--output", "out")]
        given = ["--inputs" if verb == "report" else "--input", str(tmp_path / place)]
        assert main([verb, *given, *output, *words]) == 2, place
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert len(line) < 500
        assert not (tmp_path / "out").exists()


def test_required_options_are_known() -> None:
    """Of this file."""
    for verb in VERBS.values():
        needed = {entry.key for entry in entries(verb.config) if entry.required}
        assert needed <= set(REQUIRED_ARGUMENTS) and REQUIRED is not None
        assert all(get_origin(entry.kind) is not tuple for entry in entries(verb.config) if entry.required) or needed


def test_a_message_of_a_user_error_is_short() -> None:
    with pytest.raises(UserError) as caught:
        raise UserError("x" * 10_000_000)
    assert len(str(caught.value)) < 500


def test_output_that_nobody_reads_ends_quietly() -> None:
    """As `methods | true` does in a shell: the status of SIGPIPE and not a word."""
    command = [sys.executable, "-m", "megatron_prune", "methods"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_a_plan_of_a_step_of_any_size_ends() -> None:
    """Four rounds of all stages show every moment that more of them have."""
    for stages, chunks in ((1, 1), (3, 1), (2, 2), (4, 3)):
        for stage in range(stages):
            assert set(held(stage, stages, chunks, 4 * stages)) == set(held(stage, stages, chunks, 20 * stages))
