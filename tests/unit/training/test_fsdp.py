"""`train --engine fsdp` in one process: the other engine's curve, zeros, checkpoints, going on, one-line mistakes."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter

from megatron_prune.__main__ import main
from megatron_prune.fsdp.checkpoint import FsdpSave, load_fsdp
from megatron_prune.fsdp.model import ShardedModel, ShardedZeros
from megatron_prune.fsdp.trainer import FsdpTrainer
from megatron_prune.model.convert import HFReader
from megatron_prune.model.description import read_description
from megatron_prune.training.loop import StepResult
from tests.models import TINY_SIZES, byte_tokenizer, edit_config, tiny_blocks, tiny_llama, tiny_model, words
from tests.runs import curve, reopened

STEPS, SAVED = 10, 5
TAUGHT = "--teacher ROOT/teacher --lm-weight 0.5 --hidden-weight 1 --distillation-temperature 2 --save-interval 1"
KINDS = {"plain": "hf", "bf16": "bf16"}
"""Runs and what they began with."""
ZEROS = 9216
PADDING = 68
"""Byte tokenizer's "e": a padding token that texts have (SmolLM2's is its end of text), and that learns like others."""


def train(root: Path, engine: str, source: str, output: str, *more: str) -> list[str]:
    """A training command of STEPS steps on a few words, two micro-batches each."""
    places = ["--input", str(root / source), "--output", str(root / output), "--data", str(root / "words.jsonl")]
    sizes = f"--seq-length 16 --global-batch-size 4 --micro-batch-size 2 --train-iters {STEPS} --lr 1e-3".split()
    saves = f"--save-interval {SAVED} --keep-checkpoints 20 --eval-windows 3 --eval-interval {SAVED}".split()
    tested = ["--eval-data", str(root / "words.jsonl")]
    return ["train", "--engine", engine, *places, *sizes, *saves, *tested, *more]


def prune(path: Path) -> Path:
    """Make every second input of the prunable weights of a Hugging Face directory -0.0."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj" in name:
            tensor[:, ::2] = -0.0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned models in both types, a teacher, and runs of both engines."""
    root = tmp_path_factory.mktemp("fsdp")
    words(root / "words.jsonl")
    byte_tokenizer(prune(tiny_llama(root / "hf", vocab_size=257, pad_token_id=PADDING)))
    byte_tokenizer(prune(tiny_llama(root / "bf16", vocab_size=257, dtype=torch.bfloat16, tie_word_embeddings=True)))
    byte_tokenizer(tiny_llama(root / "teacher", vocab_size=257, num_hidden_layers=4, seed=1))
    for engine in ("megatron", "fsdp"):
        assert main(train(root, engine, "hf", f"{engine}_plain")) == 0
        assert main(train(root, engine, "hf", f"{engine}_taught", *TAUGHT.replace("ROOT", str(root)).split())) == 0
    assert main(train(root, "fsdp", "bf16", "fsdp_bf16", "--async-save")) == 0
    return root


@pytest.mark.parametrize("kind", ["plain", "taught"])
def test_the_curve_is_that_of_the_megatron_engine(root: Path, kind: str) -> None:
    expected, found = root / f"megatron_{kind}", root / f"fsdp_{kind}"
    taught = ["distillation_loss", "hidden_loss"] if kind == "taught" else []
    for key in ["loss", "grad_norm", "lm_loss", *taught]:
        assert len(curve(found, key)) == STEPS
        assert curve(found, key) == pytest.approx(curve(expected, key), abs=1e-5), key
    assert curve(found, "learning_rate") == curve(expected, "learning_rate")
    first, _, last = curve(found, "eval_loss")
    assert curve(found, "eval_loss") == pytest.approx(curve(expected, "eval_loss"), abs=1e-5)
    assert last < first - 0.1
    assert curve(found, "zeros") == curve(expected, "zeros") == [ZEROS] * (2 if kind == "plain" else STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_comes_out_whose_zeros_are_true(root: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, weights = root / KINDS[kind], root / f"fsdp_{kind}" / "weights"
    before, after = (load_file(path / "model.safetensors") for path in (source, weights))
    assert after.keys() == before.keys()
    for name, weight in after.items():
        assert weight.dtype == before[name].dtype and not torch.equal(weight, before[name]), name
        if "proj" in name:
            zero = before[name] == 0
            assert torch.equal(weight == 0, zero) and not torch.signbit(weight[zero]).any(), name
    model = AutoModelForCausalLM.from_pretrained(weights)
    assert len(AutoTokenizer.from_pretrained(weights)) == model.config.vocab_size
    assert json.loads((weights / "config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_that_pruned_a_directory_is_recovered(tmp_path: Path, family: str) -> None:
    """Its masks are applied, for the student and for a teacher; GPT-2 stores its weights the other way round."""
    words(tmp_path / "words.jsonl")
    hf = byte_tokenizer(tiny_model(tmp_path / "hf", family, vocab_size=257))
    pruning = ["--method", "magnitude", "--target", "2:4"]
    assert main(["prune", "--input", str(hf), "--output", str(tmp_path / "run"), *pruning]) == 0
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "sparse")]) == 0
    assert main(["export", "--input", str(tmp_path / "sparse"), "--output", str(tmp_path / "sparse_hf")]) == 0
    short = ["--train-iters", "2", "--lm-weight", "1"]
    for source in ("run", "sparse_hf"):
        assert main(train(tmp_path, "fsdp", source, f"of_{source}", *short, "--teacher", str(tmp_path / source))) == 0
    assert curve(tmp_path / "of_run") == curve(tmp_path / "of_sparse_hf")
    assert curve(tmp_path / "of_run", "zeros") == curve(tmp_path / "of_sparse_hf", "zeros")
    assert main(["verify", "--input", str(tmp_path / "of_run"), "--output", str(tmp_path / "verified.json")]) == 0
    assert json.loads((tmp_path / "verified.json").read_text())["pattern"]["target"] == "2:4"


def test_small_steps_add_up_in_bf16(root: Path) -> None:
    """A weight in [1/16, 1/8) is a multiple of 2^-11: without a float32 master no step of 1e-5 would move it."""
    small = "--lr 1e-5 --lr-decay-style constant --train-iters 40 --save-interval 40".split()
    assert main(train(root, "fsdp", "bf16", "small", *small)) == 0
    before, after = (load_file(path / "model.safetensors") for path in (root / "bf16", root / "small" / "weights"))
    fixed = {name: (weight.abs() >= 1 / 16) & (weight.abs() < 1 / 8) for name, weight in before.items()}
    assert sum(int((after[name] != weight)[fixed[name]].sum()) for name, weight in before.items()) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_identical(root: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In bf16 the checkpoint was written in the background: of the state then, not of that a step later."""
    run = reopened(root / f"fsdp_{kind}", root / f"{kind}_again", SAVED)
    assert main(train(root, "fsdp", KINDS[kind], f"{kind}_again", "--resume")) == 0
    assert f"resumed from {run / 'checkpoints'}/step_{SAVED:07d}" in capsys.readouterr().out
    for key in ("loss", "grad_norm", "learning_rate"):
        assert curve(run, key) == curve(root / f"fsdp_{kind}", key)
    found, expected = (path / "weights" / "model.safetensors" for path in (run, root / f"fsdp_{kind}"))
    assert found.read_bytes() == expected.read_bytes()


