"""Calibration text by name: streamed once, the same for a seed, kept; and without a network one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prune.__main__ import main
from megatron_prune.data import named
from megatron_prune.data.calibration import windows
from megatron_prune.data.text import read_documents
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.errors import UserError
from tests.models import byte_tokenizer, tiny_llama, words


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "megatron_prune"


@pytest.fixture
def hub(tmp_path: Path) -> str:
    """A data set on this machine, which is read as one of the hub."""
    (tmp_path / "set").mkdir()
    words(tmp_path / "set" / "train.jsonl", 40)
    return f"hub:{tmp_path / 'set'}"


def texts(path: Path) -> list[str]:
    return read_documents([path])


def test_a_data_set_is_fetched_once_and_shuffled_by_the_seed(hub: str, tmp_path: Path, cache: Path) -> None:
    (first,) = named.named_files([Path(hub)], 2, seed=0)
    source = texts(tmp_path / "set" / "train.jsonl")
    assert first.parent == cache and sorted(texts(first)) == sorted(source) and texts(first) != source
    time = first.stat().st_mtime_ns
    assert named.named_files([Path(hub)], 2, seed=0) == (first,) and first.stat().st_mtime_ns == time
    (other,) = named.named_files([Path(hub)], 2, seed=1)
    assert other != first and texts(other) != texts(first)


def test_no_more_than_is_needed_is_fetched(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "FEWEST", 8)
    monkeypatch.setattr(named, "EACH", 3)
    (found,) = named.named_files([Path(hub)], 5, seed=0)
    assert len(texts(found)) == 15


def test_names_are_short_for_data_sets_and_lines_of_wikitext_are_one_text(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "NAMED", {"c4": hub, "wikitext2": hub})
    c4, joined, file = named.named_files([Path("c4"), Path("wikitext2"), tmp_path / "x.txt"], 2, seed=0)
    assert len(texts(c4)) == 40 and file == tmp_path / "x.txt"
    assert texts(joined) == ["\n\n".join(texts(tmp_path / "set" / "train.jsonl"))]


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named.is_named("c4")
    (tmp_path / "c4").touch()
    assert not named.is_named("c4") and not named.is_named("text.jsonl")


def test_without_a_network_it_is_one_line(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: (_ for _ in ()).throw(OSError("no net")))
    with pytest.raises(UserError, match="--calibration.*allenai/c4.*no net.*sample, which comes with the package"):
        named.named_files([Path("c4")], 2, seed=0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(UserError, match="--calibration.*allenai/c4.*offline.*sample, which comes with the package"):
        named.named_files([Path("c4")], 2, seed=0)
    assert not cache.exists() or not list(cache.glob("*"))


def test_the_sample_that_comes_along_is_enough_to_prune(tmp_path: Path) -> None:
    """Of a model with the paper's window, by a command with no file of text, and with what was read in the record."""
    hf = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    asked = ["--method", "wanda", "--target", "2:4", "--calibration", "sample", "--calibration-samples", "4"]
    assert main(["prune", str(hf), str(tmp_path / "run"), *asked]) == 0
    record = json.loads((tmp_path / "run" / "decision" / "decision.json").read_text())["calibration"]
    assert record["source"] == ["sample.txt"] and len(record["sha256"]) == 64
    (file,) = named.named_files([Path("sample")], 4, seed=0)
    assert windows([file], load_tokenizer(hf, 257), 2, 2048, 0).tokens.shape == (2, 2048)
