"""The Python API: the verbs as functions, and a transformers model in memory pruned as the commands prune it."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_prune as mp
from megatron_prune.api import NAMES, _words, function
from megatron_prune.verbs import VERBS
from tests.chats import VOCABULARY, chat_model, conversations, write_chats
from tests.models import DENSE, TINY_SIZES, byte_tokenizer, tiny_model, words

ROOT = Path(__file__).parents[2]
LENGTH, SAMPLES = 24, 4


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import megatron_prune, sys; print(sorted({'torch', 'transformers', 'megatron', 'yaml'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "[]\n"


def test_every_verb_is_a_function_with_its_options_and_defaults() -> None:
    assert set(NAMES.values()) == set(VERBS) and set(NAMES) < set(mp.__all__) and set(mp.__all__) <= set(dir(mp))
    signature = inspect.signature(mp.prune)
    assert list(signature.parameters)[:4] == ["input", "output", "method", "target"]
    assert signature.parameters["calibration_samples"].default == 128
    assert "sparsity" in (mp.prune.__doc__ or "") and function("prune") is function("prune")


def test_functions_are_not_hidden_by_packages_of_their_names() -> None:
    """A subpackage that is imported becomes an attribute of the package, in place of a function called alike."""
    packages = {path.name.removesuffix(".py") for path in (ROOT / "megatron_prune").iterdir()}
    assert not packages & set(mp.__all__)
    importlib.import_module("megatron_prune.methods")
    for name in NAMES:
        assert callable(getattr(mp, name)) and getattr(mp, name) is function(name)


@pytest.mark.parametrize(
    ("target", "text"),
    [({"n": 1, "m": 4}, "1:4"), ({"sparsity": 0.5}, "0.5"), (0.25, "0.25"), ({"num_layers": 3}, "num_layers=3")],
)
def test_targets_are_mappings_too(target: Any, text: str) -> None:
    assert _words({"target": target}) == [f"--target={text}"]


def test_lists_are_values_and_never_flags() -> None:
    assert _words({"data": [(0.7, "a"), (0.3, Path("b"))], "resume": True}) == [
        *("--data", "0.7", "a", "0.3", "b"),
        "--resume=true",
    ]
    for wrong in ("--resume", "-h", None, {"a": 1}):
        with pytest.raises(mp.UserError, match="data: .* given in a list"):
            _words({"data": [wrong]})


def test_outputs_are_held_as_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(mp.UserError, match="names no new file or folder"):
        mp.trim(tmp_path, "/")


def test_the_stub_is_up_to_date() -> None:
    """Also for type checkers: written by the tool from the same options."""
    subprocess.run([sys.executable, str(ROOT / "tools" / "api_stub.py"), "--check"], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("a", "b", "wanda"), {}, "missing: --target"),
        (("a", "b", "wanda", "2:4"), {"calibrtion": "x"}, "did you mean --calibration"),
        (("a", "b", "wanda", "2:4"), {"calibration_samples": 0}, "at least 1"),
        (("a", "b", "wanda", "2:4"), {"target": "1:4"}, "target was given twice"),
        (("a", "b", "wanda", "2:4", "c"), {}, "5 values without a name"),
        (("a", "b", "sparsegpt", "2:4"), {"percdamp": "much"}, "--percdamp"),
    ],
)
def test_mistakes_are_user_errors(args: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(mp.UserError, match=message):
        mp.prune(*args, **options)


def test_the_road_in_python(tmp_path: Path) -> None:
    """import, prune, trim, export, evaluate and verify, their results on disk."""
    hf = byte_tokenizer(tiny_model(tmp_path / "hf", "llama", vocab_size=260))
    text = words(tmp_path / "text.jsonl")
    mp.import_(str(hf), tmp_path / "ck")
    mp.prune(
        tmp_path / "ck",
        tmp_path / "run",
        method="sparsegpt",
        target="2:4",
        calibration=[text],
        calibration_samples=SAMPLES,
        calibration_seq_length=LENGTH,
        percdamp=0.02,
    )
    decision = json.loads((tmp_path / "run" / "decision" / "decision.json").read_text())
    assert decision["hyperparameters"]["percdamp"] == 0.02
    assert mp.trim(tmp_path / "run", tmp_path / "small") == tmp_path / "small"
    mp.export(tmp_path / "small", tmp_path / "out")
    found = mp.evaluate(str(tmp_path / "out"), text=text, window=LENGTH, windows=4, output=tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == found and found["perplexity"] > 1
    assert mp.verify(tmp_path / "out", target="2:4")["pattern"]["holds"]
    with pytest.raises(mp.UserError, match="already exists"):
        mp.trim(tmp_path / "run", tmp_path / "small")


LAYERS = {"protected_first": 0, "protected_last": 0}


def calibration(folder: Path, hf: Path) -> dict[str, Any]:
    """Text for `prune`, and a tokenizer for the model."""
    byte_tokenizer(hf)
    text = words(folder / "text.jsonl")
    return {"calibration": [text], "calibration_samples": SAMPLES, "calibration_seq_length": LENGTH}


MASKS = [("magnitude", "0.5"), ("wanda", "2:4"), ("sparsegpt", "2:4")]
UNITS = [("minitron", {"ffn_hidden_size": 40}), ("shortgpt", "num_layers=1")]


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize(("method", "target"), [*MASKS, *UNITS])
def test_a_model_in_memory_is_pruned_as_by_the_commands(
    tmp_path: Path, family: str, method: str, target: str | dict[str, int]
) -> None:
    """The same text, the same logits; types, device and mode stay; the given model is not touched."""
    hf = byte_tokenizer(tiny_model(tmp_path / "hf", family, vocab_size=260))
    text = words(tmp_path / "text.jsonl")
    calibrated: dict[str, Any] = {"calibration_samples": SAMPLES, "calibration_seq_length": LENGTH}
    given = {} if method == "magnitude" else {"calibration": [text], **calibrated}
    mp.prune(hf, tmp_path / "run", method=method, target=target, **given)
    assert mp.trim(tmp_path / "run", tmp_path / "small") == tmp_path / "small"
    mp.export(tmp_path / "small", tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    pruned = mp.prune_model(
        model, AutoTokenizer.from_pretrained(hf), method=method, target=target, texts=documents, **calibrated
    )
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert type(pruned) is type(model) and pruned.training == model.training
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % 257
    with torch.no_grad():
        assert pruned(ids).logits.equal(expected(ids).logits)
        assert not pruned(ids).logits.equal(model(ids).logits)


@pytest.mark.parametrize("named", [True, False])
def test_conversations_calibrate_as_by_the_command(tmp_path: Path, named: bool) -> None:
    """The same rows, the same logits; the tokenizer that was given stays as it was."""
    hf, chats = chat_model(tmp_path / "hf"), conversations()
    rows = write_chats(tmp_path / "chats.jsonl")
    sizes: dict[str, Any] = {"calibration_samples": SAMPLES, "calibration_seq_length": LENGTH}
    mp.prune(hf, tmp_path / "run", method="wanda", target="2:4", calibration=[rows], apply_chat_template=True, **sizes)
    mp.trim(tmp_path / "run", tmp_path / "small")
    mp.export(tmp_path / "small", tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32), AutoTokenizer.from_pretrained(hf)
    if named:
        tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "none"}
    given = Dataset.from_list([{"messages": messages} for messages in chats])["messages"] if named else chats
    pruned = mp.prune_model(model, tokenizer, method="wanda", target="2:4", messages=given, **sizes)
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY
    with torch.no_grad():
        assert pruned(ids).logits.equal(expected(ids).logits)
    assert not hasattr(tokenizer, "conversations")


CHATS = [[{"role": "user", "content": "Hi"}]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": CHATS, "texts": ["Hi"]}, "texts and messages were given; allowed: one of them"),
        ({"messages": CHATS[0]}, "looks at text; give tokenizer= .* or messages="),
        ({"messages": 3}, "looks at text; give tokenizer= .* or messages="),
        ({"messages": [*CHATS, ["Hi"]]}, r"messages\[1\]: no message but 'Hi'"),
        ({"messages": [[{"role": "pirate", "content": "Arr"}]]}, "begins 'Arr': the chat template of .*no pirate"),
        ({"messages": CHATS, "template": None}, "the tokenizer has no chat template"),
        ({"messages": CHATS, "template": "{% for x"}, r"the chat template is no jinja .*; give texts="),
    ],
)
def test_conversations_that_are_none_are_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    given = dict(given)
    hf = chat_model(tmp_path / "hf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hf), AutoTokenizer.from_pretrained(hf)
    if "template" in given:
        tokenizer.chat_template = given.pop("template")
    with pytest.raises(mp.UserError, match=message):
        mp.prune_model(model, tokenizer, method="wanda", target="2:4", calibration_seq_length=8, **given)


EXPERTS = sorted(TINY_SIZES.keys() - set(DENSE))


MERGED = [family for family in EXPERTS if TINY_SIZES[family].get("n_group", 1) == 1]
"""Those that can do with three experts."""


@pytest.mark.parametrize(
    ("method", "target", "family"),
    [*(("wanda", "2:4", family) for family in EXPERTS), *(("ream", "num_moe_experts=3", family) for family in MERGED)],
)
def test_experts_in_memory_are_pruned_as_by_the_commands(tmp_path: Path, method: str, target: str, family: str) -> None:
    """Also those of which transformers has all of a layer in one parameter."""
    test_a_model_in_memory_is_pruned_as_by_the_commands(tmp_path, family, method, target)


def test_a_smaller_bfloat16_model_is_the_one_that_the_commands_make(tmp_path: Path) -> None:
    """Its rotary frequencies stay in float32, whatever the weights are; so do the caller's random numbers."""
    hf = tiny_model(tmp_path / "hf", "llama", dtype=torch.bfloat16, vocab_size=260)
    mp.prune(hf, tmp_path / "run", method="llm_pruner", target={"num_layers": 1}, **LAYERS, **calibration(tmp_path, hf))
    assert mp.trim(tmp_path / "run", tmp_path / "small") == tmp_path / "small"
    mp.export(tmp_path / "small", tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(hf, attn_implementation="eager")
    torch.manual_seed(7)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    documents = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    pruned = mp.prune_model(
        model,
        AutoTokenizer.from_pretrained(hf),
        method="llm_pruner",
        target="num_layers=1",
        texts=documents,
        calibration_samples=SAMPLES,
        calibration_seq_length=LENGTH,
        **LAYERS,
    )
    assert torch.rand(3).equal(drawn)
    ids = torch.arange(400)[None] % 128
    with torch.no_grad():
        assert pruned(ids).logits.equal(expected(ids).logits)
    assert pruned.config._attn_implementation == "eager" and pruned.dtype == torch.bfloat16


def test_in_place_changes_the_model_itself(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "hf", "llama"), dtype=torch.float32)
    assert mp.prune_model(model, method="magnitude", target="2:4", in_place=True) is model
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert (weight.unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()
    assert not torch.signbit(weight[weight == 0]).any()


def test_models_that_cannot_be_pruned_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "hf", "llama"), dtype=torch.float32)
    given = {
        "has no model.embed_tokens.weight": model.model,
        "of type float64": copy.deepcopy(model).double(),
        "without memory": copy.deepcopy(model).to("meta"),
    }
    for message, wrong in given.items():
        with pytest.raises(mp.UserError, match=message):
            mp.prune_model(wrong, method="magnitude", target="2:4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "maskllm", "target": "2:4"}, "takes hours"),
        ({"method": "wanda", "target": "2:4"}, "give tokenizer= .* and texts="),
        ({"method": "wanda", "target": "num_layers=1"}, "cannot prune to"),
        ({"method": "magnitude", "target": "2:3"}, "not a multiple of 3|multiple"),
        ({"method": "magnitude", "target": "2:4", "percdamp": 1}, "has no hyper-parameter"),
        ({"method": 3, "target": "2:4"}, "method: 3 given; allowed: text"),
        ({"method": "magnitude", "target": 2}, "put quotes|not understood"),
        ({"method": "magnitude", "target": "2:4", "in_place": "no"}, "in_place: 'no' given; allowed: true or false"),
        ({"method": "sparsegpt", "target": "2:4", "percdamp": "0.1"}, "sparsegpt: percdamp: '0.1' given.*a number"),
        ({"method": "sparsegpt", "target": "2:4", "percdamp": True}, "percdamp: True given; allowed: a number"),
        ({"method": "sparsegpt", "target": "2:4", "block_size": 1.5}, "block_size: 1.5 given; allowed: a whole number"),
        ({"method": "wanda", "target": "2:4", "calibration_samples": "8"}, "calibration_samples: '8' given"),
        ({"method": "wanda", "target": "2:4", "calibration_seed": None}, "calibration_seed: None given"),
        ({"method": "wanda", "target": "2:4", "texts": [1, 2], "tokenizer": str}, "a list of strings"),
        ({"method": "wanda", "target": "2:4", "texts": ["a"], "tokenizer": "gpt2"}, "give tokenizer="),
    ],
)
def test_what_cannot_be_done_in_memory_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "hf", "llama"), dtype=torch.float32)
    with pytest.raises(mp.UserError, match=message):
        mp.prune_model(model, **options)
    with pytest.raises(mp.UserError, match="allowed: a language model of transformers"):
        mp.prune_model("gpt2", method="magnitude", target="2:4")  # type: ignore[arg-type]
