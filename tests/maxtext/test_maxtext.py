"""Through MaxText itself, on a CPU: equal logits, the way back, and training that keeps zeros. One process for all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.decision.masks import Masks, prunable_shapes
from megatron_prune.exporting.padding import in_transformers
from megatron_prune.kernels.gumbel import Draw, Position, masked_weight
from megatron_prune.maxtext.layout import LLAMA3
from megatron_prune.maxtext.masks import PackedMasks
from megatron_prune.model import convert
from megatron_prune.model.convert import HFReader
from megatron_prune.model.families import get_family
from megatron_prune.model.prunable import LINEARS
from tests.maxtext import environment
from tests.models import byte_tokenizer, edit_config, tiny_blocks, tiny_llama, tiny_model, words

pytestmark = pytest.mark.slow
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"num_hidden_layers": 3, "head_dim": 16, "vocab_size": 257},
    "tied": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
    "pruned": {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
    | {"intermediate_size": 88, "num_hidden_layers": 3},
    "rope": {"head_dim": 16, "rope_parameters": ROPE},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None, "vocab_size": 257},
    "qwen2": {"vocab_size": 257, "tie_word_embeddings": True},
    "qwen3": {"vocab_size": 257},
    "mixtral": {"head_dim": 16, "vocab_size": 257},
    "qwen3_moe": {"vocab_size": 257, "num_hidden_layers": 3},
}
"""Other families, by model_type."""
CONVERTED = [*KINDS, *FAMILIES, "sparse", "padded", "experts"]
STEPS = ["per_device_batch_size=4", "learning_rate=1e-3", "dtype=float32", "async_checkpointing=False"]
STEPS += ["learning_rate_schedule_steps=5", "warmup_steps_fraction=0", "grain_worker_count=0"]


def verb(*words: object) -> None:
    """Run a verb of this environment, which must succeed."""
    assert main([str(word) for word in words]) == 0, words


def reference(model: Path, output: Path) -> None:
    """Random tokens, and what transformers makes of them in float32."""
    reader = HFReader(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, reader.model_config.vocab_size, (2, 48), generator=generator)
    with torch.no_grad():
        logits = in_transformers(reader, torch.float32).eval()(tokens).logits
    np.savez(output, tokens=tokens.numpy(), logits=logits.numpy())


def test_a_fresh_process_reads_bfloat16(tmp_path: Path) -> None:
    """Nothing else has taught numpy that type there, as JAX has where models are converted."""
    model = tiny_llama(tmp_path / "hf", dtype=torch.bfloat16)
    code = "import sys, pathlib; from megatron_prune.maxtext.hf import HFDirectory as D; "
    code += "print(D(pathlib.Path(sys.argv[1])).read('model.embed_tokens.weight').astype('float32').sum())"
    command = [str(environment.python()), "-c", code, str(model)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(environment.ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    weight = HFReader(model).read("model.embed_tokens.weight")
    assert float(done.stdout) == pytest.approx(float(weight.float().sum()), abs=1e-3)


def training(root: Path, model: str, run: str, steps: int, *more: object) -> list[object]:
    data = ["--data", root / "tokens", "--data-cache", root / "cache", "--seq-length", 32]
    run_of = ["--input", root / f"{model}_maxtext", "--output", root / run, "--steps", steps]
    return ["main", "train", *run_of, *data, "--save-interval", 100, *more, "--settings", *STEPS]


def prepare(root: Path) -> None:
    """Models, references and text: everything that needs PyTorch."""
    for name, sizes in KINDS.items():
        byte_tokenizer(tiny_llama(root / name, **sizes))
    for name, sizes in FAMILIES.items():
        byte_tokenizer(tiny_model(root / name, name, **sizes))
    tiny_blocks(root / "padded")
    verb("prune", "--input", root / "dense", "--output", root / "run", "--method", "magnitude", "--target", "2:4")
    verb("trim", "--input", root / "run", "--output", root / "trimmed")
    verb("export", "--input", root / "trimmed", "--output", root / "sparse")
    verb("export", "--input", root / "run", "--output", root / "sparse_maxtext", "--format", "maxtext")
    verb("export", "--input", root / "padded", "--output", root / "padded_maxtext", "--format", "maxtext")
    magnitude = ["--method", "magnitude", "--target", "2:4"]
    verb("prune", "--input", root / "qwen3_moe", "--output", root / "experts_run", *magnitude)
    verb("trim", "--input", root / "experts_run", "--output", root / "experts_trimmed")
    verb("export", "--input", root / "experts_trimmed", "--output", root / "experts")
    verb("export", "--input", root / "experts_run", "--output", root / "experts_maxtext", "--format", "maxtext")
    for name in CONVERTED:
        reference(root / name, root / f"{name}.npz")
    text = ["--input", words(root / "words.jsonl"), "--tokenizer", root / "dense", "--append-eod", "--workers", 1]
    verb("preprocess", *text, "--output", root / "tokens")
    verb("prune", "--input", root / "rope", "--output", root / "prior", "--method", "magnitude", "--target", "2:4")
    verb("export", "--input", root / "prior", "--output", root / "prior.npz", "--format", "mask-npz")
    shapes = prunable_shapes(HFReader(root / "dense").model_config).items()
    random = np.random.default_rng(0)
    logits = {name: random.normal(0, 0.01, (out, size // 4, 6)).astype(np.float32) for name, (out, size) in shapes}
    np.savez(root / "logits.npz", **logits)
    tiny_model(root / "nemotron", "nemotron")
    byte_tokenizer(tiny_llama(root / "factor", rope_parameters=ROPE | {"factor": 32.0}))
    shutil.copytree(root / "dense", root / "lying")
    edit_config(root / "lying", intermediate_size=96)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every call of these tests, made once; `answers` has what they said."""
    environment.python()
    root = tmp_path_factory.mktemp("maxtext")
    prepare(root)
    calls: dict[str, list[object]] = {}
    for name in (*KINDS, *FAMILIES, "nemotron", "factor", "lying"):
        half = ["--weights-dtype", "bfloat16"] if name == "tied" else []
        places = ["--input", root / name, "--output", root / f"{name}_maxtext"]
        calls[f"convert {name}"] = ["main", "convert", *places, *half]
    for name in CONVERTED:
        calls[name] = ["logits", root / f"{name}_maxtext", root / f"{name}.npz", root / f"{name}_out.npz"]
        calls[f"{name} back"] = ["main", "export", "--input", root / f"{name}_maxtext", "--output", root / f"{name}_hf"]
    for name, wrong in WRONG.items():
        calls[name] = [*calls[name.split()[0]][:3], root / f"{name}.npz", *wrong]
    calls |= training_calls(root)
    calls |= learning_calls(root)
    for width in (16, 8):
        calls[f"16 bits {width}"] = ["call", "tests.maxtext.doctored", "sixteen_bits", width]
    calls["wrong shape"] = ["call", "tests.maxtext.doctored", "change_model", root / "dense_maxtext", root / "doctored"]
    answers = environment.run(root, list(calls.values()))
    (root / "answers").write_text(json.dumps(dict(zip(calls, answers, strict=True))))
    return root


