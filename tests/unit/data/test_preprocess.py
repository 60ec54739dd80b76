"""`preprocess` writes what megatron-core's builder writes when it is fed serially, whatever happens on the way."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import megatron_prune.backend  # noqa: F401  # isort: skip  (before megatron.core)
import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_prune.__main__ import main
from megatron_prune.config import PreprocessConfig
from megatron_prune.data import pieces, preprocess
from megatron_prune.data.encoder import load_encoder
from megatron_prune.data.text import TEXT, read_documents
from megatron_prune.data.tokenizer import load_tokenizer, tokenize
from megatron_prune.errors import UserError
from megatron_prune.verbs.preprocess import run
from tests.models import byte_tokenizer, words

END = 256
OUTPUTS = (".bin", ".idx", ".json")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts and batches of little text."""
    monkeypatch.setattr(preprocess, "PART_BYTES", 6000)
    monkeypatch.setattr(preprocess, "BATCH_DOCUMENTS", 3)


def config(root: Path, inputs: Sequence[Path | str], tokenizer: Path, **more: Any) -> PreprocessConfig:
    names = tuple(str(name) for name in inputs)
    return PreprocessConfig(**{"input": names, "output": root / "out", "tokenizer": tokenizer, "workers": 2} | more)


def outputs(prefix: Path) -> list[bytes]:
    """Contents of the output's files."""
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in OUTPUTS]


def serial(prefix: Path, documents: Sequence[Sequence[int]], vocab_size: int) -> list[bytes]:
    """What megatron-core's builder writes of the documents one after the other: bytes of .bin and .idx."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def mixed_input(root: Path) -> list[Path]:
    """Text of every kind, several parts of it, with blank lines and an empty document."""
    large = words(root / "large.jsonl", 40, seed=1)
    large.write_text(large.read_text().replace("\n", "\n\n", 3))
    (root / "packed.json.gz").write_bytes(gzip.compress(words(root / "some.jsonl", 20, seed=2).read_bytes()))
    (root / "unended.jsonl").write_text('{"text": "ends without a line end é"}\n{"text": ""}\n{"text": "last"}')
    (root / "whole.txt").write_text("one document\r\nof two lines\n")
    (root / "nothing.jsonl").write_text("")
    return [root / name for name in ("large.jsonl", "packed.json.gz", "unended.jsonl", "nothing.jsonl", "whole.txt")]


@pytest.mark.parametrize(("workers", "append_eod"), [(1, False), (3, True)])
def test_bytes_of_the_serial_builder(tmp_path: Path, tokenizer: Path, workers: int, append_eod: bool) -> None:
    files = mixed_input(tmp_path)
    preprocess.preprocess(config(tmp_path, files, tokenizer, workers=workers, append_eod=append_eod))
    ids = tokenize(load_tokenizer(tokenizer), [text for text in read_documents(files) if text])
    expected = [[*document, END] if append_eod else document for document in ids]
    assert outputs(tmp_path / "out")[:2] == serial(tmp_path / "serial", expected, 257)
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["documents"], report["empty_documents"], report["bad_lines"]) == (63, 1, 0)
    assert report["tokens"] == sum(map(len, expected)) and report["vocab_size"] == 257
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.json"]
    data = IndexedDataset(str(tmp_path / "out"))
    assert len(data) == 63 and data.index.dtype == np.uint16
    assert np.array(data[62]).tolist() == expected[62]


def test_every_place_to_cut_gives_the_same_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    texts = ["a", "bb", "", "ccccc", "d" * 30]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for limit in range(1, file.stat().st_size + 2):
        cut = pieces.cut(str(file), limit)
        found = [text for piece in cut for _, text in pieces.read(piece, TEXT, lambda _: None)]
        assert found == texts, limit
        consumed: list[int] = []
        for piece in cut:
            list(pieces.read(piece, TEXT, consumed.append))
        assert sum(consumed) == file.stat().st_size


def test_the_type_of_the_ids_is_megatrons(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    for size, dtype in ((65499, np.uint16), (65500, np.int32), (70000, np.int32)):
        backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / str(size))
        (tmp_path / "a.txt").write_text(f"w1 w{size - 1}")
        output = tmp_path / f"out{size}"
        preprocess.preprocess(config(tmp_path, [tmp_path / "a.txt"], tmp_path / str(size), output=output))
        data = IndexedDataset(str(output))
        assert data.index.dtype == dtype and np.array(data[0]).tolist() == [1, size - 1]


# --- kill -9 ---


def in_child(function: Callable[[], None]) -> multiprocessing.Process:
    """Start `function` in a process of its own, without importing everything again."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


