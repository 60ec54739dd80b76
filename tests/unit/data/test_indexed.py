"""Index files that lie: every one is refused, at once, before anything is begun."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_prune.__main__ import main
from megatron_prune.data import indexed
from megatron_prune.data.blend import holds_plain_arrays
from megatron_prune.data.indexed import HEADER, check_tokens, open_indexed
from megatron_prune.errors import UserError
from tests.models import byte_tokenizer, tiny_llama

LENGTHS = [5, 1, 7, 3, 4]
IDS = np.arange(sum(LENGTHS), dtype=np.uint16)
VOCAB = 257


def write(
    prefix: Path,
    lengths: list[int] = LENGTHS,
    pointers: list[int] | None = None,
    ends: list[int] | None = None,
    ids: np.ndarray = IDS,
    code: int = 8,
    version: int = 1,
) -> Path:
    """An index file of these arrays, true or not, and ids."""
    true = [2 * sum(lengths[:number]) for number in range(len(lengths))]
    pointers = true if pointers is None else pointers
    ends = list(range(len(lengths) + 1)) if ends is None else ends
    head = HEADER.pack(b"MMIDIDX\0\0", version, code, len(lengths), len(ends))
    arrays = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers)
    prefix.with_name(f"{prefix.name}.idx").write_bytes(head + arrays + struct.pack(f"<{len(ends)}q", *ends))
    prefix.with_name(f"{prefix.name}.bin").write_bytes(ids.tobytes())
    return prefix


POINTERS = [2 * sum(LENGTHS[:number]) for number in range(5)]
LIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "first length negative": (lambda p: write(p, [-1, *LENGTHS[1:]], POINTERS), "sequence 0 has -1 tokens"),
    "a length of none": (lambda p: write(p, [5, 0, 8, 3, 4]), "sequence 1 has 0 tokens"),
    "lengths all 1": (lambda p: write(p, [1] * 5, POINTERS), "sequence 1 has 1 tokens from byte 10"),
    "huge length": (lambda p: write(p, [5, 1, 2**31 - 1, 3, 4], [0, 10, 2**60, 26, 32]), "sequence 2"),
    "huge length, pointers true": (lambda p: write(p, [5, 1, 2**31 - 1, 3, 4]), "its index describes"),
    "pointers all 0": (lambda p: write(p, pointers=[0] * 5), "sequence 1 has 1 tokens from byte 0"),
    "pointer negative": (lambda p: write(p, pointers=[-2, *POINTERS[1:]]), "sequence 0"),
    "pointer of 2^62": (lambda p: write(p, pointers=[*POINTERS[:3], 2**62, POINTERS[4]]), "sequence 3"),
    "pointers exchanged": (lambda p: write(p, pointers=[*POINTERS[:3], POINTERS[4], POINTERS[3]]), "sequence 3"),
    "last end negative": (lambda p: write(p, ends=[0, 1, 2, 3, 4, -1]), "document ends do not rise from 0 to 5"),
    "ends fall": (lambda p: write(p, ends=[0, 3, 2, 5]), "document ends do not rise"),
    "ends begin late": (lambda p: write(p, ends=[1, 5]), "document ends do not rise"),
    "ends stop early": (lambda p: write(p, ends=[0, 4]), "document ends do not rise"),
    "ends too large": (lambda p: write(p, ends=[0, 2**62]), "document ends do not rise"),
    "no ends": (lambda p: write(p, ends=[]), "document ends do not rise"),
    "ids of floats": (lambda p: write(p, code=7), "empty or damaged"),
    "unknown ids": (lambda p: write(p, code=99), "empty or damaged"),
    "another version": (lambda p: write(p, version=2), "empty or damaged"),
    "ids missing": (lambda p: write(p, ids=IDS[:-1]), "38 bytes, its index describes 40"),
    "ids too many": (lambda p: write(p, ids=np.append(IDS, IDS)), "80 bytes, its index describes 40"),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("chunk", [1 << 24, 2, 1])
def test_lies_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int) -> None:
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    make, message = LIES[name]
    with pytest.raises(UserError, match=message):
        open_indexed(make(tmp_path / "x"), VOCAB)


@pytest.mark.parametrize("chunk", [1 << 24, 2, 1])
def test_what_is_true_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    for ends in (None, [0, 5], [0, 2, 2, 5]):
        data = open_indexed(write(tmp_path / "x", ends=ends), VOCAB)
        assert [len(data[number]) for number in range(5)] == LENGTHS
        assert np.concatenate([data[number] for number in range(5)]).tolist() == IDS.tolist()
        check_tokens(tmp_path / "x", VOCAB)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"documents": 4}, "documents 4, its .idx 5"),
        ({"tokens": 21}, "tokens 21, its .idx 20"),
        ({"dtype": "int32"}, "dtype"),
    ],
)
def test_a_json_of_another_text_is_refused(tmp_path: Path, told: dict[str, Any], said: str) -> None:
    write(tmp_path / "x")
    (tmp_path / "x.json").write_text(json.dumps({"documents": 5, "tokens": 20, "dtype": "uint16"}))
    open_indexed(tmp_path / "x", VOCAB)
    (tmp_path / "x.json").write_text(json.dumps({"documents": 5, "tokens": 20, "dtype": "uint16"} | told))
    with pytest.raises(UserError, match=said):
        open_indexed(tmp_path / "x", VOCAB)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 34 + 5 * 12 + 6 * 8 - 1), bit=st.integers(0, 7))
def test_no_flipped_bit_of_an_index_goes_unseen(tmp_path: Path, place: int, bit: int) -> None:
    """But of the type of the ids where another of the same width is named, and of ends that still rise."""
    file = write(tmp_path / "x").with_name("x.idx")
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)
    ends = np.frombuffer(bytes(data[-48:]), np.int64)
    if ends[0] == 0 and ends[-1] == 5 and (np.diff(ends) >= 0).all() and place >= len(data) - 48:
        return
    with pytest.raises(UserError):
        open_indexed(tmp_path / "x", VOCAB)


@pytest.mark.parametrize(("ids", "found"), [([256, 257], "257"), ([0, 65535], "65535")])
def test_ids_without_an_embedding(tmp_path: Path, ids: list[int], found: str) -> None:
    write(tmp_path / "x", [2], ids=np.array(ids, np.uint16))
    with pytest.raises(UserError, match=f"holds the id {found}, the model's vocabulary has 257"):
        check_tokens(tmp_path / "x", VOCAB)


def test_negative_ids(tmp_path: Path) -> None:
    write(tmp_path / "x", [2], ids=np.array([3, -4], np.int16), code=3)
    with pytest.raises(UserError, match="holds the id -4"):
        check_tokens(tmp_path / "x", VOCAB)


def test_nothing_is_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the verbs that read them, and the corrected command works."""
    byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=VOCAB, intermediate_size=64))
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "model")]) == 0
    lengths = [40] * 10
    ids = np.arange(400, dtype=np.uint16) % VOCAB
    short = ["--seq-length", "16", "--global-batch-size", "2", "--train-iters", "2"]
    data = ["--data", str(tmp_path / "x"), "--data-cache", str(tmp_path / "cache")]
    verbs = {
        "prune": ["prune", "--method", "maskllm", "--target", "2:4", "--input", str(tmp_path / "model")],
        "train": ["train", "--input", str(tmp_path / "model")],
        "fsdp": ["train", "--engine", "fsdp", "--input", str(tmp_path / "hf")],
    }
    before = {"hf", "model", "x.bin", "x.idx"}
    for name, verb in verbs.items():
        words = [*verb, *short, *data, "--output", str(tmp_path / name)]
        wrong = ids.copy()
        wrong[399] = 300
        for bad in ({"ids": wrong}, {"pointers": [0] * 10}, {"ends": [0, 11]}):
            write(tmp_path / "x", lengths, **({"ids": ids} | bad))
            capsys.readouterr()
            assert main(words) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert "x" in line and {path.name for path in tmp_path.iterdir()} - {"cache"} == before
        write(tmp_path / "x", lengths, ids=ids)
        assert main(words) == 0
        before.add(name)


