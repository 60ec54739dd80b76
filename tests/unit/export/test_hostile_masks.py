"""Mask files that somebody made wrong on purpose: one line, and no memory for what is not there."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.decision.mask_file import load_mask_npz, mask_npz_pattern
from megatron_prune.decision.mask_npz import PATTERN, SHAPE
from megatron_prune.maxtext.masks import PackedMasks
from megatron_prune.maxtext.score import read_answers, read_requests
from megatron_prune.model.families import family_of
from tests.hostile import complaint
from tests.models import TINY_SIZES

CONFIG = family_of({"model_type": "llama"}).from_hf({"model_type": "llama", **TINY_SIZES["llama"]})
NAME = "model.layers.0.self_attn.q_proj.weight"


def npy(array: np.ndarray) -> bytes:
    """A .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def header(text: str, version: tuple[int, int] = (1, 0)) -> bytes:
    """A .npy file with this header and little behind it."""
    data = text.encode() + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(data)) + data + bytes(64)


def honest() -> dict[str, bytes]:
    """Entries of a file with the mask of every prunable weight."""
    from megatron_prune.decision.masks import prunable_shapes

    entries = {PATTERN: npy(np.array("2:4"))}
    for name, shape in prunable_shapes(CONFIG).items():
        mask = np.tile([True, True, False, False], int(np.prod(shape)) // 4)
        entries |= {name: npy(np.packbits(mask)), name + SHAPE: npy(np.array(shape))}
    return entries


def write(path: Path, entries: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    """An .npz of these entries."""
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in entries.items():
            archive.writestr(name + ".npy", data)
    return path


ENTRIES: dict[str, dict[str, bytes]] = {
    "shape 2^50": {NAME: header("{'descr': '|u1', 'fortran_order': False, 'shape': (1125899906842624,), }")},
    "shape of digits": {NAME: header("{'descr': '|u1', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",), }")},
    "negative shape": {NAME: header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1,), }")},
    "unfinished header": {NAME: header("{'descr': '|u1', 'fortran_order': False, 'shape': (")},
    "header of parentheses": {NAME: header("(" * 5000)},
    "header of another kind": {NAME: header("[1, 2]")},
    "header without keys": {NAME: header("{}")},
    "unknown type": {NAME: header("{'descr': '|Q9', 'fortran_order': False, 'shape': (4,), }")},
    "type that is an object": {NAME: header("{'descr': '|O', 'fortran_order': False, 'shape': (4,), }")},
    "version 3": {NAME: header("{'descr': '|u1', 'fortran_order': False, 'shape': (4,), }", (3, 0))},
    "version 9": {NAME: header("{'descr': '|u1', 'fortran_order': False, 'shape': (4,), }", (9, 9))},
    "pickle": {NAME: npy(np.array([print], dtype=object))},
    "nothing": {NAME: b""},
    "no array": {NAME: b"hello"},
    "NUL": {NAME: bytes(5000)},
    "too short": {NAME: npy(np.zeros(3, np.uint8))},
    "too long": {NAME: npy(np.zeros(100_000, np.uint8))},
    "floats": {NAME: npy(np.full(32 * 32, np.nan))},
    "other numbers": {NAME: npy(np.full((32, 32), 7, np.uint8))},
    "shape that lies": {NAME + SHAPE: npy(np.array([2**62, 2**62]))},
    "shape of text": {NAME + SHAPE: npy(np.array(["a", "b"]))},
    "shape of thousands": {NAME + SHAPE: npy(np.zeros(5000, np.int64))},
    "pattern of digits": {PATTERN: npy(np.array("2:" + "9" * 900))},
    "long pattern": {PATTERN: npy(np.array("2" * 100_000))},
    "pattern of numbers": {PATTERN: npy(np.zeros(3))},
    "pattern that is broken": {PATTERN: npy(np.array("1:4"))},
    "pattern without groups": {PATTERN: npy(np.array("3:7"))},
    "unknown weight": {"x" * 60_000: npy(np.zeros(3, np.uint8))},
    "name with a newline": {"a\nb": npy(np.zeros(3, np.uint8))},
    "name that leads out": {"../../a": npy(np.zeros(3, np.uint8))},
}


def readers(path: Path) -> list[Callable[[], object]]:
    """All that read a mask file."""
    return [lambda: list(load_mask_npz(path, CONFIG)), lambda: PackedMasks(path, CONFIG)]


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_honest_file_is_read(tmp_path: Path, how: int) -> None:
    for read in readers(write(tmp_path / "m.npz", honest(), how)):
        assert complaint(read) is None


@pytest.mark.parametrize("name", ENTRIES)
def test_entries(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.npz", honest() | ENTRIES[name], zipfile.ZIP_DEFLATED)
    told = [complaint(read) for read in readers(path)]
    assert told[0] is not None
    assert told[1] is not None or name.startswith(("pattern", "long pattern"))  # it keeps the pattern for others
    complaint(lambda: mask_npz_pattern(path))


def flipped(data: bytes, flag: int, method: int | None = None) -> bytes:
    """An archive whose entries claim to be encrypted, or packed in another way."""
    changed = bytearray(data)
    for sign, flags, way in ((b"PK\x03\x04", 6, 8), (b"PK\x01\x02", 8, 10)):
        place = data.find(sign)
        while place >= 0:
            changed[place + flags] |= flag
            if method is not None:
                changed[place + way : place + way + 2] = struct.pack("<H", method)
            place = data.find(sign, place + 4)
    return bytes(changed)


@pytest.mark.parametrize(
    "name", ["encrypted", "strong", "lzma", "unknown", "cut", "empty", "text", "npy", "bomb", "twice"]
)
def test_archives(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.npz", honest())
    data = path.read_bytes()
    forms = {
        "encrypted": flipped(data, 1),
        "strong": flipped(data, 0x41),
        "lzma": flipped(data, 0, 14),
        "unknown": flipped(data, 0, 77),
        "cut": data[: len(data) // 2],
        "empty": b"",
        "text": b"hello" * 100,
        "npy": npy(np.zeros(5)),
    }
    if name in forms:
        path.write_bytes(forms[name])
    elif name == "bomb":
        write(path, honest() | {NAME: bytes(300_000_000)}, zipfile.ZIP_DEFLATED)
    else:
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(NAME + ".npy", npy(np.zeros(3, np.uint8)))
    for read in readers(path):
        assert complaint(read) is not None
    assert (complaint(lambda: mask_npz_pattern(path)) is None) == (name == "bomb")  # of which it reads another entry


def test_a_fifo_a_folder_and_nothing(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "fifo", tmp_path / "folder", tmp_path / "none", Path("/dev/zero"), tmp_path / ("x" * 300)):
        for read in readers(path):
            assert complaint(read) is not None


LENGTHS: dict[str, dict[str, np.ndarray]] = {
    "negative": {"context_lengths": np.array([-1, 3])},
    "too many": {"context_lengths": np.array([2**62, 2**62])},
    "floats": {"context_lengths": np.array([1.0, 1.0])},
    "matrix": {"context": np.zeros((2, 1), np.int32)},
    "text": {"context": np.array(["a", "b"])},
    "fewer": {"context_lengths": np.array([2])},
}


@pytest.mark.parametrize("name", LENGTHS)
def test_requests(name: str, tmp_path: Path) -> None:
    fair = {key: np.zeros(2, np.int32) for key in ("context", "continuation")}
    fair |= {f"{key}_lengths": np.array([1, 1]) for key in ("context", "continuation")}
    np.savez(tmp_path / "r.npz", **fair)
    assert complaint(lambda: read_requests(tmp_path / "r.npz")) is None
    np.savez(tmp_path / "r.npz", **(fair | LENGTHS[name]))
    assert complaint(lambda: read_requests(tmp_path / "r.npz")) is not None


def test_answers(tmp_path: Path) -> None:
    for total, greedy in (
        (np.zeros(2), np.zeros(3, bool)),
        (np.zeros(2), np.zeros(2)),
        (np.zeros((1, 2)), np.zeros((1, 2), bool)),
    ):
        np.savez(tmp_path / "a.npz", log_likelihood=total, greedy=greedy)
        assert complaint(lambda: read_answers(tmp_path / "a.npz")) is not None
    np.savez(tmp_path / "a.npz", log_likelihood=np.zeros(2), greedy=np.zeros(2, bool))
    assert complaint(lambda: read_answers(tmp_path / "a.npz")) is None
