"""Blends of preprocessed text: weights, order, splits, cache, and what is refused."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_prune.__main__ import main
from megatron_prune.command_line import parse
from megatron_prune.config import PruneConfig
from megatron_prune.data import indexed
from megatron_prune.data.blend import HELD_OUT, TRAIN, Blend, BlendWindows, parse_blend
from megatron_prune.data.training import held_out_windows, training_windows
from megatron_prune.errors import UserError
from megatron_prune.option_groups import Training
from tests.models import byte_tokenizer, tiny_llama

SEQ, VOCAB = 7, 1000


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with backend.running(backend.Layout()):
        yield


def write(prefix: Path, first: int, documents: int = 30, length: int = 20) -> Path:
    """Documents that count on from `first`: every token is there once and says where it is from."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for number in range(documents):
        start = first + number * length
        builder.add_document(torch.arange(start, start + length), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def prefixes(tmp_path: Path) -> list[Path]:
    """Tokens 0 to 299 in 30 documents and 500 to 999 in 25."""
    return [write(tmp_path / "a", 0, 30, 10), write(tmp_path / "b", 500, 25, 20)]


def windows(blend: Blend, count: int, cache: Path, part: int = TRAIN, **more: Any) -> BlendWindows:
    return BlendWindows(
        blend, part, count, **{"seq_length": SEQ, "seed": 0, "vocab_size": VOCAB, "cache": cache} | more
    )


def drawn(data: BlendWindows) -> list[list[int]]:
    return [data.sample(index).tolist() for index in range(data.num_windows)]


def test_weights_are_honoured_at_every_moment(prefixes: list[Path], tmp_path: Path) -> None:
    """megatron-core takes the prefix that is furthest behind: no count is ever a whole window from its share."""
    data = windows(Blend(tuple(prefixes), (7.0, 3.0)), 200, tmp_path / "cache")
    assert data.weights == (0.7, 0.3) and data.num_windows == 200
    first = [window[0] < 500 for window in drawn(data)]
    for count in range(1, 201):
        assert abs(sum(first[:count]) - 0.7 * count) <= 1, count
    assert sum(first) == 140


def test_without_weights_every_token_counts_alike(prefixes: list[Path], tmp_path: Path) -> None:
    data = windows(Blend(tuple(prefixes), None), 160, tmp_path)
    assert data.weights == (300 / 800, 500 / 800)
    assert sum(window[0] < 500 for window in drawn(data)) == 60


def test_an_epoch_covers_the_text_once(prefixes: list[Path], tmp_path: Path) -> None:
    """A window's last token is the next one's first."""
    per_epoch = 299 // SEQ
    data = windows(Blend((prefixes[0],), None), per_epoch, tmp_path)
    assert all(torch.is_tensor(data.sample(0)) and data.sample(i).shape == (SEQ + 1,) for i in range(per_epoch))
    assert data.sample(0).dtype == torch.int64
    seen = Counter(token for window in drawn(data) for token in window[:-1])
    assert max(seen.values()) == 1 and len(seen) == per_epoch * SEQ


def test_no_id_is_taken_for_padding(tmp_path: Path) -> None:
    """Whatever the tokenizer's special tokens are: every id arrives as it is in the data."""
    prefix = write(tmp_path / "low", 0, 4, 2)
    data = windows(Blend((prefix,), None), 40, tmp_path, seq_length=8)
    pairs = {(window[i], window[i + 1]) for window in drawn(data) for i in range(8)}
    assert {(0, 1), (2, 3), (4, 5), (6, 7)} <= pairs
    assert {token for pair in pairs for token in pair} == set(range(8))


def test_a_pure_function_of_index_and_seed(prefixes: list[Path], tmp_path: Path) -> None:
    blend = Blend(tuple(prefixes), (0.5, 0.5))
    one, again, elsewhere = (drawn(windows(blend, 50, tmp_path / name)) for name in ("x", "x", "y"))
    assert one == again == elsewhere
    assert drawn(windows(blend, 50, tmp_path / "x", seed=1)) != one


def test_the_cache_is_used_and_follows_the_files(
    prefixes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, blend = tmp_path / "cache", Blend((prefixes[0],), None)
    before = drawn(windows(blend, 20, cache))
    (folder,) = cache.iterdir()
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(made) == 5 and drawn(windows(blend, 20, cache)) == before
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made
    write(prefixes[0], 500, 3, 10)  # other text of the same name, far shorter
    after = drawn(windows(blend, 20, cache))
    assert len(list(cache.iterdir())) == 2 and min(min(window) for window in after) >= 500

    def dies(*_: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(BlendWindows, "_load", dies)
    with pytest.raises(RuntimeError, match="killed"):
        windows(blend, 21, cache)
    assert len(list(cache.iterdir())) == 2, "a cache that is not whole must not be found"


def test_a_split_parts_the_documents(prefixes: list[Path], tmp_path: Path) -> None:
    blend = Blend(tuple(prefixes), (0.5, 0.5), split=(80, 20, 0))
    train = {token for window in drawn(windows(blend, 200, tmp_path)) for token in window}
    held_out = windows(blend, 999, tmp_path, HELD_OUT)
    tested = {token for window in drawn(held_out) for token in window}
    assert not train & tested
    assert max(token for token in train if token < 500) < 240 <= min(tested)
    assert held_out.num_windows == math.floor((60 - 1) // SEQ / 0.5), "until the shorter one begins anew"


def training(prefixes: list[Path], **more: Any) -> Training:
    data = (Path("0.75"), prefixes[0], Path("0.25"), prefixes[1])
    cache = prefixes[0].parent / "cache"
    small = {"seq_length": SEQ, "global_batch_size": 4, "train_iters": 10, "data_cache": cache, "eval_windows": 8}
    return Training(**{"data": data, **small, **more})


def test_what_a_run_reads(prefixes: list[Path]) -> None:
    t = training(prefixes, data_split="80,20")
    train, held_out = training_windows(t, None, VOCAB), held_out_windows(t, None, VOCAB)
    assert train.num_windows == 40 and train.info()["weights"] == [0.75, 0.25]
    assert held_out is not None and held_out.num_windows == 8
    assert held_out_windows(training(prefixes), None, VOCAB) is None
    other = held_out_windows(training(prefixes, eval_data=(prefixes[1],)), None, VOCAB)
    assert other is not None and min(int(other.sample(i).min()) for i in range(8)) >= 500


def test_yaml_pairs_and_flags_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: [[0.7, c4], [0.3, wiki]]\n")
    needed = ["--input", "a", "--output", "b", "--method", "maskllm", "--target", "2:4"]
    yaml = parse(PruneConfig, [*needed, "--config", str(tmp_path / "run.yaml")], "prune").training.data
    flags = parse(PruneConfig, [*needed, "--data", "0.7", "c4", "0.3", "wiki"], "prune").training.data
    assert yaml == flags and parse_blend("data", yaml) == Blend((Path("c4"), Path("wiki")), (0.7, 0.3))
    assert parse_blend("data", [Path("x.jsonl"), Path("y.txt")]) is None


GIVEN_WRONGLY = {
    "text beside a prefix": (("0.5", "x.jsonl", "0.5", "wiki"), "files of text, or prefixes alone"),
    "weight missing": (("0.5", "c4", "wiki"), "WEIGHT PREFIX"),
    "prefix missing": (("0.5", "c4", "0.5"), "WEIGHT PREFIX"),
    "weight of nothing": (("0", "c4", "1", "wiki"), "above 0"),
    "negative weight": (("-1", "c4", "1", "wiki"), "above 0"),
    "no number": (("nan", "c4", "1", "wiki"), "above 0"),
    "endless weight": (("inf", "c4", "1", "wiki"), "above 0"),
}


@pytest.mark.parametrize(("values", "message"), GIVEN_WRONGLY.values(), ids=GIVEN_WRONGLY.keys())
def test_blends_given_wrongly(values: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_blend("data", values)


def test_options_that_do_not_fit(prefixes: list[Path]) -> None:
    for split in ("a,b", "0,1", "1,2,3,4", "1e-3,1", ""):
        with pytest.raises(UserError, match="--data-split"):
            training(prefixes, data_split=split)
    with pytest.raises(UserError, match="--data-documents: given with preprocessed"):
        training_windows(training(prefixes, data_documents="5"), None, VOCAB)
    with pytest.raises(UserError, match="--data-split: given with files of text"):
        training_windows(training(prefixes, data=(Path("a.txt"),), data_split="9,1"), None, VOCAB)
    with pytest.raises(UserError, match="leave one part empty"):
        held_out_windows(training(prefixes, data_split="999,1"), None, VOCAB)
    with pytest.raises(UserError, match="does not fill one window"):
        held_out_windows(training(prefixes, data_split="80,20", seq_length=64), None, VOCAB)


def damage(prefix: Path, suffix: str, change: Any) -> None:
    file = prefix.with_name(prefix.name + suffix)
    file.write_bytes(change(file.read_bytes()))


DAMAGE = {
    "short .bin": (".bin", lambda data: data[:-2], "bytes, its index describes"),
    "empty .bin": (".bin", lambda data: b"", "empty or damaged"),
    "short .idx": (".idx", lambda data: data[:-8], "empty or damaged"),
    "cut header": (".idx", lambda data: data[:20], "empty or damaged"),
    "other file": (".idx", lambda data: b"x" * len(data), "empty or damaged"),
}


@pytest.mark.parametrize(("suffix", "change", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files(prefixes: list[Path], tmp_path: Path, suffix: str, change: Any, message: str) -> None:
    damage(prefixes[0], suffix, change)
    with pytest.raises(UserError, match=message):
        windows(Blend((prefixes[0],), None), 4, tmp_path)
    os.remove(f"{prefixes[0]}{suffix}")
    with pytest.raises(UserError, match="does not exist; give text in"):
        windows(Blend((prefixes[0],), None), 4, tmp_path)


def test_a_tokenizer_that_does_not_fit_the_model(
    prefixes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blend = Blend((prefixes[1],), None)
    with pytest.raises(UserError, match="holds the id 999, the model's vocabulary has 900"):  # before anything is begun
        windows(blend, 80, tmp_path / "cache", vocab_size=900)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(indexed, "LOOKED_AT", 0)  # as if it were too large for that: what is read is looked at
    with pytest.raises(UserError, match="holds the id 9.., the model's vocabulary has 900"):
        drawn(windows(blend, 80, tmp_path / "cache", vocab_size=900))
    (tmp_path / "b.json").write_text(json.dumps({"vocab_size": 1001}))
    with pytest.raises(UserError, match="vocabulary of 1001, the model's has 1000"):
        windows(blend, 80, tmp_path)


def test_mistakes_end_the_program_with_status_2(
    prefixes: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "model")]) == 0
    learn = [
        "prune",
        "--method",
        "maskllm",
        "--target",
        "2:4",
        "--input",
        tmp_path / "model",
        "--output",
        tmp_path / "x",
    ]
    short = ["--seq-length", "16", "--global-batch-size", "1", "--train-iters", "1", "--data-cache", tmp_path / "cache"]
    for data, message in (
        (["0.5", prefixes[0], prefixes[1]], "WEIGHT PREFIX"),
        ([tmp_path / "nothing"], "nothing.bin does not exist; give text in"),
        ([prefixes[1]], "the tokenizer does not fit the model"),
        ([prefixes[0], "--data-split", "0,1"], "must be above 0"),
    ):
        capsys.readouterr()
        assert main([str(word) for word in [*learn, *short, "--data", *data]]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("megatron-prune: error: ") and message in line
