"""Building C kernels: cache, concurrent builds, and what happens without a working compiler."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.kernels import compiled
from megatron_prune.kernels.gumbel import Position, masked_weight

needs_compiler = pytest.mark.skipif(not compiled.compilers(), reason="no C compiler on this machine")
CACHES = (compiled._load, compiled._warn_once, compiled.cache_directory, compiled._version)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache on disk, and nothing remembered in the process before or after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(compiled.DISABLE_VARIABLE, raising=False)
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def evaluate(implementation: Any = "auto") -> torch.Tensor:
    weight, logits = torch.ones(2, 8), torch.zeros(2, 2, 6)
    arguments: dict[str, Any] = {"n": 2, "m": 4, "scale": 1.0, "temperature": 1.0, "draw": None}
    return masked_weight(weight, logits, position=Position.whole(2, 2), implementation=implementation, **arguments)


@needs_compiler
def test_builds_once_and_loads_from_the_cache(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = compiled.load_library(source)
    assert library is not None and library.answer() == 42
    assert len(list(compiled.cache_directory().glob("*.so"))) == 1
    compiled._load.cache_clear()
    monkeypatch.setattr(compiled, "_build", lambda *_: pytest.fail("built a second time"))
    assert compiled.load_library(source) is not None


@needs_compiler
def test_changed_source_is_another_library(source: Path) -> None:
    compiled.load_library(source)
    source.write_text("int answer(void) { return 43; }\n")
    compiled._load.cache_clear()
    library = compiled.load_library(source)
    assert library is not None and library.answer() == 43


@needs_compiler
def test_concurrent_builds_leave_one_whole_file(source: Path) -> None:
    library = compiled.cache_directory() / "x.so"
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda _: compiled._build(source, compiled.compilers()[0], ("-shared", "-fPIC"), library),
                range(4),
            )
        )
    assert [path.name for path in library.parent.iterdir()] == ["x.so"]
    assert ctypes.CDLL(str(library)).answer() == 42


def test_disabled_by_environment_is_quiet(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.DISABLE_VARIABLE, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.load_library(source) is None
        assert torch.equal(evaluate(), torch.full((2, 8), 0.5))


def test_missing_compiler_warns_once_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compilers", list)
    with pytest.warns(RuntimeWarning, match=r"no C compiler found.*slower.*Install a C compiler") as caught:
        first, second = evaluate(), evaluate()
    assert len(caught) == 1
    assert torch.equal(first, torch.full((2, 8), 0.5)) and torch.equal(first, second)
    with pytest.raises(ValueError, match="needs a working C compiler"):
        evaluate("cpu")


@needs_compiler
def test_broken_source_warns_with_the_compilers_words(source: Path) -> None:
    source.write_text("int answer(void) { return nonsense; }\n")
    with pytest.warns(RuntimeWarning, match=r"failed on answer\.c: .*answer\.c"):
        assert compiled.load_library(source) is None
    assert list(compiled.cache_directory().iterdir()) == []


@needs_compiler
def test_broken_cc_gives_way_to_another_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -x")
    assert compiled.load_library(source) is not None


@needs_compiler
def test_unwritable_cache_still_builds(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled.load_library(source) is not None
    assert "cannot be used" in caplog.text


@needs_compiler
def test_damaged_cache_entry_is_removed(source: Path) -> None:
    compiled.load_library(source)
    (entry,) = compiled.cache_directory().glob("*.so")
    entry.unlink()  # a new file: the loaded one is still mapped
    entry.write_bytes(b"damaged")
    compiled._load.cache_clear()
    assert compiled.load_library(source) is not None


def test_a_library_is_of_one_compiler_version_flags_and_processor(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever changes, the file has another name; the same again has the same."""
    built: list[str] = []

    def build(_source: Path, _command: list[str], _flags: tuple[str, ...], library: Path) -> None:
        built.append(library.name)

    monkeypatch.setattr(compiled, "_build", build)
    monkeypatch.setattr(compiled.ctypes, "CDLL", lambda path: path)
    monkeypatch.setattr(compiled, "_version", lambda command: "cc 1.0")
    monkeypatch.setattr(compiled, "processor", lambda: "one")

    def name(text: bytes = b"a", command: str = "cc", flags: tuple[str, ...] = ("-O3",)) -> None:
        compiled._build_and_open(source, text, [command], flags)

    for different in ({}, {"text": b"b"}, {"command": "gcc"}, {"flags": ("-O2",)}):
        name(**different)  # type: ignore[arg-type]
    monkeypatch.setattr(compiled, "_version", lambda command: "cc 2.0")
    name()
    monkeypatch.setattr(compiled, "processor", lambda: "two")
    name()
    assert len(set(built)) == len(built) == 6
    name()
    assert built[6] == built[5]


