"""What an export would refuse is refused before work is done: at import, and by prune before weights are loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

from megatron_prune.__main__ import main
from megatron_prune.decision.target import parse_any_target
from megatron_prune.errors import UserError
from megatron_prune.exporting.preflight import check_export, check_result
from megatron_prune.jobs import prune
from megatron_prune.model.convert import HFReader
from megatron_prune.model.families import ModelConfig, family_of
from tests.models import BLOCKS, DENSE, TINY_SIZES, byte_tokenizer, edit_config, tiny_blocks, tiny_llama, tiny_model

OPENS_LAYER_TYPES = Version(transformers.__version__) < Version("5.10")


def config_of(path: Path, model_type: str = "llama", **changes: Any) -> ModelConfig:
    """Of a tiny model's config.json, changed."""
    values = json.loads((tiny_model(path, model_type) / "config.json").read_text()) | changes
    return family_of(values).from_hf(values)


@pytest.mark.parametrize("model_type", TINY_SIZES)
def test_every_family_can_be_exported(tmp_path: Path, model_type: str) -> None:
    check_export(config_of(tmp_path / "hf", model_type))
    assert len(BLOCKS) == 4
    if model_type in DENSE:  # layers with experts are alike
        check_export(HFReader(tiny_blocks(tmp_path / "blocks", model_type)).model_config)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"initializer_range": "small"}, "transformers does not open .*initializer_range"),
        ("llama", {"use_cache": 1}, "transformers does not open .*use_cache"),
        pytest.param(
            "llama",
            {"layer_types": ["full_attention"]},
            "transformers does not open .*layer_types",
            marks=pytest.mark.skipif(OPENS_LAYER_TYPES, reason="this transformers opens it"),
        ),
        ("qwen3", {"head_dim": None}, "transformers does not open .*head_dim"),
        ("llama", {"pad_token_id": 128}, "pad_token_id 128 and a vocabulary of 128.*set pad_token_id to null"),
        ("llama", {"eos_token_id": "</s>"}, "transformers does not open .*eos_token_id"),
    ],
)
def test_what_transformers_does_not_open_is_refused(
    tmp_path: Path, model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_export(config_of(tmp_path / "hf", model_type, **changes))


def test_what_transformers_reads_otherwise_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path / "hf")
    other = {**config.hf_config, "attribute_map": {}, "rms_norm_eps": 1e-6}
    check_export(replace(config, hf_config=other, layernorm_epsilon=1e-6))
    gpt2 = config_of(tmp_path / "gpt2", "gpt2", num_hidden_layers=1)
    with pytest.raises(UserError, match="transformers reads n_layer 1 .*where 2 is meant"):
        check_export(gpt2)


def test_import_refuses_before_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    edit_config(directory, pad_token_id=257)
    assert main(["import", "--input", str(directory), "--output", str(tmp_path / "x")]) == 2
    assert "pad_token_id 257" in capsys.readouterr().err and not list(tmp_path.glob("x*"))


@pytest.mark.parametrize(
    ("model_type", "target", "message"),
    [
        ("gpt2", "hidden_size=24", "could not be exported.*allowed: .*hidden_size=24,num_attention_heads=3"),
        ("llama", "hidden_size=31", "could not be exported.*allowed: .*hidden_size=32"),
    ],
)
def test_a_target_without_an_export_is_refused(tmp_path: Path, model_type: str, target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_result(config_of(tmp_path / "hf", model_type), parse_any_target(target))


def test_a_target_that_needs_padding_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path / "hf")
    check_result(config, parse_any_target("num_attention_heads=2"))
    check_result(config, parse_any_target("num_layers=1"))
    check_result(config, parse_any_target("2:4"))
    assert not capsys.readouterr().out
    check_result(config, parse_any_target("hidden_size=30"))
    told = capsys.readouterr().out
    assert "opens no model of 4 heads and hidden_size 30: export the result with --layers padded, or prune to" in told
    assert "hidden_size=28" in told and "hidden_size=32" in told


def test_prune_refuses_before_weights_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = byte_tokenizer(tiny_model(tmp_path / "hf", "gpt2", vocab_size=257))
    monkeypatch.setattr(prune.backend, "running", lambda *more: pytest.fail("work was begun"))
    words = ["--method", "minitron", "--target", "hidden_size=24", "--calibration", str(tmp_path / "t.txt")]
    assert main(["prune", "--input", str(directory), "--output", str(tmp_path / "x"), *words]) == 2
    assert "could not be exported" in capsys.readouterr().err and not list(tmp_path.glob("x*"))


PRUNE = ["prune", "--method", "magnitude", "--target", "2:4"]
TRAIN = ["train", "--data", "t.txt", "--train-iters", "1"]


@pytest.mark.parametrize("verb", [PRUNE, TRAIN], ids=["prune", "train"])
def test_verbs_that_work_long_ask_first(
    tmp_path: Path, verb: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    edit_config(directory, pad_token_id=257)
    monkeypatch.setattr(prune.backend, "running", lambda *more: pytest.fail("work was begun"))
    command = [*verb, "--input", str(directory), "--output", str(tmp_path / "x")]
    assert main(command) == 2
    assert "set pad_token_id to null" in capsys.readouterr().err
    edit_config(directory, pad_token_id=None, dtype="float16")
    if verb is PRUNE:
        assert main(command) == 2
        assert "weights of type float16 are not supported" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_prune_of_a_directory_tells_what_stays_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    (directory / "README.md").write_text("about")
    assert main([*PRUNE, "--input", str(directory), "--output", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out.count(f"not carried along from {directory}: 'README.md'") == 1
