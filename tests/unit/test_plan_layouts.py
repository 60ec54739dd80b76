"""`plan --gpu-memory`: layouts that fit, in the order of the documented model of time."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest

from megatron_prune.__main__ import main
from megatron_prune.command_line import parse
from megatron_prune.config import PruneConfig
from megatron_prune.jobs.layouts import RATES, layouts, seconds
from megatron_prune.jobs.plan import job_of, plan
from megatron_prune.verbs.plan import PlanConfig

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    return tmp_path


def asked(model: Path, *more: str) -> PlanConfig:
    words = [str(model), "--method", "maskllm", "--target", "2:4", "--seq-length", "4096", *more]
    return parse(PlanConfig, words, "plan")


def test_what_is_proposed_fits_and_nothing_that_fits_is_left_out(model: Path) -> None:
    """Against every layout, looked at one by one."""
    found = layouts(asked(model, "--gpus", "64", "--gpu-memory", "80"), 64, 80, 8)
    proposed = {(each.job.tensor, each.job.stages, each.job.training.recompute) for each in found}
    for tensor in (1, 2, 4, 8):
        for stages in (1, 2, 4, 8, 16, 32):
            for recompute in (False, True):
                if tensor * stages > 64:
                    continue
                flags = ["--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(stages)]
                flags += ["--sequence-parallel"] if tensor > 1 else []
                flags += ["--use-distributed-optimizer"] if tensor * stages < 64 else []
                job = job_of(asked(model, *flags, "--processes", "64", *(["--recompute"] if recompute else [])), 64)
                fits = max(stage.total for stage in plan(job)) <= 0.9 * 80e9
                assert ((tensor, stages, recompute) in proposed) == fits
    assert [each.step for each in found] == sorted(each.step for each in found)


def test_the_model_of_time_is_the_documented_one(model: Path) -> None:
    """By hand for LLaMA-2 7B on 64 GPUs, tensor 8 x pipeline 4 x 2 replicas: 128 micro-batches of 4096 tokens."""
    flags = ["--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "4", "--sequence-parallel"]
    job = job_of(asked(model, *flags, "--processes", "64"), 64)
    found, weights, tokens = seconds(job, 8), 32 * (4 * 4096**2 + 3 * 4096 * 11008), 256 * 4096
    flops = tokens * (6 * weights + 4 * 32000 * 4096 + 12 * 32 * 4096 * 4096)
    assert found["products"] == pytest.approx(flops / (64 * RATES["products"]) * (1 + 3 / 128))
    assert found["masks"] == pytest.approx(128 * weights / 32 * 44 / RATES["memory"])
    assert found["tensor"] == pytest.approx(128 * 8 * 4 * (2 * 7 / 8) * 4096 * 4096 * 2 / RATES["link"])
    assert found["pipeline"] == pytest.approx(128 * 2 * 4096 * 4096 * 2 / RATES["network"])
    assert found["replicas"] == pytest.approx(weights / 32 * 1.5 * 4 / RATES["network"])
    again = job_of(asked(model, *flags, "--processes", "64", "--recompute"), 64)
    assert seconds(again, 8)["products"] == pytest.approx(found["products"] * 4 / 3)
    assert math.isclose(seconds(again, 8)["tensor"], found["tensor"] * 6 / 4)


MIXTURE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 4096,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 768,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def test_experts_are_spread_and_their_exchanges_counted(tmp_path: Path) -> None:
    """By hand for three layers of experts and one MLP on 16 GPUs, experts over 4 of 8 replicas, tensor 2."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    step = ["--mask-draw", "step", "--global-batch-size", "64"]
    flags = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "4"]
    job = job_of(asked(tmp_path, *flags, *step, "--processes", "16"), 16)
    found, attention = seconds(job, 8), 4 * 2048 * (2 * 32 + 2 * 4) * 128
    mlp, expert = 3 * 2048 * 6144, 3 * 3 * 2048 * 768
    tokens, met = 64 * 4096, attention + mlp + 4 * expert
    flops = tokens * (6 * met + 4 * 4096 * 2048 + 12 * 4 * 32 * 128 * 4096)
    assert found["products"] == pytest.approx(flops / (16 * RATES["products"]))
    assert found["experts"] == pytest.approx(8 * 3 * 4 * (3 / 4) * 4096 * 2048 * 2 * 4 / 2 / RATES["link"])
    assert seconds(job, 4)["experts"] == pytest.approx(found["experts"] * RATES["link"] / RATES["network"])
    rest, own = (attention + mlp) / 2, expert * 4 / 2
    summed = 2 * (7 / 8 * rest + 1 / 2 * own) * 1.5 * 4
    assert found["replicas"] == pytest.approx(summed / RATES["network"])
    assert found["masks"] == pytest.approx((rest + own) * 44 / RATES["memory"])
    proposed = layouts(asked(tmp_path, *step, "--gpus", "16", "--gpu-memory", "80"), 16, 80, 8)
    assert {each.job.layout.expert_model_parallel_size for each in proposed} == {1, 2, 4, 8, 16}
    given = layouts(asked(tmp_path, *step, "--gpus", "16", "--gpu-memory", "80", *flags[-2:]), 16, 80, 8)
    assert {each.job.layout.expert_model_parallel_size for each in given} == {4}


def test_the_verb_prints_a_command_that_starts_the_first(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a method and a pattern, which `plan` need not be given; and what it says of windows it says once."""
    (model / "config.json").write_text(json.dumps(LLAMA_7B | {"max_position_embeddings": 1024}))
    words = ["plan", str(model), "--gpus", "64", "--gpu-memory", "80"]
    words += ["--output", str(model / "plan.json"), "--prior-strength", "2", "--prior", "sparsegpt"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert (told.out + told.err).count("windows of 1024 tokens, which is what the model reads") == 1
    started = shlex.split(told.out.splitlines()[-1])
    assert started[:5] == ["torchrun", "--nnodes", "8", "--rdzv-backend", "c10d"]
    config = parse(PruneConfig, started[started.index("prune") + 1 :], "prune")
    first = json.loads((model / "plan.json").read_text())["layouts"][0]
    assert config.parallelism.tensor_model_parallel_size == first["tensor"]
    assert config.parallelism.pipeline_model_parallel_size == first["pipeline"]
    assert config.training.recompute == first["recompute"]
    assert (config.method, config.target, config.training.seq_length) == ("maskllm", "2:4", 1024)
    assert config.method_options == {"prior_strength": 2.0} and config.prior == "sparsegpt"
    assert first["bytes"] < 0.9 * 80e9


def test_memory_is_said_without_a_method(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--processes", "8", "--tensor-model-parallel-size", "8"]) == 0
    told = capsys.readouterr().out
    assert "GiB on each process, without what CUDA itself takes:" in told and "total" in told


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpus", "8", "--gpu-memory", "1"], "no layout of 8 GPUs fits; the smallest"),
        (["--gpus", "7", "--gpu-memory", "80"], "no layout of 7 GPUs divides"),
        (["--gpus", "8", "--gpu-memory", "80", "--tensor-model-parallel-size", "2"], "which proposes it"),
        (["--gpus", "8", "--gpus-per-node", "4"], "without --gpu-memory"),
        (["--gpus", "8", "--processes", "4"], "give one of them"),
        (["--gpus", "8", "--tpu", "v5p-64"], "both were given"),
    ],
)
def test_mistakes(model: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--method", "maskllm", "--target", "2:4", *more]) == 2
    assert message in capsys.readouterr().err
