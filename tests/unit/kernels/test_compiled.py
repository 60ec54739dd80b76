"""Building C kernels: cache, concurrent builds, and what happens without a working compiler."""

from __future__ import annotations

import ctypes
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
    with pytest.warns(RuntimeWarning, match=r"failed on answer\.c"):
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
