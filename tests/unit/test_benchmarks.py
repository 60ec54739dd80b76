"""What the programs of benchmarks/ share does what it says, and every program says how it is used."""

from __future__ import annotations

import argparse
import ast
import gzip
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench import results, running, study
from tools import readme_table

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted((ROOT / "benchmarks").glob("*.py"))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# Running


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_length": 256}, ["--seq-length", "256"]),
        ({"sequence_parallel": True, "update_weights": False}, ["--sequence-parallel", "--no-update-weights"]),
        ({"tasks": ["piqa", "rte"]}, ["--tasks", "piqa", "rte"]),
        ({"teacher": None, "min_lr": 0}, ["--min-lr", "0"]),
    ],
)
def test_options_become_flags(options: dict[str, Any], words: list[str]) -> None:
    assert running.flags(**options) == words


def test_a_command_is_measured_and_heard() -> None:
    code = "import os, sys; b = bytes(2**27); print(os.environ['WORD']); print('aside', file=sys.stderr); "
    cost, said = running.run(python(code + "sum(range(3_000_000))"), WORD="hello")
    assert sorted(said.split()) == ["aside", "hello"]
    assert list(cost) == ["wall_s", "cpu_s", "peak_gib"]
    assert cost["cpu_s"] > 0 and cost["wall_s"] > 0 and cost["peak_gib"] > 0.125
    assert "WORD" not in os.environ


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(SystemExit, match=r"(?s)the reason.*failed with status 3"):
        running.run(python("print('the reason'); raise SystemExit(3)"))


def test_a_verb_on_several_processes_is_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(running, "run", lambda words: commands.append(list(map(str, words))))
    running.verb("trim", "--yes", input="a")
    running.verb("trim", processes=2, input="a")
    assert commands[0][1:] == ["-m", "megatron_prune", "trim", "--yes", "--input", "a"]
    assert commands[1][1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert commands[1][6:] == ["-m", "megatron_prune", "trim", "--input", "a"]


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    found = [running.kept(tmp_path / "record", lambda n=n: {"number": n}) for n in (1, 2)]
    assert found == [{"number": 1}, {"number": 1}]


def ranked(word: str) -> tuple[str, dict[str, str | None], int]:
    """Runs in a process of its own."""
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS")
    return word, {name: os.environ.get(name) for name in names}, os.getpid()


def failing() -> None:
    """Runs in a process of its own."""
    raise ArithmeticError("on purpose")


def test_ranks_in_processes_of_their_own() -> None:
    before = dict(os.environ)
    found = running.apart(ranked, "hello", ranks=2, threads=3)
    assert dict(os.environ) == before
    assert [word for word, _, _ in found] == ["hello", "hello"]
    assert [names["RANK"] for _, names, _ in found] == ["0", "1"]
    assert all(names["WORLD_SIZE"] == "2" and names["OMP_NUM_THREADS"] == "3" for _, names, _ in found)
    assert len({names["MASTER_PORT"] for _, names, _ in found}) == 1
    assert len({os.getpid(), *(number for _, _, number in found)}) == 3


def test_one_process_has_no_rank_and_a_failure_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert running.apart(ranked, "alone")[0][1]["WORLD_SIZE"] == os.environ.get("WORLD_SIZE")
    with pytest.raises(SystemExit, match="failing.*failed in a process of its own"):
        running.apart(failing)
    assert "ArithmeticError: on purpose" in capfd.readouterr().err


def test_sides_run_at_the_same_time() -> None:
    sides = {"sleeps": lambda: time.sleep(0.4), "works": lambda: sum(range(4_000_000))}
    found = running.side_by_side(sides)
    assert list(found) == ["sleeps", "works"]
    assert found["sleeps"]["wall_s"] >= 0.4 > found["sleeps"]["cpu_s"]
    assert found["works"]["cpu_s"] > found["sleeps"]["cpu_s"]


def test_sides_start_together(tmp_path: Path) -> None:
    """Each waits for what the other does first."""

    def meet(own: str, other: str) -> None:
        (tmp_path / own).touch()
        end = time.monotonic() + 60
        while not (tmp_path / other).exists():
            assert time.monotonic() < end, "alone"
            time.sleep(0.01)

    running.side_by_side({"one": lambda: meet("one", "two"), "two": lambda: meet("two", "one")})


def test_a_side_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match="traceback is above"):
        running.forked([lambda: None, failing])


def test_seconds_by_the_clock_and_of_the_processor() -> None:
    ended = []
    found = running.seconds(lambda: time.sleep(0.05), end=lambda: ended.append(True))
    assert found["wall_s"] >= 0.05 > found["cpu_s"] and ended == [True]