def finished_parts(root: Path) -> set[Path]:
    return {path for path in (root / "out.partial" / "parts").glob("*") if path.name.isdigit()}


def test_killed_at_random_moments_and_resumed(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [words(tmp_path / f"{number}.jsonl", 60, seed=number) for number in range(3)]
    whole = config(tmp_path, files, tokenizer, output=tmp_path / "whole", append_eod=True)
    preprocess.preprocess(whole)
    total = len(pieces.gather([p for file in files for p in pieces.cut(str(file), 6000)], 6000))
    make = preprocess._make_part

    def slowly(*arguments: Any) -> None:
        make(*arguments)
        time.sleep(0.01)

    monkeypatch.setattr(preprocess, "_make_part", slowly)
    moments = random.Random(3)
    kept: dict[Path, int] = {}
    kills = 0
    while kills < 100:
        process = in_child(lambda: preprocess.preprocess(config(tmp_path, files, tokenizer, append_eod=True)))
        enough = len(finished_parts(tmp_path)) + moments.randrange(4)
        while process.is_alive() and len(finished_parts(tmp_path)) < enough:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.02)
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        kept |= {part: part.stat().st_mtime_ns for part in finished_parts(tmp_path) - set(kept)}
        assert all(part.stat().st_mtime_ns == made for part, made in kept.items()), "a finished part was made again"
    assert process.exitcode == 0 and kills >= 5 and len(kept) >= total // 2
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("moment", ["joining", "named_bin", "named_all", "removing"])
def test_killed_while_the_output_appears(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    file = words(tmp_path / "a.jsonl", 60)
    preprocess.preprocess(config(tmp_path, [file], tokenizer, output=tmp_path / "whole"))

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_in_the_middle() -> None:
        give_name = preprocess.give_name

        def name_one(source: Path, target: Path) -> None:
            give_name(source, target)
            if target.name == "out.bin":
                die()

        def is_parts(path: Any) -> bool:
            return Path(path).name == "parts"

        if moment == "joining":
            monkeypatch.setattr(preprocess._Index, "_sequence_pointers", die)
        elif moment == "named_bin":
            monkeypatch.setattr(preprocess, "give_name", name_one)
        elif moment == "named_all":
            monkeypatch.setattr(preprocess.shutil, "rmtree", lambda path, **_: die() if is_parts(path) else None)
        else:
            remove = preprocess.shutil.rmtree
            monkeypatch.setattr(
                preprocess.shutil,
                "rmtree",
                lambda path, **_: (remove(path), die()) if is_parts(path) else None,
            )
        preprocess.preprocess(config(tmp_path, [file], tokenizer))

    process = in_child(kill_in_the_middle)
    process.join()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "out.partial").exists()
    if moment in ("joining", "named_bin"):
        assert not (tmp_path / "out.idx").exists()
    preprocess.preprocess(config(tmp_path, [file], tokenizer))
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_killed_worker_ends_the_run_and_nothing_is_lost(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = words(tmp_path / "a.jsonl", 60)
    preprocess.preprocess(config(tmp_path, [file], tokenizer, output=tmp_path / "whole"))
    make = preprocess._make_part

    def die_in_the_third(job: Any, number: int, count: Any) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        make(job, number, count)

    with monkeypatch.context() as patched:
        patched.setattr(preprocess, "_make_part", die_in_the_third)
        with pytest.raises(UserError, match="ended by SIGKILL"):
            preprocess.preprocess(config(tmp_path, [file], tokenizer, workers=1))
    assert len(finished_parts(tmp_path)) == 2
    preprocess.preprocess(config(tmp_path, [file], tokenizer))
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_workers_die_with_their_parent(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = words(tmp_path / "a.jsonl", 60)

    def note_and_wait(job: Any, number: int, count: Any) -> None:
        (tmp_path / f"{os.getpid()}.worker").touch()
        time.sleep(600)

    monkeypatch.setattr(preprocess, "_make_part", note_and_wait)
    process = in_child(lambda: preprocess.preprocess(config(tmp_path, [file], tokenizer)))
    while len(list(tmp_path.glob("*.worker"))) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    workers = [int(path.stem) for path in tmp_path.glob("*.worker")]
    while any(_runs(worker) for worker in workers):
        time.sleep(0.01)


def _runs(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


# --- what is in the text ---


def test_bad_lines_are_counted_with_their_places(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = words(tmp_path / "a.jsonl", 30)
    lines = file.read_bytes().splitlines(keepends=True)
    bad = {
        2: b"{oops}\n",
        3: b'{"text": 7}\n',
        9: b'"no object"\n',
        14: b'{"text": "\xff"}\n',
        25: b'{"text": "half a pair \\ud800"}\n',
        26: b"[" * 100_000 + b"\n",
        27: b'{"n": ' + b"9" * 5000 + b"}\n",
    }
    file.write_bytes(b"".join(bad.get(number, line) for number, line in enumerate(lines, start=1)))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_bytes(b"good")
    run(config(tmp_path, [file, tmp_path / "b.txt", tmp_path / "c.txt"], tokenizer))
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["documents"] == 24 and report["bad_lines"] == 8
    places = [line.split(": ")[0] for line in report["listed_bad_lines"]]
    assert places == [*(f"{file}:{number}" for number in bad), f"{tmp_path / 'b.txt'}:1"]
    told = capsys.readouterr().out
    assert "8 bad lines left out" in told and f"{file}:2: not JSON" in told
    good = [json.loads(line)["text"] for number, line in enumerate(lines, start=1) if number not in bad] + ["good"]
    ids = tokenize(load_tokenizer(tokenizer), good)
    assert outputs(tmp_path / "out")[:2] == serial(tmp_path / "serial", ids, 257)


def test_strict_stops_at_a_bad_line_and_goes_on_once_allowed(tmp_path: Path, tokenizer: Path) -> None:
    file = words(tmp_path / "a.jsonl", 30)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:20], b"oops\n", *lines[20:]]))
    with pytest.raises(UserError, match="a.jsonl:21: not JSON"):
        preprocess.preprocess(config(tmp_path, [file], tokenizer, strict=True))
    assert not list(tmp_path.glob("*out*")), "a refusal is no kill"
    preprocess.preprocess(config(tmp_path, [file], tokenizer))
    assert json.loads((tmp_path / "out.json").read_text())["documents"] == 30


