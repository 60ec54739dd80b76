"""`export --quantize`: what nvidia-modelopt makes of a model is read back, keeps its zeros, and computes as its own."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune import backend
from megatron_prune.__main__ import main
from megatron_prune.decision.masks import prunable_shapes
from megatron_prune.errors import UserError
from megatron_prune.evaluation import hugging_face
from megatron_prune.exporting import quantise
from megatron_prune.exporting.padding import in_transformers
from megatron_prune.exporting.quantise import BLOCKS, Plan, Zeros, block_of
from megatron_prune.model import packed
from megatron_prune.model.convert import HFReader
from megatron_prune.model.packed import PackedReader, open_reader
from tests.models import byte_tokenizer, tiny_blocks, tiny_model, words

SIZES: dict[str, Any] = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 128}
CALIBRATION = "--calibration text.jsonl --calibration-samples 3 --calibration-seq-length 24"
FORMS = list(BLOCKS)
TOKENS = torch.arange(48).reshape(2, 24) * 5 % 257
installed = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None,
    reason="nvidia-modelopt is not installed: pip install -e '.[modelopt]'",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints: dense, 2:4, smaller, one whose layers differ; and text."""
    root = tmp_path_factory.mktemp("quantise")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        byte_tokenizer(tiny_model(Path("hf"), "llama", dtype=torch.bfloat16, tie_word_embeddings=True, **SIZES))
        words(Path("text.jsonl"))
        tiny_blocks(Path("uneven"))
        for command in (
            "import --input hf --output dense",
            "import --input uneven --output blocks",
            "prune --input dense --output run --method magnitude --target 2:4",
            "trim --input run --output sparse",
            f"prune --input dense --output narrow --method minitron --target ffn_hidden_size=64 {CALIBRATION}",
            "trim --input narrow --output small",
            f"prune --input dense --output varied --method flap --target parameters=85K {CALIBRATION}",
            "trim --input varied --output different",
        ):
            assert main(command.split()) == 0, command
    return root