def test_works_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def work(name: str) -> int:
        order.append(name)
        return len(order)

    found = running.in_turns({"a": lambda: work("a"), "b": lambda: work("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert found == {"a": [3, 5], "b": [4, 6]}


def test_ratios_are_of_pairs_and_come_with_their_spread() -> None:
    base, other = [{"wall_s": w} for w in (4.0, 9.0, 2.0)], [{"wall_s": w} for w in (2.0, 3.0, 2.0)]
    found = running.ratios(base, other, "wall_s")
    assert found == [2.0, 3.0, 1.0]
    assert running.spread(found) == {"min": 1.0, "median": 2.0, "max": 3.0}
    assert running.each(min, base) == {"wall_s": 2.0}
    with pytest.raises(ValueError, match="2 runs: a spread takes at least 3"):
        running.spread(found[:2])
    with pytest.raises(ValueError, match="shorter"):
        running.ratios(base, other[:2], "wall_s")


PEAK = """
from bench import running
result, peak = running.peak_bytes(lambda: len(b"\\1" * 2**26))
assert result == 2**26 and 0.9 * 2**26 < peak < 1.5 * 2**26, peak
assert running.peak_bytes(lambda: None)[1] < 2**24
made, spent = running.cost(lambda: [len(b"\\1" * 2**26)])
assert made == [2**26] and spent["peak_bytes"] > 0.9 * 2**26 and {"wall_s", "cpu_s"} < set(spent), spent
"""


def test_the_peak_is_of_the_work_alone() -> None:
    """In a process of its own: one in which a model was at work keeps the memory that it freed."""
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Result files


@pytest.fixture
def given(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(output=tmp_path / "results", note="Beside others.", load_before=0.5)


def test_a_result_file_has_what_a_table_needs_and_what_it_was_measured_on(given: argparse.Namespace) -> None:
    path = results.write_result("x", given, ["a", "b"], [["r", 1.5]], "Protocol.", versions={"peer": "2"}, more=[3])
    found = json.loads(path.read_text())
    assert path == given.output / f"x_{found['date']}.json"
    assert found["rows"] == [["r", 1.5]] and found["more"] == [3] and found["load_before"] == 0.5
    assert found["protocol"] == "Protocol. Beside others."
    assert found["versions"]["peer"] == "2" and {"python", "torch"} <= set(found["versions"])
    assert found["hardware"] == f"{found['processor']['name']}, {os.cpu_count()} cores"
    assert found["processor"]["instruction_set"] and found["command"] and "commit" in found
    assert "| r | 1.5 |" in readme_table.table(found, path)


def test_a_gpu_is_named_and_a_ragged_row_refused(given: argparse.Namespace) -> None:
    path = results.write_result("x", given, ["a"], [[1]], "Protocol.", device="H100")
    assert json.loads(path.read_text())["hardware"] == "H100"
    with pytest.raises(ValueError, match="not as many cells"):
        results.write_result("y", given, ["a", "b"], [[1]], "Protocol.")
    assert not list(given.output.glob("y_*"))


@pytest.mark.parametrize(
    ("table", "name", "instructions"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse4_2 avx avx2 avx512f\n", "AMD EPYC", "avx512f"),
        ("model name\t: Old\nflags\t\t: fpu avx avx2\n\nmodel name\t: Old\nflags\t\t: fpu avx avx2\n", "Old", "avx2"),
        ("processor\t: 0\nFeatures\t: fp asimd sve\n", None, "sve"),
    ],
)
def test_the_processor_is_told_by_its_table(table: str, name: str | None, instructions: str) -> None:
    found = results.describe_processor(table)
    assert found["instruction_set"] == instructions and found["cores"] == os.cpu_count()
    assert found["name"] == name if name else found["name"]


def test_a_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert results.commit(tmp_path) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "file").write_text("one")
    for words in (["init", "-q"], ["add", "file"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = results.commit(tmp_path)
    assert clean is not None and len(clean) == 40
    (tmp_path / "file").write_text("two")
    assert results.commit(tmp_path) == f"{clean}-dirty"


def ask(monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    """What the arguments of a program are, given these words."""
    monkeypatch.setattr(sys, "argv", ["program.py", *words])
    return results.arguments("What it compares.", results.rounds(5), results.work("kept"), results.DEVICE)


def test_arguments_that_all_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = ask(monkeypatch, "--repeats", "3", "--work", str(tmp_path / "a" / "b"))
    assert (found.rounds, found.note, found.output) == (3, "", ROOT / "benchmarks" / "results")
    assert found.load_before >= 0 and (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize(
    ("words", "said"), [(["--rounds", "2"], "the fewest are 3"), (["--device", "cuda"], "PyTorch sees no GPU")]
)
def test_arguments_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        ask(monkeypatch, *words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


# Studies


class Verbs:
    """Stands for the verbs: notes what is asked, and makes what they would."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, *words: object, output: Path, **options: Any) -> tuple[dict[str, float], str]:
        self.asked.append((name, options))
        output.write_text(json.dumps({"perplexity": len(self.asked)}))
        return {"wall_s": float(len(self.asked)), "cpu_s": 0.0, "peak_gib": 0.0}, ""


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> Verbs:
    made = Verbs()
    monkeypatch.setattr(study, "verb", made)
    return made


def test_a_verb_is_run_once(verbs: Verbs, tmp_path: Path) -> None:
    one = study.Study(tmp_path, tmp_path)
    costs = [one.verb("trim", input="a", output=tmp_path / "x")["wall_s"] for _ in range(2)]
    assert costs == [1.0, 1.0] and verbs.asked == [("trim", {"input": "a"})]
    (tmp_path / "x").unlink()
    assert one.verb("trim", input="a", output=tmp_path / "x")["wall_s"] == 2.0


def test_perplexity_is_of_the_protocols_text(verbs: Verbs, tmp_path: Path) -> None:
    one = study.Study(tmp_path, tmp_path / "shared")
    assert one.perplexity(tmp_path / "model") == 1.0
    (name, options), text = verbs.asked[0], tmp_path / "shared" / "data" / "wikitext2" / "wiki.test.joined_nn.txt"
    assert name == "evaluate" and options == {"input": tmp_path / "model", "text": text}
    assert (tmp_path / "model.p1.json").exists()


def test_nothing_that_is_held_out_is_trained_on(tmp_path: Path) -> None:
    texts = study.Texts(tmp_path)
    for path in (texts.c4, texts.mix):
        path.parent.mkdir(parents=True)
    texts.c4.write_text("".join(f'{{"text": "c4 {n}"}}\n' for n in range(study.C4_TRAINING + 2)))
    with gzip.open(texts.mix, "wt") as mix:
        mix.writelines(f'{{"text": "{source}", "source": "{source}"}}\n' for source in ("wiki_en", "stories"))
    found = study.Study(tmp_path, tmp_path).training_text().read_text().splitlines()
    assert [json.loads(line)["text"] for line in found[-2:]] == [f"c4 {study.C4_TRAINING - 1}", "wiki_en"]
    assert len(found) == study.C4_TRAINING + 1
    assert texts.c1()["calibration_documents"] == study.C4_TRAINING


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("wanda", "2:4"), "wanda_2-4"),
        (("sparsegpt", "0.5", "--true-sequential"), "sparsegpt_0.5_true-sequential"),
        (
            ("minitron", "ffn_hidden_size=1152,num_attention_heads=6"),
            "minitron_ffn_hidden_size-1152-num_attention_heads-6",
        ),
        (("locuslab/wanda", "magnitude"), "locuslab-wanda_magnitude"),
    ],
)
def test_names_of_run_folders(words: tuple[str, ...], name: str) -> None:
    assert study.folder_name(*words) == name


# Programs


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_help_without_torch(program: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(program), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"usage: {program.name}")
    assert len(done.stdout.split("\n\n")[1]) > 40, "no word on what it compares"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and "torch" not in imported


def test_what_programs_import_of_the_package_is_there() -> None:
    files = [*PROGRAMS, *(ROOT / "benchmarks" / "bench").glob("*.py")]
    nodes = [
        node for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
    ]
    wanted = {(str(node.module), alias.name) for node in nodes for alias in node.names}
    ours = {one for one in wanted if one[0].startswith("megatron_prune.") and "maxtext" not in one[0].split(".")}
    assert len(ours) > 50
    missing = [one for one in sorted(ours) if not hasattr(importlib.import_module(one[0]), one[1])]
    assert [one for one in missing if importlib.util.find_spec(".".join(one)) is None] == []


@pytest.mark.parametrize("name", ["peers", "quality", "searched", "structured"])
def test_columns_are_those_of_the_committed_results(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = importlib.import_module(name)
    file = {"peers": "speed"}.get(name, name)
    newest = max((ROOT / "benchmarks" / "results").glob(f"{file}_*.json"))
    assert json.loads(newest.read_text())["columns"] == program.COLUMNS
    rows = getattr(program, "ROWS", None) or getattr(program, "ENTRIES", None) or program.ONE_SHOT
    assert len({row.folder for row in rows}) == len(rows), "two rows share a run folder"