def training_calls(root: Path) -> dict[str, list[object]]:
    checked = {"sparse_run": "sparse", "resumed": "sparse", "plain": "sparse", "padded_run": "padded"}
    checked |= {"taught": "experts"}
    verified = {
        f"verify {run}": ["main", "verify", "--input", root / f"{model}_maxtext", "--checkpoint", root / run]
        for run, model in checked.items()
    }
    arrays: dict[str, list[object]] = {
        f"arrays of {run}": ["call", "tests.maxtext.doctored", "dump", root / run, root / f"{run}.npz"]
        for run in ("sparse_run", "resumed")
    }
    model = ["--input", root / "sparse_maxtext"]
    return {
        "train": training(root, "sparse", "sparse_run", 5),
        "interrupted": training(root, "sparse", "resumed", 3),
        "resumed": training(root, "sparse", "resumed", 5),
        "plain": training(root, "sparse", "plain", 2, "--no-keep-zeros"),
        "padded train": training(root, "padded", "padded_run", 2),
        "taught train": training(root, "experts", "taught", 2, "--teacher", root / "qwen3_moe_maxtext"),
        **verified,
        **arrays,
        "plain goes on": training(root, "sparse", "plain", 3),
        "other sizes": [*training(root, "sparse", "other", 2), "base_mlp_dim=128"],
        "back": ["main", "export", *model, "--checkpoint", root / "sparse_run", "--output", root / "trained"],
        "back plain": ["main", "export", *model, "--checkpoint", root / "plain", "--output", root / "lost"],
    }


