"""`train --engine fsdp` on two processes: one curve with one process and with the other engine; killed, it goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_prune.__main__ import main
from tests.distributed.launch import launch, must_pass
from tests.distributed.test_resume import signal_rank, start_on_two
from tests.models import byte_tokenizer, tiny_llama, tiny_model, words
from tests.runs import curve, reopened

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS, SAVED, LONG_STEPS = 10, 5, 60
LONG = ["--train-iters", str(LONG_STEPS), "--save-interval", "10", "--global-batch-size", "2"]
KINDS = {
    "plain": "--lr 1e-3",
    "experts": "--lr 1e-3",
    "taught": "--lr 4e-4 --teacher ROOT/teacher --lm-weight 0.5 --hidden-weight 1 --hidden-loss mse",
}


def train(root: Path, engine: str, kind: str, name: str, *more: str) -> list[str]:
    """Ten steps of four windows, one at a time; three held-out windows, which two processes do not share evenly."""
    model = "experts" if kind == "experts" else "hf"
    places = ["--input", str(root / model), "--output", str(root / name), "--data", str(root / "words.jsonl")]
    sizes = f"--seq-length 32 --global-batch-size 4 --train-iters {STEPS} --save-interval {SAVED}".split()
    tested = ["--eval-data", str(root / "words.jsonl"), "--eval-windows", "3", "--keep-checkpoints", "20"]
    return [
        "train",
        "--engine",
        engine,
        *places,
        *sizes,
        *tested,
        *KINDS[kind].replace("ROOT", str(root)).split(),
        *more,
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything run: in one process with both engines, then in two, some of it from the other's checkpoints."""
    root = tmp_path_factory.mktemp("fsdp_ranks")
    words(root / "words.jsonl")
    sizes = dict(vocab_size=257, hidden_size=64, intermediate_size=128)
    hf = byte_tokenizer(tiny_llama(root / "hf", tie_word_embeddings=True, **sizes))
    byte_tokenizer(tiny_llama(root / "teacher", vocab_size=257, hidden_size=64, num_hidden_layers=4, seed=1))
    mixture = tiny_model(
        root / "experts", "qwen3_moe", vocab_size=257, num_experts=5
    )  # three and two, on two processes
    make_sparse(byte_tokenizer(mixture))
    make_sparse(hf)
    for kind in KINDS:
        for engine in ("megatron", "fsdp"):
            assert main(train(root, engine, kind, f"{engine}_{kind}")) == 0
    assert main(train(root, "fsdp", "plain", "other_data", "--seed", "1")) == 0
    reopened(root / "fsdp_plain", root / "one_to_two", SAVED)
    commands = [train(root, "fsdp", kind, f"two_{kind}") for kind in KINDS]
    commands += [train(root, "fsdp", "plain", "one_to_two", "--resume"), train(root, "fsdp", "plain", "whole", *LONG)]
    commands += [train(root, "fsdp", "plain", "halves", "--time-limit", "1e-9")]
    commands += [train(root, "fsdp", "plain", "halves", "--resume")]
    must_pass(launch(2, commands, root / "commands"))
    reopened(root / "two_plain", root / "two_to_one", SAVED)
    assert main(train(root, "fsdp", "plain", "two_to_one", "--resume")) == 0
    return root


def make_sparse(path: Path) -> None:
    """Zero every second input of the prunable weights."""
    from safetensors.torch import save_file

    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj" in name:
            tensor[:, ::2] = 0.0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("engine", ["megatron", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_follow_one(root: Path, kind: str, engine: str) -> None:
    """Of either engine, with two windows accumulated on each instead of four."""
    keys = ["loss", "lm_loss", "eval_loss"] + ["distillation_loss", "hidden_loss"] * (kind == "taught")
    for key, tolerance in [*((key, 1e-5) for key in keys), ("grad_norm", 1e-4)]:
        expected = curve(root / f"{engine}_{kind}", key)
        assert len(expected) == (2 if key == "eval_loss" else STEPS)
        assert curve(root / f"two_{kind}", key) == pytest.approx(expected, abs=tolerance), key
    assert curve(root / f"two_{kind}", "zeros") == curve(root / f"{engine}_{kind}", "zeros")


def test_other_data_would_show(root: Path) -> None:
    pairs = zip(curve(root / "other_data"), curve(root / "two_plain"), strict=True)
    assert min(abs(a - b) for a, b in pairs) > 1e-3


@pytest.mark.parametrize("name", ["one_to_two", "two_to_one"])
def test_a_run_goes_on_with_another_number_of_processes(root: Path, name: str) -> None:
    assert len(list((root / name).glob("config.resumed.*.yaml"))) == 1
    assert curve(root / name) == pytest.approx(curve(root / "fsdp_plain"), abs=1e-5)


def test_the_weights_are_those_of_one_process(root: Path) -> None:
    """Gathered from shards of which the last are shorter: the vocabulary has 257 rows."""
    one, two = (load_file(root / name / "weights" / "model.safetensors") for name in ("fsdp_plain", "two_plain"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.allclose(two[name], weight, atol=1e-4), name
        assert torch.equal(two[name] == 0, weight == 0) and not torch.signbit(two[name][two[name] == 0]).any()


def test_a_run_that_time_ended_goes_on_bit_for_bit(root: Path) -> None:
    assert (root / "halves" / "checkpoints" / "step_0000001").exists()
    for key in ("loss", "grad_norm", "eval_loss"):
        assert curve(root / "halves", key) == curve(root / "two_plain", key)


def test_a_killed_process_is_started_again(root: Path) -> None:
    """SIGKILL; torchrun starts both again, and the run ends with the curve and the bytes of one left alone."""
    torchrun = start_on_two(train(root, "fsdp", "plain", "killed", *LONG, "--async-save"), "--max-restarts", "1")
    signal_rank(torchrun, 1, signal.SIGKILL, root / "killed")
    output = torchrun.communicate(timeout=300)[0]
    assert torchrun.returncode == 0, output[-4000:]
    assert "exitcode: -9" in output and "resumed from" in output
    assert len(curve(root / "killed")) == LONG_STEPS
    for key in ("loss", "grad_norm", "zeros"):
        assert curve(root / "killed", key) == curve(root / "whole", key)
    killed, whole = (root / name / "weights" / "model.safetensors" for name in ("killed", "whole"))
    assert killed.read_bytes() == whole.read_bytes()