@pytest.fixture(autouse=True)
def _there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def refused(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must be refused, and leaves nothing."""
    capsys.readouterr()
    assert main(command.split()) == 2, command
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert not list(Path().glob("no*"))
    return line


# --- with nvidia-modelopt ---


@installed
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", ["dense", "sparse", "small"])
def test_written_verified_and_evaluated(
    root: Path, tmp_path: Path, model: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "q"
    assert main(f"export --input {model} --output {output} --quantize {form} {CALIBRATION}".split()) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    reader = open_reader(output)
    assert isinstance(reader, PackedReader) and reader.scheme.name == form
    shapes = prunable_shapes(reader.model_config)
    zeros = sum(rows * inputs for rows, inputs in shapes.values()) // 2 if model == "sparse" else 0
    assert f"all {zeros:,} zeros of the linears stay zeros" in told and told.startswith(form)
    assert main(f"export --input {model} --output {tmp_path / 'plain'}".split()) == 0
    plain = HFReader(tmp_path / "plain")
    for name, (_, inputs) in shapes.items():
        before, after = plain.read(name).float(), reader.read(name)
        assert not after[before == 0].any(), name
        if "o_proj" in name or form != "int4_awq":  # else columns are scaled by what the norm before is scaled by
            assert (before - after).norm() < 0.15 * before.norm(), name
        assert inputs % block_of(reader.model_config, form) == 0
    (output / "hf_quant_config.json").stat()
    config = json.loads((output / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "modelopt" and config == plain.config
    target = "2:4" if model == "sparse" else "0.01"
    assert main(f"verify --input {output} --target {target} --output {tmp_path / 'v.json'}".split()) == 0
    assert (
        main(f"evaluate --input {output} --text text.jsonl --window 24 --windows 4 --output {tmp_path}/e".split()) == 0
    )
    assert json.loads((tmp_path / "e").read_text())["quantised"] == form
    assert (output / "tokenizer.json").read_bytes() == (root / "hf" / "tokenizer.json").read_bytes()


def ours_and_theirs(reader: HFReader, form: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Logits of what is written, by our reader, and of nvidia-modelopt's own model just before it is."""
    plan = Plan(form, block_of(reader.model_config, form), TOKENS, reader.directory)
    theirs: list[Tensor] = []
    with quantise._foreign():
        quantization, write = quantise._modelopt()
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers as smooth

    def watched(model: Any, export_dir: Path) -> None:
        if form == "int4_awq":  # linears of one input get one scale for it, which goes into the norm before
            smooth(model)
        theirs.append(model(TOKENS).logits)
        write(model, export_dir=export_dir)

    monkeypatch.setattr(quantise, "_modelopt", lambda: (quantization, watched))
    path.mkdir()
    quantise._quantise(in_transformers(reader, torch.float32), plan, path)
    with torch.no_grad():
        return hugging_face.load(open_reader(path), "float32")(TOKENS).logits, theirs[0]


@installed
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "nemotron"])
@pytest.mark.parametrize("form", ["fp8", "int4_awq"])
def test_it_computes_what_their_fake_quantisation_does(
    tmp_path: Path, form: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two share no code: theirs rounds numbers in place, ours reads codes and scales from a file.

    Biases, norms of heads and gains minus one are random, too. Weights are in float32: numbers in bfloat16 may lie in
    the middle between two codes.
    """
    reader = HFReader(tiny_model(tmp_path / "hf", family, **(SIZES | {"head_dim": 16})))
    ours, theirs = ours_and_theirs(reader, form, tmp_path / "q", monkeypatch)
    with torch.no_grad():
        plain = in_transformers(reader, torch.float32)(TOKENS).logits
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
    assert (ours - plain).abs().max() > 3e-2 * plain.abs().max(), "otherwise it says nothing"


@installed
def test_four_bits_of_inputs_are_theirs() -> None:
    """Their fake quantisation of nvfp4 wants a GPU; their tensors do not."""
    with quantise._foreign():
        quantise._modelopt()
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 1, 32)[:, None]
    scale = torch.tensor(0.004)
    tensor, scales, _ = NVFP4QTensor.quantize(x.clone(), 16, None, scale)
    theirs = tensor.dequantize(scale=scales, double_scale=scale, block_sizes={-1: 16})
    assert torch.allclose(packed.round_fp4(x, scale), theirs, rtol=1e-6, atol=0)
    assert torch.allclose(packed.from_fp4(tensor._quantized_data, scales, scale), theirs, rtol=1e-6, atol=0)


@installed
@pytest.mark.parametrize("family", ["llama", "qwen3", "nemotron"])
def test_four_bits_of_other_families(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear is quantised, and the logits stay near."""
    reader = HFReader(tiny_model(tmp_path / "hf", family, **(SIZES | {"head_dim": 16, "num_hidden_layers": 1})))
    (tmp_path / "q").mkdir()
    quantise._quantise(in_transformers(reader, torch.float32), Plan("nvfp4", 16, TOKENS, tmp_path), tmp_path / "q")
    written = open_reader(tmp_path / "q")
    assert isinstance(written, PackedReader)
    assert set(written.packed_names()) == set(prunable_shapes(reader.model_config))
    with torch.no_grad():
        models = (in_transformers(reader, torch.float32), hugging_face.load(written, "float32"))
        plain, found = (model(TOKENS).logits.flatten() for model in models)
    assert torch.corrcoef(torch.stack([plain, found]))[0, 1] > 0.8


@installed
def test_megatron_core_stays_as_it_is(tmp_path: Path) -> None:
    """nvidia-modelopt changes classes of megatron-core where it finds them; it does not find them."""
    from megatron.core.models.gpt import GPTModel

    before = GPTModel.sharded_state_dict
    model = in_transformers(HFReader("hf"), torch.float32)
    quantise._quantise(model, Plan("fp8", 1, TOKENS[:1], tmp_path), tmp_path)
    assert GPTModel.sharded_state_dict is before and "modelopt" not in before.__module__
    assert not any(name.startswith("modelopt.torch.quantization.plugins.megatron") for name in sys.modules)


@installed
def test_layers_that_differ_are_padded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Padding is zeros, and they stay; halves that are missing have nothing to take a scale from."""
    path = tmp_path / "q"
    assert main(f"export --input different --output {path} --quantize fp8 {CALIBRATION}".split()) == 0
    told = capsys.readouterr().out
    assert "padded (written)" in told and "fp8: " in told
    blocks = HFReader(exported("different", tmp_path, "blocks")).model_config
    plain, reader = HFReader(exported("different", tmp_path, "padded")), open_reader(path)
    assert blocks.blocks is not None and len(set(blocks.blocks)) > 1
    padding = 0
    for name in prunable_shapes(plain.model_config):
        zero = plain.read(name) == 0
        padding += int(zero.sum())
        assert not reader.read(name)[zero].any(), name
    assert padding > 1000 and f"all {padding:,} zeros of the linears stay zeros" in told
    line = refused(f"export --input blocks --output no --quantize fp8 {CALIBRATION}", capsys)
    assert "model.layers.0.self_attn.q_proj.weight has only zeros, from which no scale follows" in line


def exported(model: str, folder: Path, layers: str) -> Path:
    """The plain export of a model."""
    assert main(f"export --input {model} --output {folder / layers} --layers {layers}".split()) == 0
    return folder / layers


@installed
def test_a_zero_that_is_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "q"
    assert main(f"export --input sparse --output {path} --quantize fp8 {CALIBRATION}".split()) == 0
    reader = open_reader(path)
    assert isinstance(reader, PackedReader)
    zeros = Zeros(reader.model_config)
    name = "model.layers.1.mlp.up_proj.weight"
    weights = {one: reader.read(one) for one in reader.names()}
    list(zeros.watch(iter(weights.items())))
    zeros.check(reader)
    weights[name][3, :5] = 0
    list(zeros.watch(iter(weights.items())))
    with pytest.raises(UserError, match=f"gave [345] zeros of {name} another value; nothing is written"):
        zeros.check(reader)
    monkeypatch.setattr(reader, "packed_names", lambda: [name])
    with pytest.raises(UserError, match=r"left 13 linears as they were \(model.layers.0.mlp.down_proj.weight\)"):
        zeros.check(reader)


@installed
def test_what_it_raises_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: Any, export_dir: Path) -> None:
        print("noise")
        raise KeyError("what a library says\nand more")

    real = quantise._modelopt
    monkeypatch.setattr(quantise, "_modelopt", lambda: (real()[0], fails))
    line = refused(f"export --input dense --output no --quantize fp8 {CALIBRATION}", capsys)
    assert "could not quantise this model (KeyError" in line and "noise" not in line


# --- refused before anything is loaded ---

REFUSED = {
    "--quantize fp8": "--quantize fp8 needs calibration text and none was given: --calibration",
    f"--quantize fp8 --format fms {CALIBRATION}": "--quantize fp8 was given with --format fms; allowed: --format hf",
    f"--quantize nvfp4 --format maxtext {CALIBRATION}": "with --format maxtext; allowed: --format hf",
    f"--quantize nvfp4 --format mask-npz {CALIBRATION}": "with --format mask-npz; allowed: --format hf",
    f"--quantize fp8 --layers custom {CALIBRATION}": "with --layers custom, which no engine opens",
    f"--quantize fp8 --layers blocks {CALIBRATION}": "with --layers blocks, which no engine opens",
    f"--quantize fp8 --tensor-model-parallel-size 2 {CALIBRATION}": "a layout of several processes and one quantises",
    f"--quantize fp8 --expert-model-parallel-size 2 {CALIBRATION}": "a layout of several processes and one quantises",
    "--calibration text.jsonl": "--calibration was given and has no effect without --quantize: leave it out",
    "--calibration-samples 3": "--calibration-samples was given and has no effect without --quantize",
    f"--quantize int8 {CALIBRATION}": "--quantize",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_cannot_be_combined_is_named(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert REFUSED[options] in refused(f"export --input dense --output no {options}", capsys)


@pytest.mark.parametrize(
    ("sizes", "form", "complaint"),
    [
        ({"intermediate_size": 72}, "int4_awq", "blocks of 128 or 64 inputs share a scale and model.layers.0.mlp.down"),
        ({"intermediate_size": 72}, "nvfp4", "blocks of 16 inputs .* has 72 inputs: prune to multiples of 16, or use"),
        (
            {"intermediate_size": 65},
            "int4_awq",
            "packed in pairs and model.layers.0.mlp.gate_proj.weight has 65: prune",
        ),
    ],
)
def test_sizes_that_blocks_do_not_divide(tmp_path: Path, sizes: dict[str, int], form: str, complaint: str) -> None:
    config = HFReader(tiny_model(tmp_path / "hf", "llama", **(SIZES | sizes))).model_config
    assert block_of(config, "fp8") == 1
    with pytest.raises(UserError, match=complaint):
        block_of(config, form)


def test_the_largest_block_that_divides_all(tmp_path: Path) -> None:
    config = HFReader(tiny_model(tmp_path / "hf", "llama", **SIZES)).model_config
    assert [block_of(config, form) for form in FORMS] == [1, 64, 16]
    wide = SIZES | {"hidden_size": 128, "num_hidden_layers": 1}
    assert block_of(HFReader(tiny_model(tmp_path / "wide", "llama", **wide)).model_config, "int4_awq") == 128


def test_models_stored_the_other_way_round(tmp_path: Path) -> None:
    config = HFReader(tiny_model(tmp_path / "hf", "gpt2")).model_config
    with pytest.raises(UserError, match=r"gpt2 models store their linears \[in, out\], and no engine reads those"):
        block_of(config, "fp8")


def test_without_the_package_one_line_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"export --input dense --output no --quantize fp8 {CALIBRATION}"
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: None)
    line = refused(command, capsys)
    assert "nvidia-modelopt, which is not installed: pip install 'megatron-prune[modelopt]'" in line
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(quantise, "version", lambda name: "0.37.1")
    assert "needs nvidia-modelopt 0.45 or later, 0.37.1 is installed" in refused(command, capsys)


def test_several_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quantise, "check_installed", lambda: None)
    monkeypatch.setattr(backend, "world_size", lambda: 2)
    line = refused(f"export --input dense --output no --quantize fp8 {CALIBRATION}", capsys)
    assert "2 processes were started and one quantises" in line