def learning_calls(root: Path) -> dict[str, list[object]]:
    data = ["--data", root / "tokens", "--data-cache", root / "cache", "--seq-length", 32, "--global-batch-size", 4]
    schedule = ["--scale-start", 1000, "--temperature-start", 10, "--lr", "1e-3", "--steps", 4, "--save-interval", 2]
    more = [*data, *schedule, "--settings", "dtype=float32", "grain_worker_count=0"]
    dense = ["--input", root / "dense_maxtext"]
    masks = ["--input", root / "dense", "--masks", root / "learned" / "masks.npz", "--output", root / "learned_maxtext"]
    return {
        "learn": ["main", "learn", *dense, "--output", root / "learned", *more],
        "first half": ["call", "tests.maxtext.doctored", "copy_step", root / "learned", root / "again", 2],
        "learn on": ["main", "learn", *dense, "--output", root / "again", *more],
        "learn masked": ["main", "learn", "--input", root / "sparse_maxtext", "--output", root / "none"],
        "learn experts": ["main", "learn", "--input", root / "qwen3_moe_maxtext", "--output", root / "none"],
        "learn 4:4": ["main", "learn", *dense, "--output", root / "none", "--n", 4],
        "learned": ["main", "convert", *masks],
        "start": ["call", "tests.maxtext.gumbel_jax", "start_of_prior", root / "rope_maxtext", root / "prior.npz"],
        "masked": ["call", "tests.maxtext.gumbel_jax", "masked_tree", root / "dense_maxtext", root / "logits.npz",
                   root / "masked.npz"],
    }  # fmt: skip


WRONG = {
    "dense other rope": ["rope_type=llama3.1", "rope_use_scale=False"],
    "rope plain": ["rope_type=default"],
    "rope unscaled": ["rope_use_scale=False"],
}
"""Name of a model and MaxText settings that contradict what was written beside it."""


def said(root: Path, call: str) -> str:
    """What a call answered: a verb's exit status first."""
    return str(json.loads((root / "answers").read_text())[call])


def difference(root: Path, model: str, output: str) -> tuple[float, float]:
    """Largest difference of logits from transformers', and the share of positions with the same best token."""
    wanted, found = np.load(root / f"{model}.npz")["logits"], np.load(root / f"{output}.npz")["logits"]
    return float(np.abs(wanted - found).max()), float((wanted.argmax(-1) == found.argmax(-1)).mean())


@pytest.mark.parametrize("name", CONVERTED)
def test_logits_are_those_of_transformers(root: Path, name: str) -> None:
    largest, agreement = difference(root, name, f"{name}_out")
    assert largest < 1e-4 and agreement == 1.0


@pytest.mark.parametrize("name", WRONG)
def test_another_rotary_embedding_shows(root: Path, name: str) -> None:
    """Controls: MaxText loads what does not belong together without a word."""
    assert difference(root, name.split()[0], name)[0] > 1e-3


