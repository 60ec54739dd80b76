"""Mistakes of a user: one line on stderr, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_prune.__main__ import main
from megatron_prune.decision.target import parse_target
from megatron_prune.errors import UserError
from megatron_prune.log import read_metrics
from megatron_prune.model.convert import HFReader
from megatron_prune.model.families import get_family
from tests.models import byte_tokenizer, edit_config, tiny_llama, words
from tests.runs import set_state


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small imported model and some text."""
    root = tmp_path_factory.mktemp("errors")
    words(root / "words.jsonl")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257, intermediate_size=88))
    assert main(["import", "--input", str(root / "hf"), "--output", str(root / "model")]) == 0
    return root


def prune(root: Path, output: str, *more: str) -> list[str]:
    """A prune command that would work but for what the test adds."""
    calibration = ["--calibration", str(root / "words.jsonl"), "--calibration-samples", "2"]
    words = ["prune", "--input", str(root / "model"), "--output", str(root / output), *calibration]
    return [*words, "--calibration-seq-length", "16", *more]


def learn(root: Path, output: str, *more: str) -> list[str]:
    """A mask-learning command of three steps."""
    inputs = ["--input", str(root / "model"), "--output", str(root / output), "--data", str(root / "words.jsonl")]
    steps = ["--seq-length", "16", "--global-batch-size", "2", "--train-iters", "3", "--save-interval", "1"]
    return ["prune", "--method", "maskllm", "--target", "2:4", *inputs, *steps, *more]


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused; the message."""
    capsys.readouterr()
    assert main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("megatron-prune: error: "), lines
    return lines[0]


def untouched(root: Path, *names: str) -> bool:
    """Neither the outputs nor parts of them are there."""
    return not any((root / (name + suffix)).exists() for name in names for suffix in ("", ".partial"))


CASES = {
    "missing_checkpoint": (["trim", "--input", "ROOT/nowhere", "--output", "ROOT/x"], "does not exist"),
    "not_a_checkpoint": (["export", "--input", "ROOT/hf", "--output", "ROOT/x"], "import makes one"),
    "missing_model": (["import", "--input", "ROOT/nowhere", "--output", "ROOT/x"], "does not exist"),
    "missing_text": (["evaluate", "--input", "ROOT/model", "--text", "ROOT/nowhere.txt"], "nowhere.txt"),
    "layout_of_a_hugging_face_model": (
        [*"evaluate --input ROOT/hf --text ROOT/words.jsonl --window 16 --tensor-model-parallel-size 2".split()],
        "a layout of 2 processes was given",
    ),
    "experts_of_a_hugging_face_model": (
        [*"evaluate --input ROOT/hf --text ROOT/words.jsonl --window 16 --expert-model-parallel-size 2".split()],
        "a layout of 2 processes was given",
    ),
    "existing_output": (["import", "--input", "ROOT/hf", "--output", "ROOT/model"], "already exists"),
    "misspelt_flag": (["import", "--inptu", "ROOT/hf", "--output", "ROOT/x"], "input"),
    "misspelt_verb": (["improt"], "did you mean import"),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_one_line(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, message = CASES[name]
    assert message in refused([word.replace("ROOT", str(root)) for word in command], capsys)
    assert untouched(root, "x")


PRUNE_CASES = {
    "pattern_does_not_divide": (["--method", "wanda", "--target", "2:16"], "not a multiple of 16"),
    "impossible_pattern": (["--method", "wanda", "--target", "4:2"], "0 < N < M"),
    "repeated_list": (
        ["--method", "wanda", "--target", "2:4", "--calibration", "other.jsonl"],
        "--calibration: given more than once",
    ),
    "unknown_method": (["--method", "wadna", "--target", "2:4"], "did you mean 'wanda'"),
    "unknown_option": (["--method", "sparsegpt", "--target", "2:4", "--precdamp", "0.1"], "percdamp"),
    "unreachable_target": (["--method", "maskllm", "--target", "0.5"], "N:M"),
    "no_training_text": (["--method", "maskllm", "--target", "2:4"], "--data"),
    "calibration_too_long": (["--method", "wanda", "--target", "2:4", "--calibration-seq-length", "512"], "512"),
}


@pytest.mark.parametrize("name", PRUNE_CASES)
def test_pruning_mistakes_leave_no_run(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    more, message = PRUNE_CASES[name]
    words = prune(root, "x")
    if "--calibration-seq-length" in more:
        words = words[:-2]
    if "maskllm" in more:
        words = words[:5]
    text = root / "words.jsonl"
    if name == "calibration_too_long":
        text = words_too_short(root)
        words = [str(text) if word == str(root / "words.jsonl") else word for word in words]
    assert message in refused([*words, *more], capsys)
    assert untouched(root, "x")


def words_too_short(root: Path) -> Path:
    """Text whose documents do not hold a window."""
    path = root / "short.jsonl"
    path.write_text('{"text": "too short"}\n')
    return path


def test_layouts_the_model_does_not_allow() -> None:
    import megatron_prune.backend as backend
    from megatron_prune.model.build import check_divisible
    from tests.unit.test_backend import config

    with pytest.raises(UserError, match="tensor-model-parallel-size 3 was given and the model has 4 attention heads"):
        check_divisible(config(), backend.Layout(tensor=3))
    with pytest.raises(UserError, match="pipeline-model-parallel-size 4 was given and the model has 2 layers"):
        check_divisible(config(), backend.Layout(pipeline=4))


def test_a_shard_that_cuts_groups_is_refused(root: Path) -> None:
    from megatron_prune.methods.fit import check_shards
    from megatron_prune.model.checkpoint import read_description

    model = read_description(root / "model").config  # ffn 88: 44 on each of two ranks is no multiple of 8
    assert get_family(model.family)
    check_shards(model, parse_target("2:4"), 2)
    with pytest.raises(UserError, match="gives each rank 44 inputs of .*linear_fc2.*not a multiple of 8"):
        check_shards(model, parse_target("4:8"), 2)


def test_a_tokenizer_that_does_not_fit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer(tiny_llama(root / "small_hf", vocab_size=128))
    assert main(["import", "--input", str(root / "small_hf"), "--output", str(root / "small")]) == 0
    words = prune(root, "x", "--method", "wanda", "--target", "2:4")
    words[2] = str(root / "small")
    assert "tokenizer" in refused(words, capsys)
    assert untouched(root, "x")


def test_a_truncated_safetensors_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = byte_tokenizer(tiny_llama(root / "broken_hf", vocab_size=257))
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in refused(["import", "--input", str(broken), "--output", str(root / "x")], capsys)
    assert untouched(root, "x")


def test_an_unsupported_model(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny_llama(root / "other_hf")
    edit_config(other, model_type="mamba")
    assert "supported: deepseek_v2, deepseek_v3, gemma3_text, glm4_moe, gpt2, gpt_oss, kimi_k2, llama" in refused(
        ["import", "--input", str(other), "--output", str(root / "x")], capsys
    )


def test_float16_weights(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = byte_tokenizer(tiny_llama(root / "half_hf", vocab_size=257, dtype=torch.float16))
    command = ["import", "--input", str(half), "--output", str(root / "x")]
    message = refused(command, capsys)
    assert "weights of type float16 are not supported; allowed are float32, bfloat16" in message
    assert "give --dtype bfloat16 to import" in message
    assert "float16" in refused([*command, "--dtype", "float16"], capsys)
    assert untouched(root, "x")
    assert main([*command[:-1], str(root / "half"), "--dtype", "bfloat16"]) == 0


def test_a_damaged_checkpoint(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--input", str(root / "hf"), "--output", str(root / "damaged")]) == 0
    file = sorted((root / "damaged" / "weights").glob("*.distcp"))[0]
    file.write_bytes(file.read_bytes()[:-10])
    message = refused(["export", "--input", str(root / "damaged"), "--output", str(root / "x")], capsys)
    assert "is damaged" in message and file.name in message
    assert untouched(root, "x")


def test_a_loss_that_is_no_number(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The step is named, and the checkpoint of the step before it is kept."""
    more = ["--lr", "1e38", "--min-lr", "1e38", "--lr-multiplier", "1e3"]
    message = refused(learn(root, "exploded", *more), capsys)
    assert "step 1" in message and "last checkpoint is kept" in message
    assert json.loads((root / "exploded" / "checkpoints" / "latest.json").read_text()) == {"step": 1}
    assert json.loads((root / "exploded" / "run.json").read_text())["state"] == "learning"
    assert "has no decision yet" in refused(
        ["trim", "--input", str(root / "exploded"), "--output", str(root / "x")], capsys
    )
    assert untouched(root, "x")


