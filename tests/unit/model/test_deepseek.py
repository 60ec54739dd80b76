"""DeepSeek-V3, R1 and V2-Lite, Kimi-K2: latent attention and its settings, weights in FP8, what is refused and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.errors import UserError
from megatron_prune.model import fp8_blocks
from megatron_prune.model.convert import HFReader
from megatron_prune.model.cost import forward_flops, kv_cache_bytes
from megatron_prune.model.families import FAMILIES, family_of
from tests import runs
from tests.models import TINY_SIZES, byte_tokenizer, edit_config, packed_deepseek, tiny_model
from tests.unit.model.test_other_families import DEEPSEEK_V2, DEEPSEEK_V3

YARN = DEEPSEEK_V3["rope_scaling"]


# --- the configuration ---


def test_what_a_published_one_means() -> None:
    config = family_of(DEEPSEEK_V3).from_hf(DEEPSEEK_V3)
    assert (config.query_channels, config.kv_channels, config.rotated_keys, config.q_lora_rank) == (192, 128, 64, 1536)
    assert config.rope_scaling is not None and config.rope_scaling["attention_factor"] == 1.0
    assert config.moe_layers is not None and sum(config.moe_layers) == 58
    assert kv_cache_bytes(config) == 61 * (512 + 64) * 2, "of a token: the latent and the rotated keys of each layer"
    assert forward_flops(config, 1000) - forward_flops(config, 0) == 2 * 1000 * 61 * 128 * (192 + 128)
    lite = family_of(DEEPSEEK_V2).from_hf(DEEPSEEK_V2)
    assert lite.direct_queries and not lite.moe_renormalize and lite.moe_router_float32


def test_kimi_k2_is_read_and_written_as_what_it_is(tmp_path: Path) -> None:
    """Its own name of the type needs code; its YaRN turns from one channel to the next."""
    path = tiny_model(tmp_path / "hf", "deepseek_v3", n_group=1, topk_group=1, num_experts_per_tok=3)
    scaling = YARN | {"factor": 4.0, "beta_fast": 1.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    edit_config(path, model_type="kimi_k2", auto_map={"AutoConfig": "x.Y"}, rope_parameters=scaling)
    byte_tokenizer(path)
    for verb in (["import", "hf", "ck"], ["export", "ck", "back"]):
        words = ["--input", str(tmp_path / verb[1]), "--output", str(tmp_path / verb[2])]
        assert main([verb[0], *words]) == 0
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_type"] == "deepseek_v3" and "auto_map" not in written
    assert main(["verify", "--input", str(tmp_path / "ck"), "--against", str(tmp_path / "back")]) == 0


@pytest.mark.parametrize(
    ("values", "change", "message"),
    [
        (DEEPSEEK_V3, {"attention_bias": True}, "attention_bias: True"),
        (DEEPSEEK_V3, {"rope_interleave": False}, "rope_interleave: False"),
        (DEEPSEEK_V3, {"norm_topk_prob": False}, "norm_topk_prob: False"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func: 'softmax'.*'sigmoid'"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method: 'greedy'.*'noaux_tc'"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq: 2"),
        (DEEPSEEK_V3, {"num_key_value_heads": 8}, "128 attention heads and 8 key/value heads; in latent attention"),
        (DEEPSEEK_V3, {"head_dim": 128}, "head_dim 128; of its heads it is 64"),
        (DEEPSEEK_V3, {"qk_head_dim": 128}, "qk_head_dim 128; of its heads it is 192"),
        (DEEPSEEK_V3, {"qk_rope_head_dim": 63}, "head width of 63"),
        (DEEPSEEK_V3, {"kv_lora_rank": 0}, "kv_lora_rank = 0; it must be a whole number"),
        (DEEPSEEK_V3, {"topk_group": 3}, "chooses 8 of 256 experts from 3 of 8 groups"),
        (DEEPSEEK_V3, {"rope_scaling": YARN | {"beta_slow": 40}}, "beta_slow 40 and beta_fast 32"),
        (DEEPSEEK_V3, {"rope_scaling": YARN | {"mscale": 0}}, "mscale = 0; it must be a number above 0"),
        (DEEPSEEK_V3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        (DEEPSEEK_V2, {"topk_method": "group_limited_greedy"}, "topk_method: 'group_limited_greedy'.*'greedy'"),
        (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob: True"),
    ],
)
def test_what_would_change_the_logits_is_refused(values: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        family_of(values).from_hf(values | change)


def test_a_setting_changes_the_logits(tmp_path: Path) -> None:
    """Negative control of the parity tests: each part of YaRN and of the routing counts in a model that small."""
    byte_tokenizer(tiny_model(tmp_path / "hf", "deepseek_v3", vocab_size=257))
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "ck")]) == 0
    rope = TINY_SIZES["deepseek_v3"]["rope_parameters"]
    for number, change in enumerate(
        [
            {"rope_parameters": rope | {"mscale_all_dim": 1.0, "attention_factor": 1.0}},
            {"rope_parameters": rope | {"attention_factor": 1.0}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            {"routed_scaling_factor": 1.0},
            {"topk_group": 4, "n_group": 4},
        ]
    ):
        other = tmp_path / str(number)
        byte_tokenizer(tiny_model(other, "deepseek_v3", vocab_size=257))
        edit_config(other, **change)
        assert main(["verify", "--input", str(tmp_path / "ck"), "--against", str(other)]) == 1, change


# --- FP8 ---


def test_weights_in_fp8_are_what_their_codes_stand_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = packed_deepseek(tmp_path / "packed")
    reader = HFReader(tmp_path / "packed")
    for name in reader.names():
        assert torch.equal(reader.read(name), plain[name]), name
        assert torch.equal(reader.read_rows(name, 1, 3), plain[name][1:3])
    byte_tokenizer(tmp_path / "packed")
    capsys.readouterr()
    assert main(["import", "--input", str(tmp_path / "packed"), "--output", str(tmp_path / "ck")]) == 0
    told = capsys.readouterr().out
    assert "has its weights in FP8: they are read as bfloat16, and exported so" in told
    assert "1 tensors that no weight of the model is in, such as model.layers.2." in told
    assert main(["export", "--input", str(tmp_path / "ck"), "--output", str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], plain[name]) for name in plain)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_blocks_at_the_ends_are_smaller() -> None:
    codes = torch.arange(1, 11, dtype=torch.float32).reshape(2, 5).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 10.0, 100.0]])
    found = fp8_blocks.dequantised(codes, scales, fp8_blocks.Block(4, 2))
    assert found.tolist() == [[1, 2, 30, 40, 500], [6, 7, 80, 90, 1000]] and found.dtype == torch.bfloat16


def halve(name: str, tensor: Tensor) -> Tensor | None:
    return tensor[:1] if name.endswith("kv_b_proj.weight_scale_inv") else tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (halve, "allowed: F8_E4M3 of two dimensions and F32, one for each 16 x 8 of it"),
        (lambda n, x: None if n.endswith("o_proj.weight") else x, "o_proj.weight_scale_inv without its weight"),
        (lambda n, x: x.half() if n.endswith("scale_inv") else x, "F16 .*allowed: F8_E4M3 of two dimensions"),
        (lambda n, x: None if n.endswith("o_proj.weight_scale_inv") else x, "holds .*o_proj.weight in F8_E4M3"),
    ],
)
def test_damaged_fp8_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    packed_deepseek(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    changed = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file({name: x.contiguous() for name, x in changed.items() if x is not None}, file)
    with pytest.raises(UserError, match=message):
        HFReader(tmp_path / "packed")


@pytest.mark.parametrize("block", [[128], [128, 0], [128, "128"], [True, 128], "128"])
def test_a_size_of_blocks_that_is_none_is_one_line(tmp_path: Path, block: Any) -> None:
    packed_deepseek(tmp_path / "packed")
    edit_config(tmp_path / "packed", quantization_config={"quant_method": "fp8", "weight_block_size": block})
    with pytest.raises(UserError, match="weight_block_size = .*; it must be two whole numbers of at least 1"):
        HFReader(tmp_path / "packed")


def test_fp8_of_other_families_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "hf", "qwen3_moe")
    edit_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(UserError, match=r"quantised \(fp8\).*FineGrainedFP8Config\(dequantize=True\)"):
        HFReader(path)


# --- what does not take it ---


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `runs.imported`."""
    return runs.imported(tmp_path_factory.mktemp("imported"), "deepseek_v3")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export --input ck --output x --format fms", "this is a deepseek_v3 model; use --format hf"),
        ("export --input ck --output x --format maxtext", "MaxText export is for"),
        ("latency --input ck --output x", "experts"),
        (
            "prune --input ck --output x --method minitron --target num_attention_heads=2 --calibration w.jsonl",
            "num_attention_heads=2 with 4 query groups",
        ),
        (
            "prune --input ck --output x --method reap --target num_moe_experts=6 --calibration w.jsonl",
            "4 groups of experts, which keep equally many, at least 2: allowed are multiples of 4 from 8 on",
        ),
        ("import --input hf --output x --tensor-model-parallel-size 3", "needs a multiple of 3 processes"),
        ("train --input ck --output x --data w.jsonl --lora-rank 2 --lora-targets k_proj", "k_proj given; allowed"),
    ],
)
def test_what_does_not_take_it_says_so_in_a_line(
    imported: Path, command: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(imported)
    runs.refused_in_a_line(command, message, capsys)


@pytest.mark.parametrize("targets", ["linear_qkv linear_proj", "q_a_proj kv_a_proj_with_mqa kv_b_proj", "linear_fc1"])
def test_adapters_train_what_their_targets_name(imported: Path, tmp_path: Path, targets: str) -> None:
    text = ["--data", str(imported / "w.jsonl"), "--seq-length", "16", "--global-batch-size", "1", "--train-iters", "2"]
    lora = ["--lora-rank", "2", "--lora-targets", *targets.split(), "--lr", "1e-2"]
    inputs = ["--input", str(imported / "ck"), "--output", str(tmp_path / "run")]
    assert main(["train", *inputs, *text, *lora]) == 0
    run = ["--input", str(tmp_path / "run" / "weights"), "--output", str(tmp_path / "back")]
    assert main(["export", *run]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (imported / "hf", tmp_path / "back"))
    attention = {f"self_attn.{name}.weight" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")}
    wanted = {
        "linear_qkv linear_proj": attention | {"self_attn.o_proj.weight"},
        "linear_fc1": {"mlp.gate_proj.weight", "mlp.up_proj.weight"},
    }.get(targets, {f"self_attn.{name}.weight" for name in targets.split()})
    changed = {
        name.split(".", 3)[3]
        for name in before
        if name.startswith("model.layers.0") and not torch.equal(before[name], after[name])
    }
    assert changed == wanted


def test_both_forms_of_a_model_score_texts_alike(imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(imported)
    found = []
    for form in ("ck", "hf"):
        command = f"evaluate --input {form} --text w.jsonl --window 32 --windows 4 --output {form}.json"
        assert main(command.split()) == 0
        found.append(json.loads(Path(f"{form}.json").read_text())["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_sizes_of_attention_that_contradict_the_family_are_refused(name: str) -> None:
    from dataclasses import replace

    from megatron_prune.model.family import check_config

    values = {"deepseek_v2": DEEPSEEK_V2, "deepseek_v3": DEEPSEEK_V3}[name]
    config = family_of(values).from_hf(values)
    check_config(config, FAMILIES[name])
    with pytest.raises(UserError, match="sizes of latent attention are"):
        check_config(replace(config, kv_lora_rank=None), FAMILIES[name])
    with pytest.raises(UserError, match="rope_scaling has keys"):
        check_config(replace(config, rope_scaling={**(config.rope_scaling or {}), "more": 1}), FAMILIES[name])
