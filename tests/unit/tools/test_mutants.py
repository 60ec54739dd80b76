"""The mutation run: every kind of fault, one at a time; survivors need explanations, and explanations survivors."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tools"))

from mutant_operators import mutants  # noqa: E402
from mutants import PACKAGE, TESTS, Outcome, explanations, sample, verdict, write_record  # noqa: E402

SOURCE = '''
"""Words with 1 number."""
from typing import ClassVar

HALF: float = 0.5

@decorated(frozen=True)
class Scores:
    """More words."""

    def of(self, x, sign: int = -1) -> "Tensor[1]":
        if x is None and not self.empty:
            raise UserError(f"{x + 1} given", code=2)
        total = 0
        for row in x[1:]:
            total += row.abs().sum(dim=0) * 2.0 - HALF
        return total.sqrt() if sign < 0 else say("2", 3)
'''


def changes(source: str) -> set[str]:
    return {f"{mutant.place}: {mutant.before} -> {mutant.after}" for mutant in mutants("m.py", source)}


def test_every_kind_of_fault_is_made_and_words_are_left_alone() -> None:
    total = "total += row.abs().sum(dim=0) * 2.0 - HALF"
    result = "return total.sqrt() if sign < 0 else say('2', 3)"
    head = "if x is None and (not self.empty):"
    where = "def of(self, x, sign: int=-1) -> 'Tensor[1]':"
    expected = {
        "module: HALF: float = 0.5 -> HALF: float = 1.0",
        f"Scores.of: {where} -> {where.replace('-1', '1', 1)}",
        f"Scores.of: {where} -> {where.replace('-1', '-2', 1)}",
        f"Scores.of: {head} -> if x is None or not self.empty:",
        f"Scores.of: {head} -> if x is not None and (not self.empty):",
        f"Scores.of: {head} -> if x is None and self.empty:",
        "Scores.of: total = 0 -> total = 1",
        "Scores.of: for row in x[1:]: -> for row in x[2:]:",
        f"Scores.of: {total} -> {total.replace('+=', '-=')}",
        f"Scores.of: {total} -> {total.replace('+=', '=')}",
        f"Scores.of: {total} -> {total.replace('- HALF', '+ HALF')}",
        f"Scores.of: {total} -> {total.replace('* 2.0', '/ 2.0')}",
        f"Scores.of: {total} -> {total.replace('2.0', '4.0')}",
        f"Scores.of: {total} -> {total.replace('sum', 'mean')}",
        f"Scores.of: {total} -> {total.replace('(dim=0)', '()')}",
        f"Scores.of: {total} -> {total.replace('dim=0', 'dim=1')}",
        f"Scores.of: {total} -> {total.replace('.abs()', '')}",
        f"Scores.of: {total} -> {total.replace('.abs()', '.square()')}",
        f"Scores.of: {result} -> {result.replace('total.sqrt()', 'total')}",
        f"Scores.of: {result} -> return say('2', 3) if sign < 0 else total.sqrt()",
        f"Scores.of: {result} -> {result.replace('<', '<=')}",
        f"Scores.of: {result} -> {result.replace('< 0', '< 1')}",
    }
    assert changes(SOURCE) == expected


def test_a_fault_is_one_change_of_the_source() -> None:
    plain = ast.unparse(ast.parse(SOURCE)).splitlines()
    found = mutants("m.py", SOURCE)
    assert len({mutant.key for mutant in found}) == len(found)
    for mutant in found:
        lines = mutant.apply(SOURCE).splitlines()
        different = [(a.strip(), b.strip()) for a, b in zip(plain, lines, strict=True) if a != b]
        assert different == [(mutant.before, mutant.after)]


def test_faults_that_read_alike_are_numbered() -> None:
    keys = [mutant.key for mutant in mutants("m.py", "def f(x):\n    x = x + 1\n    x = x + 1\n")]
    assert keys[0] == "m.py f: x = x + 1 -> x = x - 1" and f"{keys[0]} #1" in keys


def test_survivors_are_explained_and_explanations_needed() -> None:
    outcomes = [Outcome("a.py f: x", "survived", 1.0), Outcome("a.py f: y", "survived", 1.0)]
    outcomes += [Outcome("a.py f: z", "noticed", 1.0), Outcome("a.py f: w", "endless", 1.0)]
    known = {outcome.key for outcome in outcomes} | {"a.py f: never drawn"}
    explained = {"a.py f: x": "why", "a.py f: z": "why", "a.py f: no more": "why", "a.py f: never drawn": "why"}
    found = verdict(outcomes, explained | {"b.py f: not looked at": "why"}, known)
    assert found["unexplained"] == ["a.py f: y"]
    assert found["needless"] == ["a.py f: z", "a.py f: no more"]
    assert found["counts"] == {"survived": 2, "noticed": 1, "endless": 1}


def test_modules_and_tests_are_there_and_explanations_are_of_real_faults() -> None:
    for module, tests in TESTS.items():
        assert (ROOT / PACKAGE / module).is_file() and all((ROOT / test).is_file() for test in tests)
    known = {mutant.key for mutant in sample(10**6, ())}
    explained = explanations()
    assert set(explained) <= known and all(len(reason) > 20 for reason in explained.values())
    assert [m.key for m in sample(2, ["methods/flap.py"])] == [m.key for m in sample(3, ["methods/flap.py"])][:2]


@pytest.mark.parametrize("package", ["methods", "statistics", "kernels", "search"])
def test_every_module_that_can_have_a_fault_is_looked_at(package: str) -> None:
    files = sorted((ROOT / PACKAGE / package).glob("*.py"))
    able = {f"{package}/{file.name}" for file in files if mutants("", file.read_text())}
    assert able == {module for module in TESTS if module.startswith(f"{package}/")}


def test_a_record_keeps_what_was_judged_before(tmp_path: Path) -> None:
    """Of faults that are still there, each with its last outcome; survivors by name unless they are explained."""
    first, second, third, fourth = (mutant.key for mutant in sample(4, ["methods/flap.py"]))
    file = tmp_path / "record.json"
    old = [Outcome(first, "survived", 1.0), Outcome(second, "survived", 1.0), Outcome("gone.py f: x", "noticed", 1.0)]
    write_record(file, [*old, Outcome(third, "noticed", 1.0)], {})
    write_record(file, [Outcome(first, "noticed", 1.0), Outcome(second, "survived", 1.0)], {second: "why"})
    write_record(file, [Outcome(fourth, "endless", 1.0)], {})
    found = json.loads(file.read_text())
    assert found["faults"] == {first: "noticed", second: "explained", third: "noticed", fourth: "endless"}
    (row,) = [row for row in found["rows"] if row[0] == "methods/flap.py"]
    assert row == ["methods/flap.py", len(sample(10**6, ["methods/flap.py"])), 4, 3, 1]
    assert found["rows"][-1] == ["all", len(sample(10**6, ())), 4, 3, 1]


def test_a_hundred_faults_were_judged_and_no_survivor_is_unexplained() -> None:
    """By the newest record. Its faults may be gone by now; those that are explained there still are."""
    newest = max((ROOT / "benchmarks" / "results").glob("mutants_*.json"))
    found, known = json.loads(newest.read_text()), {mutant.key for mutant in sample(10**6, ())}
    assert len(found["faults"]) >= 100 and set(found["faults"].values()) <= {"noticed", "endless", "explained"}
    assert {key.split(" ")[0].removeprefix(f"{PACKAGE}/") for key in found["faults"]} <= set(TESTS)
    explained = {key for key, state in found["faults"].items() if state == "explained"}
    assert explained & known <= set(explanations())