@pytest.mark.parametrize("name", [*KINDS, "qwen2", "qwen3", "mixtral", "qwen3_moe", "sparse", "experts"])
def test_the_way_back_is_bit_equal(root: Path, name: str) -> None:
    """Heads as wide as a power of four, or a 16-bit type: the factor 1 / sqrt(D) is undone exactly."""
    assert said(root, f"{name} back").startswith("0 ")
    given, written = (load_file(root / folder / "model.safetensors") for folder in (name, f"{name}_hf"))
    assert given.keys() == written.keys()
    for key, tensor in given.items():
        assert written[key].dtype == tensor.dtype and torch.equal(bits(written[key]), bits(tensor)), key
    files = {file.name for file in (root / name).iterdir()}
    assert {file.name for file in (root / f"{name}_hf").iterdir()} == files and "generation_config.json" in files
    for file in files & {"config.json", "pruning.json"}:
        configs = (json.loads((root / folder / file).read_text()) for folder in (name, f"{name}_hf"))
        assert next(configs) == next(configs), file
    assert ("pruning.json" in files) == (name in {"sparse", "experts"})


@pytest.mark.parametrize(("width", "query"), [(16, "bfloat16"), (8, "float32")])
def test_weights_of_16_bits(root: Path, width: int, query: str) -> None:
    """Half the room, every bit of a model of that type, and zeros that are kept are told from removed ones."""
    assert said(root, f"16 bits {width}") == f"{{'bfloat16'}} {query} 0 True"


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def test_padded_models_come_back_padded(root: Path) -> None:
    wide = HFReader(root / "padded_hf")
    assert wide.model_config.blocks is None and wide.model_config.num_attention_heads == 8
    reference(root / "padded_hf", root / "padded_back.npz")
    assert difference(root, "padded", "padded_back")[0] < 1e-5


def test_masks_are_those_that_were_decided(root: Path) -> None:
    decided = Masks.load(root / "run" / "decision")
    written = PackedMasks(root / "sparse_maxtext" / "masks.npz", HFReader(root / "sparse").model_config)
    assert written.pattern == "2:4" and list(written) and set(written) == set(decided.names())
    assert all(np.array_equal(written[name], decided.get(name).numpy()) for name in written)
    assert not (root / "dense_maxtext" / "masks.npz").exists()


def test_training_keeps_zeros_and_moves_the_rest(root: Path) -> None:
    assert said(root, "train").startswith("0 ") and said(root, "verify sparse_run").startswith("0 ")
    before, after = (load_file(root / folder / "model.safetensors") for folder in ("sparse", "trained"))
    masks = Masks.load(root / "run" / "decision")
    for name in masks.names():
        kept = masks.get(name)
        assert not bits(after[name])[~kept].any() and (after[name][kept] != before[name][kept]).all(), name
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_padding_stays_zero(root: Path) -> None:
    assert said(root, "padded train").startswith("0 ") and said(root, "verify padded_run").startswith("0 ")
    masks = PackedMasks(root / "padded_maxtext" / "masks.npz", HFReader(root / "padded_hf").model_config)
    assert not masks["model.layers.0.self_attn.q_proj.weight"].any()
    assert masks["model.layers.0.mlp.up_proj.weight"].sum() == 48 * 32


def test_zeros_of_experts_stay(root: Path) -> None:
    """2:4 of their matrices and of attention; the teacher has experts, too."""
    assert said(root, "taught train").startswith("0 "), said(root, "taught train")
    masks = Masks.load(root / "experts_run" / "decision")
    assert sum(".experts." in name for name in masks.names()) == 3 * 3 * 8
    zeros = sum(row.size - row.kept for row in masks.summary())
    assert said(root, "verify taught") == f"0 zeros of the masks: {zeros}; of them not +0.0 in the checkpoint: 0\n"


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(root: Path) -> None:
    """Weights, Adam's means and the step."""
    assert said(root, "resumed").startswith("0 ")
    with np.load(root / "sparse_run.npz") as whole, np.load(root / "resumed.npz") as resumed:
        assert len(whole.files) > 30 and whole.files == resumed.files
        assert all(np.array_equal(whole[key], resumed[key]) for key in whole.files)


