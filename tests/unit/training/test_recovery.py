"""The `train` verb in one process: weights move, zeros stay, adapters merge, runs go on, mistakes are one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.model.checkpoint import load_model
from megatron_prune.model.description import read_description
from megatron_prune.model.forward import logits
from megatron_prune.training.lora import Adapters, add_adapters, merge_adapters
from megatron_prune.training.zeros import Zeros
from tests.models import byte_tokenizer, tiny_llama, words
from tests.runs import curve, reopened, saved_tensors, set_state

STEPS, SAVED = 6, 2
LORA = ("--lora-rank", "4", "--lora-dropout", "0.1", "--lr", "1e-2")
RUNS = {"plain": (), "bf16": (), "lora": LORA, "bf16_lora": LORA}


def train(root: Path, source: str, output: str, *more: str) -> list[str]:
    """A training command of STEPS steps on a few words."""
    places = ["--input", str(root / source), "--output", str(root / output), "--data", str(root / "words.jsonl")]
    sizes = ["--seq-length", "16", "--global-batch-size", "2", "--train-iters", str(STEPS), "--lr", "1e-3"]
    return ["train", *places, *sizes, "--save-interval", str(SAVED), "--keep-checkpoints", "9", *more]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its 2:4 prunings in both types, a teacher, and one run of each kind."""
    root = tmp_path_factory.mktemp("recovery")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    byte_tokenizer(tiny_llama(root / "teacher", vocab_size=257, num_hidden_layers=4, seed=1))
    byte_tokenizer(tiny_llama(root / "wide", vocab_size=257, hidden_size=64, seed=1))
    pairs = {"float32": "pruned", "bfloat16": "bf16_pruned"}
    for dtype, name in pairs.items():
        inputs = ["--input", str(root / "hf"), "--output", str(root / f"model_{dtype}"), "--dtype", dtype]
        assert main(["import", *inputs]) == 0
        inputs = ["--input", str(root / f"model_{dtype}"), "--output", str(root / name)]
        assert main(["prune", *inputs, "--method", "magnitude", "--target", "2:4"]) == 0
    for name, more in RUNS.items():
        assert main(train(root, "bf16_pruned" if "bf16" in name else "pruned", name, *more)) == 0
    return root


def weights(path: Path) -> dict[str, Tensor]:
    """Hugging Face name -> tensor of a checkpoint."""
    with backend.running(backend.Layout()):
        return {name: tensor.clone() for name, tensor in load_model(path, backend.Layout()).hf_weights()}


@pytest.mark.parametrize("windows", [1, 2])
def test_a_frozen_output_layer_multiplies_all_tokens_at_once(root: Path, windows: int) -> None:
    """However a loss lays out the gradient `[b, s, vocab]` of its logits; token by token each product would have a copy
    of the weight. Of one window the turned gradient passes for contiguous, and is not taken for that by the product.
    """
    from megatron_prune.training.recovery import RecoveryLoss
    from megatron_prune.training.weighting import Weighting

    tokens = torch.randint(257, (windows, 33), generator=torch.Generator().manual_seed(0))
    with backend.running(backend.Layout()):
        student, teacher = (load_model(root / "model_float32", backend.Layout()) for _ in range(2))
        (chunk,) = student.chunks
        chunk.output_layer.requires_grad_(False)
        objective = RecoveryLoss(student, Weighting(lm=1.0, distillation=1.0), teacher, 1)
        logits, _ = objective.forward(chunk, tokens)
        with torch.profiler.profile(record_shapes=True) as profiler:
            logits.backward(torch.randn(logits.shape))
    products = [event for event in profiler.events() if event.name in ("aten::mm", "aten::bmm")]
    with_vocabulary = [event for event in products if any(257 in shape for shape in event.input_shapes)]
    assert with_vocabulary and {event.name for event in with_vocabulary} == {"aten::mm"}