def test_resuming_something_else(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(learn(root, "finished")) == 0
    assert "already exists" in refused(learn(root, "finished"), capsys)
    assert "is finished" in refused(learn(root, "finished", "--resume"), capsys)
    assert "is finished" in refused(learn(root, "finished", "--restartable"), capsys)
    assert "does not exist" in refused(learn(root, "unknown", "--resume"), capsys)


def test_an_uneven_batch(root: Path) -> None:
    from megatron_prune.option_groups import Training

    with pytest.raises(UserError, match="multiple of micro batch 2 x 4"):
        Training(global_batch_size=12, micro_batch_size=2).num_microbatches(4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prior", "pior"], "--prior pior is neither"),
        (["--prior", "maskllm"], "--prior maskllm is neither"),
        (["--initial-logits", "nowhere"], "has no checkpoints"),
        (["--micro-batch-size", "3"], "--global-batch-size"),
        (["--adam-beta2", "1"], "below 1"),
    ],
)
def test_learning_mistakes_leave_no_run(
    root: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(learn(root, "mistaken", *more), capsys)
    assert untouched(root, "mistaken")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scale-end", "7"], "method_options"),
        (["--train-iters", "9"], "train_iters"),
        (["--data-documents", "3"], "data"),
    ],
)
def test_a_run_is_resumed_with_what_it_was_begun_with(
    root: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = root / "begun"
    if not run.exists():
        assert main(learn(root, "begun")) == 0
        set_state(run, "learning")
    assert message in refused(learn(root, "begun", "--resume", *more), capsys)
    assert not list(run.glob("config.resumed.*")), "it is as it was"


def test_a_resumed_run_may_have_another_learning_rate(root: Path) -> None:
    """As the message about a loss that is no number says; what it was resumed with is kept beside its config."""
    assert main(learn(root, "hot", "--lr", "1e-3", "--min-lr", "1e-4")) == 0
    run = root / "hot"
    set_state(run, "learning")
    shutil.rmtree(run / "checkpoints" / "step_0000003")
    assert main(learn(root, "hot", "--resume", "--lr", "1e-6", "--min-lr", "1e-7")) == 0
    rates = {record["step"]: record["learning_rate"] for record in read_metrics(run) if "learning_rate" in record}
    assert rates[3] < rates[2] / 100
    assert "lr: 1.0e-06" in (run / "config.resumed.1.yaml").read_text()


def test_a_decision_of_another_run_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By all that read it."""
    for name, target in (("unstructured", "0.5"), ("two", "2:4")):
        command = ["prune", "--input", str(root / "model"), "--output", str(root / name), "--target", target]
        assert main([*command, "--method", "magnitude"]) == 0
    shutil.rmtree(root / "unstructured" / "decision")
    shutil.copytree(root / "two" / "decision", root / "unstructured" / "decision")
    given, said = (
        ["--input", str(root / "unstructured")],
        "run.json says magnitude 0.5, decision/decision.json magnitude 2:4",
    )
    for verb in (["trim", "--output", str(root / "x")], ["verify"], ["inspect"]):
        assert said in refused([verb[0], *given, *verb[1:]], capsys)
    assert said in refused(["report", str(root / "unstructured"), "--output", str(root / "x.html")], capsys)
    mask = ["export", *given, "--format", "mask-npz", "--output", str(root / "x.npz")]
    assert said in refused(mask, capsys)
    learned = ["--prior", str(root / "unstructured")]
    assert said in refused(learn(root, "from_half", *learned), capsys)
    assert untouched(root, "x")


def test_logits_of_another_pattern_are_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1:4 and 3:4 have as many patterns, so that shapes alone would not tell."""
    assert main(learn(root, "one_of_four", "--target", "1:4")) == 0
    more = ["--target", "3:4", "--initial-logits", str(root / "one_of_four")]
    assert "has learned 1:4 and the target is 3:4" in refused(learn(root, "three_of_four", *more), capsys)


def test_a_place_that_cannot_be_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "file").write_text("")
    message = refused(["export", "--input", str(root / "model"), "--output", str(root / "file" / "x")], capsys)
    assert "file" in message


