"""Statistics on disk: which folder is taken, what tells one model from another, what outlives a failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.claims import PARTIAL
from megatron_prune.decision.source import open_model
from megatron_prune.errors import UserError
from megatron_prune.model.prunable import FC2, PROJECTION, PrunableModel
from megatron_prune.statistics import store as store_module
from megatron_prune.statistics.channels import ChannelActivations, ChannelMoments, Gram
from megatron_prune.statistics.store import StatisticsStore
from tests.models import tiny_model

WINDOWS = torch.arange(24).view(4, 6)
SITES = {FC2: ChannelActivations, PROJECTION: Gram}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with backend.running(backend.Layout()):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PrunableModel:
    return open_model(tiny_model(tmp_path_factory.mktemp("model"), "llama")).load(backend.Layout())


def made(model: PrunableModel, folder: Path, tokens: Tensor = WINDOWS) -> StatisticsStore:
    return StatisticsStore(folder, model, tokens)


def measured(kind: Any, seed: int) -> Any:
    """A statistic of six channels over some windows `[s, b, channels]`."""
    found = kind(6)
    x = torch.randn(7, 3, 6, generator=torch.Generator().manual_seed(seed))
    found.update(x if kind is not Gram else x.flatten(0, 1))
    return found


def fill(store: StatisticsStore, sites: dict[str, Any] = SITES, complete: bool = True) -> list[dict[str, Any]]:
    """Statistics of two layers, which are in the store then."""
    found = [{site: measured(kind, 10 * layer + n) for n, (site, kind) in enumerate(sites.items())} for layer in (0, 1)]
    for layer, statistics in enumerate(found):
        store.write(layer, statistics)
    if complete:
        store.complete(sites)
    return found


def test_what_is_written_is_read_again(model: PrunableModel, tmp_path: Path) -> None:
    """By another store on the same folder, once it is complete of every layer."""
    store = made(model, tmp_path / "kept")
    expected = fill(store, complete=False)
    assert not store.has(SITES) and not made(model, tmp_path / "kept").has(SITES)
    store.complete(SITES)
    again = made(model, tmp_path / "kept")
    assert again.has(SITES) and again.has({FC2: ChannelActivations}) and not again.has({**SITES, FC2: Gram})
    for layer, statistics in enumerate(expected):
        into = {site: kind(6) for site, kind in SITES.items()}
        again.read(layer, into)
        for site, statistic in statistics.items():
            for ours, theirs in zip(into[site].tensors(), statistic.tensors(), strict=True):
                assert torch.equal(ours, theirs) and theirs.any()


def test_a_statistic_that_begins_alike_serves(model: PrunableModel, tmp_path: Path) -> None:
    """Channels' moments hold their activations; it is read from them, and written no second time."""
    store = made(model, tmp_path / "kept")
    moments = fill(store, {FC2: ChannelMoments})
    assert store.has({FC2: ChannelActivations}) and not store.has({PROJECTION: ChannelActivations})
    plain = ChannelActivations(6)
    store.read(1, {FC2: plain})
    for ours, theirs in zip(plain.tensors(), moments[1][FC2].tensors(), strict=False):
        assert torch.equal(ours, theirs)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    store.write(0, {FC2: measured(ChannelMoments, 99)})
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()} == before
    other = made(model, tmp_path / "other")
    fill(other, {FC2: ChannelActivations})
    assert not other.has({FC2: ChannelMoments})


def test_any_number_of_a_small_tensor_tells_models_apart(model: PrunableModel, tmp_path: Path) -> None:
    made(model, tmp_path / "kept")
    for map in model.maps[:4]:
        before = model.whole(map).clone()
        for place in (0, 1, before.numel() // 2 + 1, before.numel() - 1):
            changed = before.clone()
            changed.view(-1)[place] += 1
            model.assign(map, changed)
            with pytest.raises(UserError, match="was made with another weights: give a new folder"):
                made(model, tmp_path / "kept")
        model.assign(map, before)
    made(model, tmp_path / "kept")


def test_large_tensors_are_told_apart_by_evenly_spaced_numbers(
    model: PrunableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4096 with 1000 to be looked at every fourth, which is 1024 of them."""
    monkeypatch.setattr(store_module, "SAMPLED", 1000)
    map = model.by_name["embedding.word_embeddings.weight"]
    before = model.whole(map).clone()
    assert before.numel() == 4096
    made(model, tmp_path / "kept")
    for place in (0, 3, 4, 4092, 4095):
        changed = before.clone()
        changed.view(-1)[place] += 1
        model.assign(map, changed)
        if place % 4:
            made(model, tmp_path / "kept")
        else:
            with pytest.raises(UserError, match="another weights"):
                made(model, tmp_path / "kept")
    model.assign(map, before)


def test_windows_tell_statistics_apart(model: PrunableModel, tmp_path: Path) -> None:
    made(model, tmp_path / "kept")
    for other, key in ((WINDOWS + 1, "tokens"), (WINDOWS.view(3, 8), "windows"), (WINDOWS[:3], "windows")):
        with pytest.raises(UserError, match=f"another {key}"):
            made(model, tmp_path / "kept", other)


def test_a_folder_is_new_empty_or_one_of_statistics(model: PrunableModel, tmp_path: Path) -> None:
    made(model, tmp_path / "a" / "b" / "kept")
    (tmp_path / "empty").mkdir()
    made(model, tmp_path / "empty")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / f"00000.x{PARTIAL}").touch()  # of a process that was killed
    made(model, tmp_path / "begun")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty and holds no statistics: give another folder"):
        made(model, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["letter.txt"]


def test_what_is_complete_outlives_a_failure(model: PrunableModel, tmp_path: Path) -> None:
    """Of the folder or of a part of it; where nothing is, no folder is left."""
    for name, whole, part, left in (
        ("nothing", False, False, (False, False)),
        ("whole", True, False, (True, False)),
        ("part", False, True, (True, True)),
    ):
        store = made(model, tmp_path / name)
        beside = store.part("fit", model, WINDOWS[:2])
        fill(store, complete=whole)
        fill(beside, complete=part)
        store.forget()
        assert ((tmp_path / name).exists(), (tmp_path / name / "fit").exists()) == left
    assert made(model, tmp_path / "whole").has(SITES)
    assert made(model, tmp_path / "part" / "fit", WINDOWS[:2]).has(SITES)


def test_only_the_first_rank_forgets(model: PrunableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made(model, tmp_path / "kept")
    with monkeypatch.context() as patched:
        patched.setattr(backend, "rank", lambda: 1)
        store.forget()
    assert (tmp_path / "kept").is_dir()
    store.forget()
    assert not (tmp_path / "kept").exists()
