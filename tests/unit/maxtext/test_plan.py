"""`plan --tpu`: chips, what divides, and memory by formulas written out for a model of LLaMA-2-7B's sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.__main__ import main

SEVEN = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
SEVEN |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}
SEVEN |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
LINEAR = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
WEIGHTS = LINEAR + 2 * 32000 * 4096 + 65 * 4096


def plan(path: Path, tpu: str, *more: str, **changes: Any) -> tuple[int, dict[str, Any]]:
    """Exit status and result of `plan`."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(SEVEN | changes))
    output = path / f"{tpu}.json"
    words = ["--method", "maskllm", "--target", "2:4", "--output", str(output), "--tpu", tpu, *more]
    status = main(["plan", "--input", str(path), *words])
    return status, json.loads(output.read_text()) if output.exists() else {}


@pytest.mark.parametrize(("tpu", "chips", "hosts", "gib"), [
    ("v5p-64", 32, 8, 95), ("v5litepod-16", 16, 4, 16), ("v4-8", 4, 1, 32), ("v6e-256", 256, 64, 32),
])  # fmt: skip
def test_memory_of_a_slice(tmp_path: Path, tpu: str, chips: int, hosts: int, gib: int) -> None:
    status, found = plan(tmp_path, tpu)
    assert status == 0 and found["fsdp"] == chips
    assert found["tpu"] == {"name": tpu, "chips": chips, "hosts": hosts, "bytes": gib * 2**30}
    assert found["train"] == 12 * WEIGHTS // chips
    assert found["learn"] == 4 * WEIGHTS // chips + 18 * LINEAR // chips


def test_what_does_not_divide_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = plan(tmp_path, "v5litepod-16", hidden_size=4040, head_dim=128)
    said = capsys.readouterr().out
    assert status == 0 and found["fsdp"] == 8
    assert "ici_fsdp_parallelism=8 ici_data_parallelism=2" in said
    assert "v5litepod-16: 16 chips on 4 hosts, 16 GiB each" in said and "learn 2:4: " in said
    whole = 32 * 4040 * (32 * 128 + 11008)  # o_proj and down_proj, whose outputs do not divide either
    assert found["learn"] > 18 * whole


def test_what_does_not_fit_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(tmp_path, "v5litepod-4")[0] == 0
    assert "does not fit: take a larger slice" in capsys.readouterr().out


def test_experts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(tmp_path, "v5p-8", model_type="mixtral", num_local_experts=8)[0] == 2
    assert "a model with experts was given" in capsys.readouterr().err


@pytest.mark.parametrize(("tpu", "more", "message"), [
    ("v5p-63", (), "--tpu 'v5p-63' is not known; allowed: v4, v5litepod, v5p, v6e and its size"),
    ("h100-8", (), "--tpu 'h100-8' is not known"),
    ("v5p-8", ("--processes", "8"), "both were given; give one of them"),
])  # fmt: skip
def test_mistakes(
    tmp_path: Path, tpu: str, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tmp_path, tpu, *more)[0] == 2 and message in capsys.readouterr().err
    assert main(["plan", "--input", str(tmp_path), "--method", "maskllm", "--target", "2:4"]) == 2
    assert "neither was given" in capsys.readouterr().err