@pytest.mark.parametrize("calibrated", ["wanda", "sparsegpt"])
def test_a_prior_that_looks_at_text_asks_for_it_before_weights_are_read(
    tmp_path: Path, calibrated: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=260))
    text = words(tmp_path / "text.jsonl")
    monkeypatch.setattr(HFReader, "read", lambda *_: pytest.fail("weights were read"))
    command = ["prune", "--input", str(hf), "--output", str(tmp_path / "run"), "--method", "maskllm", "--target", "2:4"]
    assert main([*command, "--data", str(text), "--seq-length", "16", "--prior", calibrated]) == 2
    assert f"--prior {calibrated} needs calibration text" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    command[command.index("maskllm")] = "wanda"
    assert main(command) == 2
    assert "needs calibration text" in capsys.readouterr().err


@pytest.mark.parametrize("place", [".", "/"])
def test_text_that_has_no_name_is_one_line(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    hf = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=260))
    command = ["prune", "--input", str(hf), "--output", str(tmp_path / "run"), "--target", "2:4"]
    calibrated = ["--method", "wanda", "--calibration", place, "--calibration-seq-length", "16"]
    for given in (calibrated, ["--method", "maskllm", "--data", place, "--seq-length", "16"]):
        assert main([*command, *given]) == 2
        told = capsys.readouterr().err
        assert told.count("megatron-prune: error:") == 1 and "give text in" in told and "Traceback" not in told, told
    assert not (tmp_path / "run").exists()