def test_plain_training_loses_zeros_and_all_notice(root: Path) -> None:
    """Control: the trainer as it is."""
    zeros = sum(row.size - row.kept for row in Masks.load(root / "run" / "decision").summary())
    assert said(root, "verify plain") == f"1 zeros of the masks: {zeros}; of them not +0.0 in the checkpoint: {zeros}\n"
    assert "must stay zero are not zero" in said(root, "back plain") and not (root / "lost").exists()
    assert "contradict the masks" in said(root, "plain goes on")


@pytest.mark.parametrize("call, message", [
    ("convert nemotron", "the model has layers of the nemotron family; MaxText export is for LLaMA, Mistral, Qwen2"),
    ("convert factor", "llama3 rope scaling with factor 32.0, .* MaxText has factor 8, "),
    ("convert lying", "gate_proj.weight in .* config.json asks for [[]96, 32]"),
    ("other sizes", "--settings base_mlp_dim=128: allowed"),
    ("wrong shape", "decoder/layers/mlp/wi_0/kernel in the MaxText checkpoint has shape [[]32, 3, 64]; the model has"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(root: Path, call: str, message: str) -> None:
    assert re.search(message, said(root, call)), said(root, call)
    name = call.removeprefix("convert ")
    assert not list(root.glob(f"{name}_maxtext*")) and not (root / "doctored" / "hf").exists()


def test_learned_masks_are_whole_patterns_and_lower_the_loss(root: Path) -> None:
    assert said(root, "learn").startswith("0 ") and said(root, "learned").startswith("0 ")
    assert json.loads((root / "learned_maxtext" / "pruning.json").read_text())["target"] == "2:4"
    masks = PackedMasks(root / "learned" / "masks.npz", HFReader(root / "dense").model_config)
    assert masks.pattern == "2:4"
    assert all((masks[name].reshape(-1, 4).sum(-1) == 2).all() for name in masks)
    records = [json.loads(line) for line in (root / "learned" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0]["scale"] == 1000.0 and records[-1]["weight_regularization"] == 0.0
    assert all(np.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in records)
    assert records[-1]["max_probability"] > records[0]["max_probability"]


def test_learning_goes_on_where_it_was(root: Path) -> None:
    assert said(root, "learn on").startswith("0 ")
    config = HFReader(root / "dense").model_config
    first, second = (PackedMasks(root / run / "masks.npz", config) for run in ("learned", "again"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    lines = [(root / run / "metrics.jsonl").read_text().splitlines() for run in ("learned", "again")]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    assert losses[1] == losses[0][2:]


def test_masked_weights_are_those_of_pytorch(root: Path) -> None:
    """Of a whole model: names, rows, numbers of linears, keys, schedule."""
    reader, given = HFReader(root / "dense"), np.load(root / "logits.npz")
    found = np.load(root / "masked.npz")
    config = reader.model_config
    done = 2 / 4
    scale, temperature = 100 + done * 400, 4 + done * (0.05 - 4)
    for map in get_family("llama").weights(config):
        if map.prunable:
            weight = convert.merge(map, [reader.read(name) for name in map.hf], config)
            logits = convert.merge(map, [torch.from_numpy(given[name]) for name in map.hf], config).contiguous()
            linear = next(number for number, path in enumerate(LINEARS) if path in map.megatron)
            masked = masked_weight(
                weight.contiguous(), logits, n=2, m=4, scale=scale, temperature=temperature,
                draw=Draw(3, 2, 0, (map.layer or 0) * 4 + linear), position=Position.whole(*logits.shape[:2]),
            )  # fmt: skip
            for name, part in zip(map.hf, convert.split(map, masked, config), strict=True):
                np.testing.assert_allclose(found[name], part.numpy(), atol=2e-5, err_msg=name)


def test_a_start_decodes_to_its_prior(root: Path) -> None:
    assert said(root, "start") == "True"


@pytest.mark.parametrize("call, message", [
    ("learn masked", "has masks, so what they remove is zero: learn masks on the dense model"),
    ("learn experts", "has experts, and learn takes models without"),
    ("learn 4:4", "--n 4 --m 4 given"),
])  # fmt: skip
def test_learning_refuses(root: Path, call: str, message: str) -> None:
    assert message in said(root, call) and not (root / "none").exists()