def test_a_signal_saves_and_the_run_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = FsdpTrainer.step

    def signalled(trainer: FsdpTrainer, number: int) -> StepResult:
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, number)

    with monkeypatch.context() as patched:
        patched.setattr(FsdpTrainer, "step", signalled)
        assert main(train(root, "fsdp", "hf", "stopped")) == 0
    assert "SIGTERM: saved after step 3 of 10; go on with --resume" in capsys.readouterr().out
    assert not (root / "stopped" / "weights").exists()
    assert main(train(root, "fsdp", "hf", "stopped", "--resume")) == 0
    assert curve(root / "stopped") == curve(root / "fsdp_plain")


def test_what_is_saved_in_the_background_is_the_state_of_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are held back until the tensor has changed."""
    changed = threading.Event()
    write_data = FileSystemWriter.write_data

    def later(writer: FileSystemWriter, *given: Any) -> Any:
        assert changed.wait(60)
        return write_data(writer, *given)

    monkeypatch.setattr(FileSystemWriter, "write_data", later)
    with backend.running(backend.Layout()):
        state = {"model": {"w": torch.ones(4)}, "step": 3}
        save = FsdpSave(tmp_path, state, in_background=True)
        assert save.busy()
        state["model"]["w"].zero_()
        changed.set()
        save.finish()
        assert load_fsdp(tmp_path, state)["step"] == 3
    assert torch.equal(state["model"]["w"], torch.ones(4))


def test_a_disk_that_is_full_is_told_and_leaves_no_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(writer: FileSystemWriter, *given: Any) -> Any:
        raise RuntimeError("unexpected pos") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    assert main(train(root, "fsdp", "hf", "full")) == 2
    assert "could not be written (process 0: [Errno 28] No space left" in capsys.readouterr().err
    assert not list((root / "full" / "checkpoints").glob("step_*"))


def test_recomputed_layers_change_nothing(root: Path) -> None:
    assert main(train(root, "fsdp", "hf", "recomputed", "--recompute")) == 0
    assert curve(root / "recomputed") == curve(root / "fsdp_plain")


def test_zeros_that_move_are_an_error(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ShardedZeros, "clear_gradients", lambda self: None)
    assert main(train(root, "fsdp", "hf", "broken")) == 2
    assert f"{ZEROS} weights that must stay zero are not +0.0 after step 5" in capsys.readouterr().err
    assert not (root / "broken" / "weights").exists()
    assert not list((root / "broken" / "checkpoints").glob("step_*")), "no checkpoint to resume from by mistake"


def test_zeros_may_be_given_up(root: Path) -> None:
    assert main(train(root, "fsdp", "hf", "dense_again", "--no-keep-zeros")) == 0
    after = load_file(root / "dense_again" / "weights" / "model.safetensors")
    assert all(int((weight == 0).sum()) == 0 for name, weight in after.items() if "proj" in name)


class _Evil:
    """What a pickle may be made to do."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_a_checkpoint_never_runs_code(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever can write the folder can write its checksums too."""
    from megatron_prune.files import checksum, write_json

    run = reopened(root / "fsdp_plain", root / "evil", SAVED)
    folder = run / "checkpoints" / f"step_{SAVED:07d}"
    (folder / ".metadata").write_bytes(pickle.dumps(_Evil(root / "made")))
    for name, value in (("checksums.json", checksum), ("manifest.json", lambda path: path.stat().st_size)):
        known = json.loads((folder / name).read_text())
        write_json(folder / name, {each: value(folder / each) for each in known})
    assert main(train(root, "fsdp", "hf", "evil", "--resume")) == 2
    assert "would run code" in capsys.readouterr().err
    assert not (root / "made").exists()


