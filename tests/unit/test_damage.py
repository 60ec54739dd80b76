"""A bit that has changed on the disk is found before anything is made of it: one line, status 2, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.files import checksum, write_json
from megatron_prune.model.checkpoint import _merged
from megatron_prune.tensor_files import Damaged, read_tensors, write_tensors
from tests.models import byte_tokenizer, tiny_llama, words
from tests.runs import STORED


def flip(file: Path, share: float = 0.5) -> None:
    """Change one bit of a file, at this share of its length."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * share)] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a text, and kept statistics."""
    root = tmp_path_factory.mktemp("damage")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    assert main(["import", "--input", str(root / "hf"), "--output", str(root / "model")]) == 0
    assert main(prune(root, "first")) == 0
    return root


def prune(root: Path, name: str) -> list[str]:
    """A structured run that keeps its statistics."""
    text = ["--calibration", str(root / "words.jsonl"), "--calibration-samples", "4", "--calibration-seq-length", "32"]
    flags = ["--method", "shortgpt", "--target", "num_layers=1", "--statistics", str(root / "statistics"), *text]
    return ["prune", "--input", str(root / "model"), "--output", str(root / name), *flags]


@pytest.mark.parametrize("name", [f"weights/{name}" for name in STORED])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_bit_of_a_models_weights(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, share: float
) -> None:
    refused_after_flip(root, tmp_path, capsys, name, share)


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"])
def test_a_bit_of_its_other_files(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    refused_after_flip(root, tmp_path, capsys, name, 0.5)


def refused_after_flip(root: Path, path: Path, capsys: pytest.CaptureFixture[str], name: str, share: float) -> None:
    """Export a copy of the checkpoint in which a file has another bit."""
    copy = path / "copy"
    shutil.copytree(root / "model", copy)
    flip(copy / name, share)
    assert main(["export", "--input", str(copy), "--output", str(path / "out")]) == 2
    assert f"is damaged: {Path(name).name} has changed" in capsys.readouterr().err.replace("tokenizer/", "")
    assert not list(path.glob("out*"))


def test_a_checkpoint_of_an_earlier_version_is_read(root: Path, tmp_path: Path) -> None:
    """Which has no checksums beside its description."""
    copy = tmp_path / "copy"
    shutil.copytree(root / "model", copy)
    (copy / "checksums.json").unlink()
    sizes = json.loads((copy / "manifest.json").read_text())
    del sizes["checksums.json"]
    write_json(copy / "manifest.json", sizes)
    assert main(["export", "--input", str(copy), "--output", str(tmp_path / "out")]) == 0


def test_a_list_of_checksums_that_leads_elsewhere(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root / "model", copy)
    file = copy / "weights" / "checksums.json"
    os.mkfifo(copy / "weights" / "pipe")
    for name, why in (("../../../../../../../dev/zero", "dev/zero"), ("pipe", "is no file of it")):
        write_json(file, {name: "00000000"})
        write_json(copy / "manifest.json", {"weights/checksums.json": file.stat().st_size})
        assert main(["export", "--input", str(copy), "--output", str(tmp_path / "out")]) == 2
        assert why in capsys.readouterr().err


def test_a_bit_of_kept_statistics(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sorted((root / "statistics").glob("00001.*.safetensors"))[0]
    whole = file.read_bytes()
    flip(file, 0.99)
    assert main(prune(root, "second")) == 2
    assert "has changed since it was written" in capsys.readouterr().err
    assert not list(root.glob("second*"))
    file.write_bytes(whole)
    assert main(prune(root, "second")) == 0
    assert checksum(root / "second/decision/units.safetensors") == checksum(root / "first/decision/units.safetensors")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_bit_of_preprocessed_text(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    """Which leaves an id of the vocabulary, or an index that could be one."""
    text, out = tmp_path / "text", tmp_path / "out"
    flags = ["--input", str(root / "words.jsonl"), "--tokenizer", str(root / "hf"), "--workers", "1"]
    assert main(["preprocess", *flags, "--output", str(text)]) == 0
    file = text.with_suffix(suffix)
    whole = file.read_bytes()
    flip(file)
    sizes = [
        "--seq-length",
        "16",
        "--global-batch-size",
        "1",
        "--train-iters",
        "1",
        "--data-cache",
        str(tmp_path / "c"),
    ]
    train = ["train", "--input", str(root / "model"), "--data", str(text), *sizes, "--output", str(out)]
    assert main(train) == 2
    said = capsys.readouterr().err
    assert "has changed since `preprocess` wrote it" in said or "damaged" in said
    assert not list(tmp_path.glob("out*"))
    file.write_bytes(whole)
    assert main(train) == 0


def test_tensors_with_their_checksum(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2], dtype=torch.int32), "c": torch.ones(3)[:0]}
    write_tensors(tensors, tmp_path / "new")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_tensors(tmp_path / "new").items())
    content = (tmp_path / "new").read_bytes()
    for place in range(0, len(content)):
        (tmp_path / "new").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            read = read_tensors(tmp_path / "new")
        except Damaged:
            continue
        assert {n: t.tolist() for n, t in read.items()} == {n: t.tolist() for n, t in tensors.items()}, place
    save_file({"a": torch.ones(2)}, tmp_path / "old")
    assert read_tensors(tmp_path / "old")["a"].tolist() == [1, 1]
    with pytest.raises(Damaged):
        read_tensors(tmp_path / "none")


def test_halves_that_were_read_side_by_side_are_not_copied() -> None:
    def copied(halves: list[Tensor]) -> Tensor:
        return torch.cat(halves)

    whole = torch.arange(24.0).view(4, 3, 2)
    halves = list(whole.chunk(2))
    together = _merged(copied, halves)
    assert together.data_ptr() == whole.data_ptr() and torch.equal(together, whole)
    apart = [halves[1], halves[0]]
    assert torch.equal(_merged(copied, apart), torch.cat(apart))
    assert torch.equal(_merged(copied, [halves[0], halves[1].clone()]), whole)