def test_a_compilers_version_is_the_first_line_that_it_says(tmp_path: Path) -> None:
    assert compiled._version((sys.executable,)) == f"Python {platform.python_version()}"
    for name, script in (("two", "echo one\necho two"), ("silent", "true"), ("broken", "echo one\nexit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    found = [compiled._version((str(tmp_path / name),)) for name in ("two", "silent", "broken", "missing")]
    assert found == ["one", "", None, None]


def test_compilers_are_those_that_work_the_users_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_version", lambda command: "1" if command[0] in ("mine", "gcc") else None)
    monkeypatch.setenv("CC", "  mine 'with words' -x")
    assert compiled.compilers() == [["mine", "with words", "-x"], ["gcc"]]
    monkeypatch.setenv("CC", " ")
    assert compiled.compilers() == [["gcc"]]


def test_a_weaker_library_says_what_it_lost(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The best flags first, with every compiler; what came before is told with the first one that works."""
    tried: list[tuple[str, tuple[str, ...]]] = []

    def opened(_source: Path, _text: bytes, command: list[str], flags: tuple[str, ...]) -> str:
        tried.append((command[0], flags[len(compiled.BASE_FLAGS) :]))
        assert flags[: len(compiled.BASE_FLAGS)] == compiled.BASE_FLAGS
        if len(tried) < 4:
            raise compiled.BuildError(f"reason {len(tried)}")
        return "library"

    monkeypatch.setattr(compiled, "compilers", lambda: [["a"], ["b"]])
    monkeypatch.setattr(compiled, "_build_and_open", opened)
    assert compiled.load_library(source) == "library"
    variants = [flags for flags, _ in compiled.VARIANTS]
    assert tried == [("a", variants[0]), ("b", variants[0]), ("a", variants[1]), ("b", variants[1])]
    assert "compiled by b without OpenMP, so one thread; earlier attempt: reason 1" in caplog.text


@pytest.mark.parametrize("word", ["0", " False", "no", "OFF "])
def test_the_switch_understands_its_words(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.DISABLE_VARIABLE, word)
    assert not compiled.enabled()
    monkeypatch.setenv(compiled.DISABLE_VARIABLE, "1")
    assert compiled.enabled()


def test_the_cache_is_where_the_system_has_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.cache_directory() == tmp_path / "cache" / "megatron_prune"
    compiled.cache_directory.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert compiled.cache_directory() == tmp_path / "home" / ".cache" / "megatron_prune"


def test_a_cache_that_cannot_be_written_gives_way_to_a_private_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    private = compiled.cache_directory()
    assert private.is_dir() and private.name.startswith("megatron_prune_") and not any(private.iterdir())
    assert "cannot be used (not writable)" in caplog.text
    private.rmdir()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="this system does not tell its processor in /proc")
def test_the_processor_is_its_name_and_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first core, each line once; where the system does not say, what Python knows."""
    compiled.processor.cache_clear()
    lines = "processor : 0\nmodel name : A\nflags : x y\n\nprocessor : 1\nmodel name : B\nflags : z\n"
    with monkeypatch.context() as patched:
        patched.setattr(compiled.Path, "read_text", lambda self: lines)
        assert compiled.processor().splitlines() == [platform.machine(), "flags : x y", "model name : A"]
        compiled.processor.cache_clear()

        def refused(self: Path) -> str:
            raise PermissionError

        patched.setattr(compiled.Path, "read_text", refused)
        assert compiled.processor() == f"{platform.machine()} {platform.processor()}"
    compiled.processor.cache_clear()