@pytest.mark.parametrize("engine", ["fsdp", "megatron"])
def test_an_engine_does_not_go_on_with_the_other_ones_run(
    root: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "megatron" if engine == "fsdp" else "fsdp"
    reopened(root / f"{other}_plain", root / f"of_{other}", SAVED)
    assert main(train(root, engine, "hf", f"of_{other}", "--resume")) == 2
    assert f"has engine {other} and {engine} was given" in capsys.readouterr().err


def test_what_was_trained_goes_on(root: Path) -> None:
    """As a teacher and a start, in other verbs, and as a Megatron checkpoint."""
    more = ["--teacher", str(root / "fsdp_taught"), "--train-iters", "1"]
    assert main(train(root, "fsdp", "fsdp_plain", "twice", *more)) == 0
    assert main(["verify", "--input", str(root / "fsdp_plain"), "--target", "2:4"]) == 0
    assert main(["inspect", "--input", str(root / "fsdp_plain")]) == 0
    assert main(["trim", "--input", str(root / "fsdp_plain"), "--output", str(root / "released")]) == 0
    assert read_description(root / "released").config.dtype == "float32"
    same = ["--against", str(root / "fsdp_plain" / "weights")]
    assert main(["verify", "--input", str(root / "released"), *same]) == 0


@pytest.mark.parametrize("family", TINY_SIZES)
def test_every_family(tmp_path: Path, family: str) -> None:
    """Logits are those of transformers, weights come out as they went in."""
    from transformers import AutoModelForCausalLM

    reader = HFReader(tiny_model(tmp_path / family, family))
    tokens = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    with backend.running(backend.Layout()), torch.no_grad():
        model = ShardedModel(reader)
        found, weights = model.logits(tokens), dict(model.weights())
    assert torch.equal(found, AutoModelForCausalLM.from_pretrained(reader.directory)(tokens).logits)
    assert all(torch.equal(weight, reader.read(name)) for name, weight in weights.items())
    assert list(weights) and set(weights) == set(reader.names())


MISTAKES = {
    "layout": (["--tensor-model-parallel-size", "2"], "--tensor-model-parallel-size given; FSDP shards all"),
    "experts": (["--expert-tensor-parallel-size", "2"], "--expert-tensor-parallel-size given; FSDP shards all"),
    "overlap": (["--overlap-grad-reduce"], "--overlap-grad-reduce given"),
    "optimizer": (["--use-distributed-optimizer"], "--use-distributed-optimizer given"),
    "balance": (["--moe-aux-loss-coeff", "0.1"], "no loss that spreads tokens over experts"),
    "adapters": (["--lora-rank", "4"], "--lora-rank given"),
    "checkpoint": (["--input", "ROOT/model"], "has no weights as a Hugging Face directory"),
    "teacher": (["--teacher", "ROOT/model"], "has no weights as a Hugging Face directory"),
    "blocks": (["--input", "ROOT/blocks"], "layers differ"),
    "float16": (["--input", "ROOT/half"], "float16 are not supported"),
    "engine": (["--engine", "ddp"], "allowed: megatron or fsdp"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    more, message = MISTAKES[name]
    if not (root / "model").exists():
        assert main(["import", "--input", str(root / "hf"), "--output", str(root / "model")]) == 0
        tiny_blocks(root / "blocks")
        byte_tokenizer(tiny_llama(root / "half", vocab_size=257, dtype=torch.float16))
    capsys.readouterr()
    assert main([*train(root, "fsdp", "hf", "x"), *[word.replace("ROOT", str(root)) for word in more]]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not (root / "x").exists()


def test_a_damaged_model_leaves_nothing_behind(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "hf", root / "bad")
    edit_config(root / "bad", hidden_size=48)
    assert main(train(root, "fsdp", "bad", "x")) == 2
    assert "config.json asks for" in capsys.readouterr().err
    assert not (root / "x").exists()
