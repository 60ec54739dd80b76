"""What gpt-oss has that others have not: sinks, windows in some layers, YaRN, experts in one tensor, MXFP4."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.__main__ import main
from megatron_prune.decision.pruned import cut
from megatron_prune.decision.source import open_model
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.model import mxfp4
from megatron_prune.model.attention import SDPACoreAttention
from megatron_prune.model.build import check_divisible, inverse_frequencies, transformer_config, whole_norm
from megatron_prune.model.convert import HFReader, experts_together
from megatron_prune.model.cost import channels_seen
from megatron_prune.model.families import FAMILIES, ModelConfig, family_of
from megatron_prune.model.forward import logits
from tests import runs
from tests.models import YARN_ROPE, edit_config, from_mxfp4, packed_gpt_oss, tiny_model

SLIDING, FULL = "sliding_attention", "full_attention"


def config_of(path: Path, **changes: Any) -> ModelConfig:
    """Of a tiny model's config.json with these keys changed."""
    values = json.loads((path / "config.json").read_text()) | changes
    return family_of(values).from_hf(values)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of four layers."""
    return tiny_model(tmp_path_factory.mktemp("gpt_oss") / "hf", "gpt_oss", num_hidden_layers=4)


@pytest.fixture(scope="module")
def layout() -> Iterator[backend.Layout]:
    """One process, joined."""
    with backend.running(backend.Layout()):
        yield backend.Layout()


# --- config.json ---


def test_what_a_key_left_out_means(directory: Path) -> None:
    values = json.loads((directory / "config.json").read_text())
    for key in ("layer_types", "rope_parameters", "sliding_window", "swiglu_limit", "head_dim", "swiglu_alpha"):
        del values[key]
    config = family_of(values).from_hf(values)
    assert config.window_layers == (True, False, True, False) and config.sliding_window == 128
    assert config.activation_func_clamp_value == 7.0 and config.kv_channels == 64
    assert config.rope_scaling is not None and config.rotary_base == 150000.0
    assert config.rope_scaling["factor"] == 32.0 and config.rope_scaling["truncate"] is False
    assert config.rope_scaling["attention_factor"] == pytest.approx(1.3465735902799727)


def test_windows_follow_the_layers_that_stay(directory: Path) -> None:
    whole = config_of(directory)
    family = FAMILIES["gpt_oss"]
    for gone, kinds in (([1], [SLIDING, SLIDING, FULL]), ([0, 2], [FULL, FULL]), ([1, 3], [SLIDING, SLIDING])):
        smaller = Units.all(whole).without_layers(gone).config(whole)
        written = family.to_hf(smaller)
        assert written["layer_types"] == kinds and written["num_hidden_layers"] == len(kinds)
        assert [smaller.window(n) for n in range(len(kinds))] == [7 if kind == SLIDING else None for kind in kinds]
        assert ModelConfig.from_dict(json.loads(json.dumps(smaller.to_dict()))) == smaller
    assert channels_seen(whole, 100) == 2 * 4 * 16 * (7 + 100 + 7 + 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": [FULL] * 3}, "has 4 layers and 3 layer_types"),
        ({"layer_types": ["chunked_attention"] * 4}, "type 'chunked_attention'; supported: 'full_attention' and 'slid"),
        ({"attention_bias": False}, "attention_bias: False"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha: 1.0"),
        ({"swiglu_limit": 0}, "activation_func_clamp_value = 0; it must be a number above 0"),
        ({"rope_parameters": YARN_ROPE | {"mscale": 1.0}}, "'yarn' with mscale or mscale_all_dim; supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "without original_max_position_embeddings; add"),
        ({"rope_parameters": YARN_ROPE | {"truncate": 1}}, "truncate = 1; it must be true or false"),
        ({"rope_parameters": YARN_ROPE | {"beta_slow": 9}}, "beta_slow 9 and beta_fast 8.0; the first must be at most"),
        ({"rope_parameters": YARN_ROPE | {"factor": True}}, "factor = True; it must be a number"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3'; supported: 'default', 'yarn'"),
        ({"num_experts": 5}, "num_local_experts 4 and num_experts 5: keep one"),
    ],
)
def test_what_is_not_represented_is_refused_by_name(directory: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(directory, **change)


def test_experts_split_over_processes_are_refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="experts have biases.*add --expert-tensor-parallel-size 1"):
        check_divisible(config_of(directory), backend.Layout(tensor=2, sequence_parallel=True))
    check_divisible(config_of(directory), backend.Layout(tensor=2, sequence_parallel=True, expert_tensor=1))
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    command = ["plan", "--input", str(directory), "--method", "maskllm", "--target", "2:4", "--processes", "2", *layout]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "experts have biases" in line


@pytest.mark.parametrize("change", [{}, {"truncate": True}, {"factor": 8.0, "attention_factor": 1.5}])
def test_yarn_is_transformers(directory: Path, change: dict[str, Any]) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = config_of(directory, rope_parameters=YARN_ROPE | change)
    theirs = AutoConfig.from_pretrained(directory, rope_parameters=YARN_ROPE | change)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    found = inverse_frequencies(config, torch.device("cpu"))
    assert torch.equal(found, expected) and 0 < (found != inverse_frequencies(
        replace(config, rope_scaling=None), torch.device("cpu")
    )).sum() < len(found)  # fmt: skip
    core = transformer_config(config, backend.Layout(), torch.float32)
    assert core.softmax_scale == pytest.approx(factor**2 / 16**0.5)


# --- attention ---


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_sinks_take_part_in_the_softmax_and_add_nothing(
    directory: Path, layout: backend.Layout, window: int | None, masked: bool
) -> None:
    torch.manual_seed(0)
    core = transformer_config(config_of(directory), layout, torch.float32)
    attention = SDPACoreAttention(core, softmax_scale=0.3, window=window, sinks=True)
    assert attention.softmax_offset is not None
    torch.nn.init.normal_(attention.softmax_offset)
    query, key, value = torch.randn(8, 2, 4, 16), torch.randn(8, 2, 2, 16), torch.randn(8, 2, 2, 16)
    distance = torch.arange(8)[:, None] - torch.arange(8)
    seen = (distance >= 0) & (distance < (8 if window is None or masked else window))
    mask = torch.zeros(8, 8).masked_fill(~seen, -torch.inf)
    found = attention(query, key, value, mask.expand(2, 1, 8, 8) if masked else None)
    for batch, head in itertools.product(range(2), range(4)):
        scores = query[:, batch, head] @ key[:, batch, head // 2].T * 0.3 + mask
        sinks = attention.softmax_offset[head].expand(8, 1)
        shares = torch.cat([scores, sinks], dim=1).softmax(dim=1)
        expected = shares[:, :-1] @ value[:, batch, head // 2]
        torch.testing.assert_close(found[:, batch, 16 * head : 16 * (head + 1)], expected, rtol=1e-5, atol=1e-6)
        assert float(shares[:, -1].detach().max()) > 0.01


def test_norms_round_where_transformers_does(directory: Path, layout: backend.Layout) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

    torch.manual_seed(0)
    theirs, x = GptOssRMSNorm(32, eps=1e-5).bfloat16(), torch.randn(64, 32).bfloat16()
    torch.nn.init.uniform_(theirs.weight, 0.5, 1.5)
    config = config_of(directory)
    found = []
    for about in (config, replace(config, norm_rounds_last=False)):
        ours = whole_norm(about, torch.bfloat16)
        ours.load_state_dict(theirs.state_dict())
        found.append(torch.equal(ours(x), theirs(x)))
    assert found == [True, False]


# --- units ---


def test_what_belongs_to_a_unit_goes_with_it(directory: Path, layout: backend.Layout) -> None:
    model = open_model(directory).load(layout)
    whole = Units.all(model.config)
    block = replace(whole.blocks[0], heads=(1, 2), groups=(0, 1), experts=(0, 3), ffn=tuple(range(4, 20)))
    units = replace(whole, blocks=(block,) * 4).without_layers([2])
    smaller = cut(model, units)
    before, after = (dict(each.hf_weights()) for each in (model, smaller))
    start, old = "model.layers.2.", "model.layers.3."
    assert torch.equal(after[start + "self_attn.sinks"], before[old + "self_attn.sinks"][[1, 2]])
    assert torch.equal(after[start + "mlp.router.bias"], before[old + "mlp.router.bias"][[0, 3]])
    assert torch.equal(after[start + "self_attn.q_proj.bias"], before[old + "self_attn.q_proj.bias"][16:48])
    for kind in ("gate_proj", "up_proj"):
        there = before[f"{old}mlp.experts.3.{kind}.bias"]
        assert torch.equal(after[f"{start}mlp.experts.1.{kind}.bias"], there[4:20])
    assert torch.equal(after[start + "mlp.experts.1.down_proj.bias"], before[old + "mlp.experts.3.down_proj.bias"])
    assert smaller.config.window_layers == (True, False, False)


# --- experts in one tensor ---


def test_experts_are_read_as_transformers_uses_them(directory: Path) -> None:
    reader, stored = HFReader(directory), load_file(directory / "model.safetensors")
    start = "model.layers.1.mlp.experts."
    both, below = stored[start + "gate_up_proj"], stored[start + "down_proj"]
    for expert in range(4):
        assert torch.equal(reader.read(f"{start}{expert}.gate_proj.weight"), both[expert, :, 0::2].T)
        assert torch.equal(reader.read(f"{start}{expert}.up_proj.weight"), both[expert, :, 1::2].T)
        assert torch.equal(reader.read(f"{start}{expert}.down_proj.weight"), below[expert].T)
        assert torch.equal(reader.read_rows(f"{start}{expert}.down_proj.weight", 3, 5), below[expert].T[3:5])
        biases = stored[start + "gate_up_proj_bias"][expert]
        assert torch.equal(reader.read(f"{start}{expert}.up_proj.bias"), biases[1::2])
    together = dict(experts_together(reader.model_config, ((name, reader.read(name)) for name in reader.names())))
    assert together.keys() == stored.keys() and all(torch.equal(together[name], stored[name]) for name in stored)


def test_a_tensor_of_experts_of_another_shape_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    stored, name = load_file(directory / "model.safetensors"), "model.layers.1.mlp.experts.down_proj"
    save_file(stored | {name: stored[name].transpose(1, 2).contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"down_proj in .* has shape \[4, 32, 24\]; config.json asks for \[4, 24, 32\]"):
        HFReader(tmp_path)
    save_file({key: tensor for key, tensor in stored.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor model.layers.1.mlp.experts.0.down_proj.weight"):
        HFReader(tmp_path)


# --- MXFP4 ---


def test_mxfp4_is_read_as_what_it_stands_for(tmp_path: Path, layout: backend.Layout) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_prune.jobs.import_hf import open_hf

    plain = packed_gpt_oss(tmp_path / "packed")
    reader, told = open_hf(str(tmp_path / "packed"))
    assert any("experts in MXFP4: they are read as bfloat16" in line for line in told)
    assert reader.model_config.dtype == "bfloat16" and "quantization_config" not in reader.model_config.hf_config
    weights = ((name, reader.read(name)) for name in reader.names())
    found = dict(experts_together(reader.model_config, weights))
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    path = tiny_model(tmp_path / "plain", "gpt_oss", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    save_file({n: tensor.float() for n, tensor in plain.items()}, path / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(tokens).logits
    ours = logits(open_model(tmp_path / "packed").load(layout, dtype="float32"), tokens)
    assert float((ours - expected).abs().max()) < 1e-4


def test_every_code_and_scale_is_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes = torch.arange(256, dtype=torch.uint8).repeat(2).reshape(1, 4, 8, 16)
    scales = torch.arange(100, 132, dtype=torch.uint8).reshape(1, 4, 8)
    expected = convert_moe_packed_tensors(codes, scales)
    found = mxfp4.dequantised(codes[0], scales[0])
    assert found.dtype == torch.bfloat16 and torch.equal(found.T[None], expected)
    assert torch.equal(found.T[None], from_mxfp4(codes, scales))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, x: None if name.endswith("down_proj_scales") else x, "_blocks and _scales go together"),
        (lambda name, x: x[:, :, :, :8].contiguous() if name.endswith("_blocks") else x, r"allowed: U8 \[experts, out"),
        (lambda name, x: x.short() if name.endswith("_scales") else x, "I16 .*allowed: U8"),
        (
            lambda name, x: x[:, :-1].contiguous() if name.endswith(("_blocks", "_scales")) else x,
            "config.json asks for",
        ),
    ],
)
def test_damaged_mxfp4_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "packed"
    packed_gpt_oss(path)
    for file in path.glob("*.safetensors"):
        changed = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file)
    index = {name: file.name for file in path.glob("*.safetensors") for name in load_file(file)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with pytest.raises(UserError, match=message):
        HFReader(path)


def test_mxfp4_of_other_families_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "hf", "qwen3_moe")
    edit_config(path, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UserError, match=r"quantised \(mxfp4\).*Mxfp4Config\(dequantize=True\)"):
        HFReader(path)


# --- what does not take it ---


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `runs.imported`."""
    return runs.imported(tmp_path_factory.mktemp("imported"), "gpt_oss")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export --input ck --output x --format fms", "fms"),
        ("export --input ck --output x --format maxtext", "the model has"),
        (
            "export --input ck --output x --quantize fp8 --calibration w.jsonl",
            "have the experts of a layer in one tensor",
        ),
        ("latency --input ck --output x", "experts"),
    ],
)
def test_what_does_not_take_it_says_so_in_a_line(
    imported: Path, command: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(imported)
    runs.refused_in_a_line(command, message, capsys)


def test_both_forms_of_a_model_score_texts_alike(imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(imported)
    found = []
    for form in ("ck", "hf"):
        command = f"evaluate --input {form} --text w.jsonl --window 32 --windows 4 --output {form}.json"
        assert main(command.split()) == 0
        found.append(json.loads(Path(f"{form}.json").read_text())["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
