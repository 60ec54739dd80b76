"""Nothing that the user gives is ignored: what a method or the other options have no use for is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prune.__main__ import main
from megatron_prune.jobs.given import USED_BY, uses
from megatron_prune.methods.base import get_method, methods
from megatron_prune.option_groups import Losses
from megatron_prune.options import entries, flag
from megatron_prune.verbs import VERBS
from tests.models import byte_tokenizer, tiny_llama, words

TARGETS = {
    "flap": "parameters=20K",
    "darwinlm": "parameters=20K",
    "llm_pruner": "num_query_groups=1",
    "minitron": "ffn_hidden_size=32",
}
ONE_SHOT = ("magnitude", "wanda", "sparsegpt")
LEARNS = ["--train-iters", "1", "--global-batch-size", "1", "--seq-length", "16", "--lr-warmup-iters", "0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("given")
    tiny_llama(root / "hf", vocab_size=257)
    byte_tokenizer(root / "hf")
    words(root / "text.jsonl")
    assert main(["import", "--input", str(root / "hf"), "--output", str(root / "ck")]) == 0
    return root


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must be refused."""
    capsys.readouterr()
    assert main(argv) == 2, argv
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


VALUES = {
    "prior": "magnitude",
    "data_documents": "3",
    "eval_documents": "3",
    "data_split": "9,1",
    "lr_decay_style": "linear",
    "calibration_documents": "3",
    "teacher_dtype": "float32",
    "hidden_loss": "mse",
}


BESIDE = {"domain_targets": ["--domain-interval", "3"]}
"""What an option needs beside it."""


def value_of(key: str) -> list[str]:
    """A value that is not the default."""
    entry = next(entry for entry in entries(VERBS["prune"].config) if entry.key == key)
    if entry.kind is bool:
        return ["true"]
    if key in VALUES:
        return [VALUES[key]]
    if entry.kind in (int, float) or "int" in str(entry.kind) or "float" in str(entry.kind):
        return ["0.5" if entry.field.metadata["below"] else "7"]
    return ["nowhere"]