@pytest.mark.parametrize("engine", ["megatron", "fsdp"])
def test_a_run_that_reads_a_wrong_id_first_is_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Of a file too large to be looked at before: the run folder is there when the id is read, and goes again."""
    monkeypatch.setattr(indexed, "LOOKED_AT", 0)
    byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=VOCAB, intermediate_size=64))
    write(tmp_path / "x", [400], ids=np.full(400, 300, np.uint16))
    words = ["train", "--engine", engine, "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "run")]
    words += ["--seq-length", "16", "--global-batch-size", "2", "--train-iters", "2", "--data", str(tmp_path / "x")]
    words += ["--data-cache", str(tmp_path / "cache")]
    capsys.readouterr()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "holds the id 300" in line and not list(tmp_path.glob("*run*"))
    write(tmp_path / "x", [400], ids=np.full(400, 3, np.uint16))
    assert main(words) == 0


def test_a_cache_of_objects_is_not_read(tmp_path: Path) -> None:
    """megatron-core reads its cache with pickle allowed: an array of objects would run what it says."""

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "marker"),)

    np.save(tmp_path / "a.npy", np.arange(3))
    assert holds_plain_arrays(tmp_path)
    np.save(tmp_path / "b.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    assert not holds_plain_arrays(tmp_path) and not (tmp_path / "marker").exists()
    (tmp_path / "b.npy").write_bytes(b"no array")
    assert not holds_plain_arrays(tmp_path)
