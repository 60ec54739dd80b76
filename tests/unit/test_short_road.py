"""One command from a Hugging Face directory to a smaller one; verbs that take whatever `prune` and `train` wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.__main__ import main
from megatron_prune.decision.run_folder import read_run
from megatron_prune.jobs import released
from tests.distributed.launch import TIMEOUT_S, environment
from tests.models import byte_tokenizer, tiny_llama, words

WANDA = ["--method", "wanda", "--target", "2:4"]
STEPS = ["--seq-length", "16", "--global-batch-size", "1", "--train-iters", "1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, text, and what one command made of it: 2:4, and fewer parameters."""
    root = tmp_path_factory.mktemp("short")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    words(root / "words.jsonl")
    (root / "text.txt").write_text("the mask keeps a weight of every row " * 20)
    assert main(["prune", str(root / "hf"), str(root / "run"), *WANDA, "--export", str(root / "out"), *text(root)]) == 0
    smaller = [
        "--method",
        "minitron",
        "--target",
        "ffn_hidden_size=48",
        "--export",
        str(root / "small_hf"),
        *text(root),
    ]
    assert main(["prune", str(root / "hf"), str(root / "small"), *smaller]) == 0
    return root


def text(root: Path) -> list[str]:
    """Calibration text."""
    return ["--calibration", str(root / "words.jsonl"), "--calibration-samples", "2", "--calibration-seq-length", "16"]


def said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must succeed prints."""
    capsys.readouterr()
    assert main(argv) == 0, argv
    return capsys.readouterr().out


def test_one_command_gives_what_four_give(root: Path, tmp_path: Path) -> None:
    steps = [
        ["import", "--input", str(root / "hf"), "--output", str(tmp_path / "ck")],
        ["prune", "--input", str(tmp_path / "ck"), "--output", str(tmp_path / "run"), *WANDA, *text(root)],
        ["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "sparse")],
        ["export", "--input", str(tmp_path / "sparse"), "--output", str(tmp_path / "out")],
    ]
    for step in steps:
        assert main(step) == 0
    one, four = (load_file(folder / "out" / "model.safetensors") for folder in (root, tmp_path))
    assert one.keys() == four.keys() and all(torch.equal(one[name], four[name]) for name in one)
    config = json.loads((root / "small_hf" / "config.json").read_text())
    assert config["intermediate_size"] == 48
    assert main(["verify", str(root / "small_hf")]) == 0


def test_an_export_that_is_not_the_run_s_is_told(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Negative control of the verification in that command."""
    true = released.export

    def damaged(config: object) -> list[str]:
        lines = true(config)  # type: ignore[arg-type]
        file = tmp_path / "out" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.0.mlp.down_proj.weight"] += 1
        save_file(tensors, file, metadata={"format": "pt"})
        return lines

    monkeypatch.setattr(released, "export", damaged)
    command = ["prune", str(root / "hf"), str(tmp_path / "run"), *WANDA, "--export", str(tmp_path / "out"), *text(root)]
    assert main(command) == 2
    assert "is not what" in capsys.readouterr().err
    assert read_run(tmp_path / "run").state == "decided"