@pytest.mark.parametrize("name", [info.name for info in methods()])
def test_what_a_method_has_no_use_for_is_refused_before_the_model_is_looked_at(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it exists or not, and each by itself."""
    method = get_method(name)
    target = "2:4" if name in (*ONE_SHOT, "maskllm") else TARGETS.get(name, "num_layers=1")
    unused = [key for key, kind in USED_BY.items() if not uses(method, kind)]
    losses = {entry.key for entry in entries(Losses)} - {"teacher", "lm_weight"}
    assert unused or name == "maskllm"
    words = ["prune", "--input", str(tmp_path / "no"), "--output", str(tmp_path / "out"), "--method", name]
    for key in unused:
        more = BESIDE.get(key, ["--teacher", "nowhere", "--hidden-weight", "1"] if key in losses else [])
        line = refused([*words, "--target", target, flag(key), *value_of(key), *more], capsys)
        assert flag(key) in line and ("has no use for it" in line or "--lr" in line or "needs" in line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "--method sparsegpt --target 2:4 --calibration TEXT --prior nowhere",
            "--prior was given and method sparsegpt",
        ),
        ("--method magnitude --target 2:4 --initial-logits nowhere --data no.jsonl", "--data was given and method mag"),
        ("--method shortgpt --target num_layers=1 --calibration TEXT --train-iters 3", "--train-iters was given"),
        ("--method wanda --target 2:4 --calibration TEXT --statistics there", "--statistics was given"),
        ("--method wanda --target 2:4 --calibration TEXT --resume", "--resume was given"),
        ("--method maskllm --target 2:4 --data TEXT --calibration TEXT", "--calibration was given and has no effect"),
        ("--method maskllm --target 2:4 --data TEXT --prior magnitude --calibration TEXT", "--calibration was given"),
        (
            "--method maskllm --target 2:4 --data TEXT --prior_strength 2",
            "--prior-strength was given and has no effect",
        ),
        ("--method flap --target parameters=20K --calibration TEXT --refit none --refit_damping 1", "--refit-damping"),
        ("--method darwinlm --target parameters=20K --calibration TEXT --search integer --offspring 2", "--offspring"),
        ("--method maskllm --target 2:4 --data TEXT --prior nowhere", "neither a run"),
        ("--method maskllm --target 2:4 --data nowhere.jsonl", "nowhere.jsonl"),
        ("--method maskllm --target 2:4 --data TEXT --eval-data nowhere.jsonl", "nowhere.jsonl"),
        ("--method maskllm --target 2:4 --data TEXT --initial-logits nowhere", "nowhere"),
        ("--method wanda --target 2:4 --calibration nowhere.txt", "nowhere.txt"),
        ("--method darwinlm --target latency_us=9 --calibration TEXT --latency-table nowhere.json", "nowhere.json"),
    ],
)
def test_what_has_no_effect_or_does_not_exist(
    root: Path, tmp_path: Path, words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words.replace("TEXT", str(root / "text.jsonl")).split()
    if "maskllm" in words:
        argv += LEARNS
    line = refused(["prune", "--input", str(root / "ck"), "--output", str(tmp_path / "out"), *argv], capsys)
    assert told in line, line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        "evaluate --input CK --text TEXT --limit 3",
        "evaluate --input CK --tasks piqa --window 64",
        "verify --input CK --tolerance 1",
        "export --input CK --output OUT --format mask-npz --layers padded",
        "train --input CK --output OUT --data TEXT --lora-alpha 3",
        "train --input CK --output OUT --data TEXT --distillation-temperature 3",
        "train --input CK --output OUT --data TEXT --hidden-loss mse",
        "train --input CK --output OUT --data TEXT --teacher-dtype float32",
    ],
)
def test_other_verbs_too(root: Path, tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = words.replace("CK", str(root / "ck")).replace("TEXT", str(root / "text.jsonl"))
    line = refused(argv.replace("OUT", str(tmp_path / "out")).split(), capsys)
    option = [word for word in words.split() if word.startswith("--")][-1]
    assert f"{option} was given and has no effect" in line


def test_a_plan_is_of_a_method_that_learns(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--input", str(root / "ck"), "--output", str(root / "plan.json"), "--target", "2:4", *LEARNS]
    assert "--method wanda was given" in refused([*words, "--method", "wanda", "--processes", "1"], capsys)
    assert main([*words, "--method", "maskllm", "--processes", "1"]) == 0


def test_defaults_may_be_given(root: Path, tmp_path: Path) -> None:
    """As in a run's own config.yaml, which repeats it."""
    words = ["prune", "--input", str(root / "ck"), "--method", "magnitude", "--target", "2:4"]
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    again = ["prune", "--config", str(tmp_path / "one" / "config.yaml"), "--output", str(tmp_path / "two")]
    assert main(again) == 0


def test_windows_are_no_longer_than_the_model_reads_and_a_line_says_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model that reads 512 tokens, where 2048 are usual; what was asked for is asked for."""
    text = tmp_path / "long.txt"
    text.write_text("the cat ran home " * 200)
    wanda = ["--method", "wanda", "--target", "2:4", "--calibration", str(text), "--calibration-samples", "2"]
    line = "windows of 512 tokens, which is what the model reads, in place of --calibration-seq-length 2048"
    for more, told in (([], 1), (["--calibration-seq-length", "64"], 0)):
        capsys.readouterr()
        run = tmp_path / f"run{told}"
        assert main(["prune", str(root / "ck"), str(run), *wanda, *more]) == 0
        assert capsys.readouterr().out.count(line) == told
        record = json.loads((run / "decision" / "decision.json").read_text())["calibration"]
        assert record["length"] == (512 if told else 64)
    short = ["--data", str(text), "--train-iters", "1", "--global-batch-size", "1"]
    assert main(["train", str(root / "ck"), str(tmp_path / "trained"), *short]) == 0
    assert capsys.readouterr().out.count("windows of 512 tokens, which is what the model reads, in place of --seq") == 1
    assert "\nseq_length: 512\n" in (tmp_path / "trained" / "config.yaml").read_text()
    assert main(["train", str(root / "ck"), str(tmp_path / "longer"), *short, "--seq-length", "600"]) == 0
    assert "\nseq_length: 600\n" in (tmp_path / "longer" / "config.yaml").read_text()


def test_a_trained_run_is_pruned_as_it_is_and_import_says_what_to_do_with_a_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, run = tmp_path / "trained", tmp_path / "run"
    assert main(["train", str(root / "ck"), str(trained), "--data", str(root / "text.jsonl"), *LEARNS]) == 0
    assert main(["prune", str(trained), str(run), "--method", "magnitude", "--target", "2:4"]) == 0
    other = ["--method", "magnitude", "--target", "2:4"]
    assert main(["prune", str(trained / "weights"), str(tmp_path / "other"), *other]) == 0
    masks = [(folder / "decision" / "decision.json").read_text() for folder in (run, tmp_path / "other")]
    assert masks[0] == masks[1] and main(["verify", str(run)]) == 0
    for folder in (trained, run):
        assert f"trim {folder} CHECKPOINT makes a checkpoint" in refused(
            ["import", str(folder), str(tmp_path / "x")], capsys
        )
    assert f"trim --input {run} --output CHECKPOINT first" in refused(
        ["prune", str(run), str(tmp_path / "x"), *other], capsys
    )