def pruned_weights(root: Path, name: str) -> dict[str, Tensor]:
    """The weights that a run of RUNS began with."""
    source = "bf16_pruned" if "bf16" in name else "pruned"
    trimmed = root / f"{source}_sparse"
    if not trimmed.exists():
        assert main(["trim", "--input", str(root / source), "--output", str(trimmed)]) == 0
    return weights(trimmed)


@pytest.mark.parametrize("name", RUNS)
def test_weights_move_and_zeros_stay(root: Path, name: str) -> None:
    """In masters and moments too, which the next step would be made from."""
    before, after = pruned_weights(root, name), weights(root / name / "weights")
    zeros = 0
    for key, weight in before.items():
        if ".layers." in key and "proj" in key:
            zero = weight == 0
            zeros += int(zero.sum())
            assert torch.equal(after[key] == 0, zero) and not torch.signbit(after[key][zero]).any(), key
        if "lora" not in name or "proj" in key:
            assert not torch.equal(after[key], weight), key
        else:
            assert torch.equal(after[key], weight), key
    assert curve(root / name, "zeros") == [zeros] * (STEPS // SAVED)


def test_masters_and_moments_of_zeros_are_zero(root: Path) -> None:
    state = saved_tensors(root / "bf16" / "checkpoints" / f"step_{STEPS:07d}")
    bf16 = state["decoder.layers.mlp.linear_fc2.weight"]
    assert bf16.dtype == torch.bfloat16 and int((bf16 == 0).sum()) == bf16.numel() // 2
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        values = state[f"optimizer.{kind}.decoder.layers.mlp.linear_fc2.weight"]
        assert values.dtype == torch.float32
        assert torch.equal(values != 0, bf16 != 0), kind


def test_small_steps_add_up_in_bf16(root: Path) -> None:
    """A weight in [1/16, 1/8) is a multiple of 2^-11: without a float32 master no step of 1e-5 would move it."""
    small = ["--lr", "1e-5", "--lr-decay-style", "constant", "--train-iters", "40", "--save-interval", "40"]
    assert main(train(root, "bf16_pruned", "small", *small)) == 0
    before, after = pruned_weights(root, "bf16"), weights(root / "small" / "weights")
    moved = 0
    for key, weight in before.items():
        fixed = (weight.abs() >= 1 / 16) & (weight.abs() < 1 / 8)
        assert weight.dtype == torch.bfloat16
        moved += int((after[key] != weight)[fixed].sum())
    assert moved > 100


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_bit_identical(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From the checkpoint in the middle, as if the run had died behind it."""
    run = reopened(root / name, root / f"{name}_again", SAVED)
    source = "bf16_pruned" if "bf16" in name else "pruned"
    assert main(train(root, source, f"{name}_again", *RUNS[name], "--resume")) == 0
    assert f"resumed from {run / 'checkpoints'}/step_{SAVED:07d}" in capsys.readouterr().out
    assert curve(run) == curve(root / name)
    expected = weights(root / name / "weights")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(run / "weights").items())


def test_zeros_that_move_are_an_error(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Zeros, "clear_gradients", lambda self: None)
    assert main(train(root, "pruned", "broken")) == 2
    assert "must stay zero are not +0.0 after step 2" in capsys.readouterr().err
    assert not (root / "broken" / "weights").exists()
    assert not list((root / "broken" / "checkpoints").glob("step_*")), "no checkpoint to resume from by mistake"


def test_zeros_may_be_given_up(root: Path) -> None:
    assert main(train(root, "pruned", "dense_again", "--no-keep-zeros")) == 0
    after = weights(root / "dense_again" / "weights")
    assert all(int((weight == 0).sum()) == 0 for key, weight in after.items() if "proj" in key)
    assert read_description(root / "dense_again" / "weights").source["target"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapted_forward_is_the_merged_forward(root: Path, dtype: torch.dtype) -> None:
    """Bit for bit; and the merged weight is W + alpha / rank * B A where W is not zero."""
    tokens = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    adapters = Adapters(rank=4, alpha=6.0, dropout=0.5, seed=0, keep_zeros=True)
    source = root / ("pruned_sparse" if dtype == torch.float32 else "bf16_pruned_sparse")
    pruned_weights(root, "plain" if dtype == torch.float32 else "bf16")
    with backend.running(backend.Layout()):
        model = load_model(source, backend.Layout())
        first = logits(model, tokens)
        chosen = add_adapters(model, adapters, ["linear_proj", "gate_proj", "up_proj"])
        assert [linear.name.split(".")[-2] for linear in chosen] == ["linear_proj", "linear_fc1"] * 2
        assert torch.equal(logits(model, tokens), first), "adapters begin without an effect"
        generator = torch.Generator().manual_seed(1)
        expected = []
        for linear in chosen:
            linear.module.lora_b.data.normal_(generator=generator)
            w, a, b = linear.module.weight, linear.module.lora_a, linear.module.lora_b
            expected.append(((w.float() + 1.5 * (b @ a)) * (w != 0)).to(dtype))
        adapted = logits(model, tokens)
        merge_adapters(chosen)
        assert torch.equal(logits(model, tokens), adapted) and not torch.equal(adapted, first)
        for linear, weight in zip(chosen, expected, strict=True):
            assert torch.equal(linear.module.weight, weight) and not hasattr(linear.module, "lora_a")


def test_what_was_trained_goes_on(root: Path) -> None:
    """Trimmed, exported, evaluated, verified and trained again; the pattern is still known."""
    places = ["--input", str(root / "plain"), "--output", str(root / "released")]
    assert main(["trim", *places]) == 0
    released = weights(root / "released")
    assert all(torch.equal(tensor, released[key]) for key, tensor in weights(root / "plain" / "weights").items())
    assert main(["verify", "--input", str(root / "plain" / "weights"), "--output", str(root / "verified.json")]) == 0
    assert json.loads((root / "verified.json").read_text())["pattern"]["target"] == "2:4"
    assert main(["verify", "--input", str(root / "plain")]) == 0
    assert main(["inspect", "--input", str(root / "plain")]) == 0
    assert main(["export", "--input", str(root / "plain" / "weights"), "--output", str(root / "exported")]) == 0
    (root / "text.txt").write_text("the mask keeps a weight of every row " * 20)
    text = ["--text", str(root / "text.txt"), "--window", "16", "--windows", "4"]
    assert main(["evaluate", "--input", str(root / "exported"), *text, "--output", str(root / "p.json")]) == 0
    assert main(train(root, "plain", "twice", "--train-iters", "1", "--teacher", str(root / "model_float32"))) == 0
    assert read_description(root / "twice" / "weights").source["target"] == "2:4"


def test_a_teacher_is_learned_from(root: Path) -> None:
    """Each loss is logged and has the weight that was given; what is held out gets better."""
    weighted = ["--lm-weight", "0.5", "--hidden-weight", "2", "--hidden-loss", "mse", "--eval-data"]
    more = [*weighted, str(root / "words.jsonl"), "--eval-windows", "2", "--teacher-dtype", "bfloat16"]
    assert main(train(root, "pruned", "taught", "--teacher", str(root / "teacher"), *more)) == 0
    run = root / "taught"
    parts = [curve(run, key) for key in ("lm_loss", "distillation_loss", "hidden_loss")]
    assert curve(run) == pytest.approx([0.5 * a + b + 2 * c for a, b, c in zip(*parts, strict=True)])
    before, after = curve(run, "eval_loss")
    assert after < before - 0.01


MISTAKES = {
    "no_text": (["--data"], "--data FILE.jsonl"),
    "distillation_without_teacher": (["--distillation-weight", "1"], "give --teacher MODEL"),
    "nothing_to_learn": (["--lm-weight", "0"], "all weights of losses are 0"),
    "missing_teacher": (
        ["--teacher", "ROOT/nowhere"],
        "nowhere does not exist; a Megatron checkpoint or",
    ),
    "interleaved_teacher": (
        ["--teacher", "ROOT/hf", "--virtual-pipeline-model-parallel-size", "2"],
        "leave one of them",
    ),
    "teacher_too_narrow": (["--teacher", "ROOT/wide", "--hidden-weight", "1"], "allowed: equal widths"),
    "recomputed_hidden": (["--teacher", "ROOT/hf", "--hidden-weight", "1", "--recompute"], "--recompute"),
    "temperature": (["--teacher", "ROOT/hf", "--distillation-temperature", "0"], "allowed: above 0"),
    "half_of_a_fused_linear": (["--lora-rank", "4", "--lora-targets", "q_proj"], "give all of them or none"),
    "unknown_target": (["--lora-rank", "4", "--lora-targets", "linear_fc3"], "allowed: down_proj"),
    "dropout": (["--lora-rank", "4", "--lora-dropout", "1"], "--lora-dropout: 1.0 given"),
    "hidden_loss": (["--hidden-loss", "l1"], "allowed: cosine or mse"),
}


def test_gradients_reach_a_frozen_output_layer_in_its_own_layout(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another layout torch copies the weight for every token."""
    from megatron.core.tensor_parallel.layers import LinearWithFrozenWeight

    backward, seen = LinearWithFrozenWeight.backward, []

    def watched(ctx: Any, gradient: Tensor) -> Any:
        seen.append((gradient.shape[-1], gradient.is_contiguous()))
        return backward(ctx, gradient)

    monkeypatch.setattr(LinearWithFrozenWeight, "backward", staticmethod(watched))
    words = ["--teacher", str(root / "teacher"), "--lora-rank", "2", "--micro-batch-size", "2"]
    assert main(train(root, "pruned", "straight", *words)) == 0
    vocabulary = max(width for width, _ in seen)
    assert {straight for width, straight in seen if width == vocabulary} == {True}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    more, message = MISTAKES[name]
    given = [word.replace("ROOT", str(root)) for word in more]
    command = train(root, "pruned", "x")
    if name == "no_text":
        del command[5:7]
        given = []
    capsys.readouterr()
    assert main([*command, *given]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not (root / "x").exists()


def test_another_vocabulary_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same size, with two tokens exchanged."""
    other = shutil.copytree(root / "hf", tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    a, b, *_ = vocabulary
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert main(train(root, "pruned", "x", "--teacher", str(other))) == 2
    assert "its vocabulary is not that of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lora-rank", "2"), "has lora_rank"),
        (("--no-keep-zeros",), "is a train 2:4 run"),
        ((), "is finished"),
    ],
)
def test_a_run_is_resumed_with_the_same_settings(
    root: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = root / "resumed"
    if not run.exists():
        shutil.copytree(root / "plain", run)
    set_state(run, "training" if more else "trained")
    assert main(train(root, "pruned", "resumed", *more, "--resume")) == 2
    assert message in capsys.readouterr().err


def test_an_unfinished_run_is_no_model(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(root / "plain", root / "unfinished")
    set_state(run, "training")
    assert main(["trim", "--input", str(run), "--output", str(root / "y")]) == 2
    assert "finish it with train --resume" in capsys.readouterr().err


def test_a_damaged_structured_run_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(root / "pruned", root / "structured")
    about = json.loads((run / "run.json").read_text())
    (run / "decision" / "trim.json").write_text(json.dumps({key: about[key] for key in ("method", "target")}))
    assert main(train(root, "structured", "x")) == 2
    assert "trim.json has format None; this version reads format 1" in capsys.readouterr().err


def test_a_trained_run_has_no_masks(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--input", str(root / "plain"), "--output", str(root / "x.npz")]
    assert main(["export", *places, "--format", "mask-npz"]) == 2
    assert "has trained weights and decided nothing" in capsys.readouterr().err