def test_a_truncated_gzip_file_is_one_bad_line(tmp_path: Path, tokenizer: Path) -> None:
    texts = [f"document {number} {random.Random(number).random()}" for number in range(2000)]
    packed = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    (tmp_path / "a.json.gz").write_bytes(packed[: len(packed) // 2])
    good = words(tmp_path / "b.jsonl", 3)
    preprocess.preprocess(config(tmp_path, [tmp_path / "a.json.gz", good], tokenizer))
    report = json.loads((tmp_path / "out.json").read_text())
    (line,) = report["listed_bad_lines"]
    kept = report["documents"] - 3
    assert report["bad_lines"] == 1 and 100 < kept < 2000
    assert line.startswith(f"{tmp_path / 'a.json.gz'}:{kept + 1}: damaged gzip")
    ids = tokenize(load_tokenizer(tokenizer), texts[:kept] + read_documents([good]))
    assert outputs(tmp_path / "out")[:2] == serial(tmp_path / "serial", ids, 257)


# --- tokenizers ---


def test_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    file = words(tmp_path / "a.jsonl", 40)
    texts = read_documents([file])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40, minloglevel=2
    )
    model = tmp_path / "tokenizer.model"
    preprocess.preprocess(config(tmp_path, [file], model, append_eod=True))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = [[*processor.encode(text), processor.eos_id()] for text in texts]
    assert outputs(tmp_path / "out")[:2] == serial(tmp_path / "serial", expected, 40)


def test_special_tokens_are_the_tokenizers_own(tmp_path: Path) -> None:
    """A tokenizer that begins and ends each text: no second end is added, and its truncation is not applied."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "tokenizer")
    encoder = load_encoder(tmp_path / "tokenizer")
    assert encoder.encode(["a a a a a", ""]) == [[1, 3, 3, 3, 3, 3, 2], [1, 2]]
    (tmp_path / "a.txt").write_text("a a a a a")
    preprocess.preprocess(config(tmp_path, [tmp_path / "a.txt"], tmp_path / "tokenizer", append_eod=True))
    assert np.fromfile(tmp_path / "out.bin", dtype=np.uint16).tolist() == [1, 3, 3, 3, 3, 3, 2]


# --- the hub ---


def test_a_data_set_is_streamed(tmp_path: Path, tokenizer: Path) -> None:
    """A folder stands for the hub: the library reads both alike."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    files = [words(folder / f"train-{number}.jsonl", 5, seed=number) for number in range(3)]
    lines = files[1].read_text().splitlines()
    files[1].write_text("\n".join([*lines[:2], '{"text": null}', *lines[2:]]))
    preprocess.preprocess(config(tmp_path, [f"hub:{folder}"], tokenizer))
    texts = [text for file in (files[0], files[2]) for text in read_documents([file])]
    texts[5:5] = [json.loads(line)["text"] for line in lines]
    ids = tokenize(load_tokenizer(tokenizer), texts)
    assert outputs(tmp_path / "out")[:2] == serial(tmp_path / "serial", ids, 257)
    report = json.loads((tmp_path / "out.json").read_text())
    (bad,) = report["listed_bad_lines"]
    assert bad.startswith(f"hub:{folder}[1]:3: no text under the key 'text'")


def test_no_network_is_one_line(tmp_path: Path, tokenizer: Path) -> None:
    command = ["preprocess", "--input", "hub:nobody/nothing", "--output", tmp_path / "out", "--tokenizer", tokenizer]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_prune", *map(str, command)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert "'hub:nobody/nothing' cannot be streamed" in done.stderr and len(done.stderr.splitlines()) == 1


# --- mistakes ---


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that the program says about a command that it refuses with status 2."""
    capsys.readouterr()
    assert main(["preprocess", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_mistakes_are_one_line(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = words(tmp_path / "a.jsonl", 3)
    (tmp_path / "bad.model").write_bytes(b"no model")
    (tmp_path / "a.arrow").touch()
    (tmp_path / "empty.jsonl").touch()
    there, output, tok = ("--input", file), ("--output", tmp_path / "x"), ("--tokenizer", tokenizer)
    assert "missing: --tokenizer" in refused(capsys, *there, *output)
    assert "no such file" in refused(capsys, "--input", tmp_path / "nothing.jsonl", *output, *tok)
    assert "unknown kind of text" in refused(capsys, "--input", tmp_path / "a.arrow", *output, *tok)
    assert "no tokenizer found" in refused(capsys, *there, *output, "--tokenizer", tmp_path)
    assert "not a SentencePiece model" in refused(capsys, *there, *output, "--tokenizer", tmp_path / "bad.model")
    assert "--workers: -1 given" in refused(capsys, *there, *output, *tok, "--workers", "-1")
    assert "check the files and --json-key" in refused(capsys, *there, *output, *tok, "--json-key", "body")
    assert "no document found" in refused(capsys, "--input", tmp_path / "empty.jsonl", *output, *tok)
    assert "allowed: hub:NAME" in refused(capsys, "--input", "hub:a:b:c:d", *output, *tok)
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("suffix", OUTPUTS)
def test_an_existing_output_is_refused(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    file = words(tmp_path / "a.jsonl", 3)
    (tmp_path / f"out{suffix}").write_text("precious")
    command = ["--input", file, "--output", tmp_path / "out", "--tokenizer", tokenizer]
    assert "already exists" in refused(capsys, *command)
    assert (tmp_path / f"out{suffix}").read_text() == "precious" and len(list(tmp_path.glob("out*"))) == 1


def test_an_unfinished_run_of_something_else_is_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = words(tmp_path / "a.jsonl", 30)
    with monkeypatch.context() as patched:
        patched.setattr(preprocess, "_join", lambda job: os._exit(9))
        in_child(lambda: preprocess.preprocess(config(tmp_path, [file], tokenizer))).join()
    assert finished_parts(tmp_path)
    with pytest.raises(UserError, match="other append_eod; give what that run was given"):
        preprocess.preprocess(config(tmp_path, [file], tokenizer, append_eod=True))
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(UserError, match="other input and parts"):
        preprocess.preprocess(config(tmp_path, [file], tokenizer))
    assert finished_parts(tmp_path), "what a killed run has done is not a refused one's to remove"


def test_no_end_of_text_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "tokenizer")
    file = words(tmp_path / "a.jsonl", 3)
    command = ["--input", file, "--output", tmp_path / "x", "--tokenizer", tmp_path / "tokenizer", "--append-eod"]
    assert "no end-of-text token" in refused(capsys, *command)