def test_an_export_that_cannot_be_written_is_told_before_work(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    command = ["prune", str(root / "hf"), str(tmp_path / "run"), *WANDA, "--export", str(tmp_path / "out"), *text(root)]
    assert main(command) == 2
    assert not (tmp_path / "run").exists()


def test_training_exports_too(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(root / "words.jsonl"), *STEPS, "--export", str(tmp_path / "out")]
    assert said(["train", str(root / "run"), str(tmp_path / "run"), *words], capsys).endswith("verified\n")
    for form in (tmp_path / "out", tmp_path / "run"):
        assert "pattern 2:4: holds" in said(["verify", str(form)], capsys)


def test_a_run_that_made_a_model_smaller_trains_as_its_checkpoint(root: Path, tmp_path: Path) -> None:
    """Recomputed, too; and without a word of libraries that means nothing to the user."""
    assert main(["trim", str(root / "small"), str(tmp_path / "ck")]) == 0
    words = ["--data", str(root / "words.jsonl"), *STEPS, "--recompute", "--use-distributed-optimizer"]
    assert main(["train", str(tmp_path / "ck"), str(tmp_path / "a"), *words]) == 0
    command = [sys.executable, "-m", "megatron_prune", "train", str(root / "small"), str(tmp_path / "b"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())
    assert done.returncode == 0 and not done.stderr, done.stderr
    for run in ("a", "b"):
        assert main(["export", str(tmp_path / run), str(tmp_path / f"{run}_hf")]) == 0
    one, other = (load_file(tmp_path / run / "model.safetensors") for run in ("a_hf", "b_hf"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "b_hf" / "config.json").read_text())["intermediate_size"] == 48


def test_verbs_take_runs(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers for a run and for its export, of either kind."""
    held_out = ["--text", str(root / "text.txt"), "--window", "16", "--windows", "4"]
    for run, directory in (("run", "out"), ("small", "small_hf")):
        found = [said(["evaluate", str(root / form), *held_out], capsys) for form in (run, directory)]
        assert found[0].split()[1] == found[1].split()[1]
        assert main(["verify", str(root / run), "--against", str(root / directory)]) == 0
        assert main(["export", str(root / run), str(tmp_path / directory)]) == 0
        one, other = (load_file(folder / directory / "model.safetensors") for folder in (root, tmp_path))
        assert all(torch.equal(one[name], other[name]) for name in one)
    fast = ["--prompt-length", "8", "--new-tokens", "2", "--repeats", "1", "--batch-sizes", "1"]
    assert "batch 1, dense" in said(["bench", str(root / "run"), *fast], capsys)


def test_lengths_that_are_not_given_fit_the_model(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A length that is given is not changed in silence, nor a number of windows."""
    longest = json.loads((root / "hf" / "config.json").read_text())["max_position_embeddings"]
    (root / "long.txt").write_text("the mask keeps a weight of every row " * 200)
    assert f"windows of {longest}," in said(["evaluate", str(root / "hf"), "--text", str(root / "long.txt")], capsys)
    for more in (["--window", str(longest + 1)], ["--windows", "32"]):
        assert main(["evaluate", str(root / "hf"), "--text", str(root / "long.txt"), *more]) == 2
    assert main(["bench", str(root / "out"), "--new-tokens", "2", "--repeats", "1", "--batch-sizes", "1"]) == 0
    assert main(["bench", str(root / "out"), "--prompt-length", str(longest), "--new-tokens", "2"]) == 2


def test_what_was_made_is_told(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters, zeros and bytes, of every form."""
    tensors = load_file(root / "out" / "model.safetensors")
    count = f"{sum(tensor.numel() for tensor in tensors.values()):,} parameters"
    pruned = [tensor for name, tensor in tensors.items() if "proj" in name]
    zeros = f"{sum(int((t == 0).sum()) for t in pruned):,} of {sum(t.numel() for t in pruned):,}"
    for command in (
        ["import", str(root / "out"), str(tmp_path / "ck")],
        ["trim", str(root / "run"), str(tmp_path / "trimmed")],
        ["export", str(root / "run"), str(tmp_path / "hf")],
        ["inspect", str(root / "out")],
        ["inspect", str(tmp_path / "trimmed")],
    ):
        told = said(command, capsys)
        assert count in told and f"{zeros} prunable weights are zero" in told and "iB" in told, told
    assert main(["export", str(root / "run"), str(tmp_path / "m.npz"), "--format", "mask-npz"]) == 0
    kept = sum(int((tensor != 0).sum()) for tensor in pruned)
    assert f"pattern 2:4, {kept:,} of " in said(["inspect", str(tmp_path / "m.npz")], capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "a", "b"], "'b' given; allowed here: INPUT"),
        (["trim", "a", "b", "c"], "'c' given; allowed here: INPUT OUTPUT"),
        (["verify", "a", "--input", "b"], "--input: given twice"),
        (["trim", "a", "b", "--output=c"], "--output: given twice"),
    ],
)
def test_words_without_a_flag(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.distributed
def test_one_command_on_two_processes(root: Path, tmp_path: Path) -> None:
    """They part and meet again for every step of it; the same weights as by one process come out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_prune", "prune", str(root / "hf"), str(tmp_path / "run"), *WANDA, *text(root)]
    command += ["--tensor-model-parallel-size", "2", "--export", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.rstrip().endswith("verified")
    one, two = (load_file(folder / "out" / "model.safetensors") for folder in (root, tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_model_in_a_deep_folder(root: Path, tmp_path: Path) -> None:
    """Its run names it, however long its name is."""
    deep = tmp_path.joinpath(*["d" * 200] * 6)
    deep.parent.mkdir(parents=True)
    shutil.copytree(root / "hf", deep)
    assert main(["prune", str(deep), str(tmp_path / "run"), "--method", "magnitude", "--target", "2:4"]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
