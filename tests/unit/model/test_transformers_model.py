"""Models of others as transformers computes them: the same logits, of config.json nothing but what a model needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.exporting.padding import in_transformers
from megatron_prune.model.convert import HFReader
from megatron_prune.model.transformers_model import settings, transformers_config
from tests.models import TINY_SIZES, edit_config, tiny_model

TOKENS = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def _from_pretrained(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TINY_SIZES)
def test_logits_are_those_of_transformers_itself(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "hf", family)
    ours, theirs = in_transformers(HFReader(path), dtype), _from_pretrained(path, dtype)
    assert torch.equal(_logits(ours), _logits(theirs))
    assert {name: (p.dtype, p.shape) for name, p in ours.named_parameters()} == {
        name: (p.dtype, p.shape) for name, p in theirs.named_parameters()
    }


HOSTILE: dict[str, Any] = {
    "attn_implementation": "evil/kernel",
    "_attn_implementation": "evil/kernel",
    "_attn_implementation_internal": "evil/kernel",
    "experts_implementation": "evil/kernel",
    "_experts_implementation": "evil/kernel",
    "auto_map": {"AutoConfig": "evil--modeling.Config", "AutoModelForCausalLM": "modeling.Model"},
    "architectures": ["os.system"],
    "_name_or_path": "evil/model",
    "name_or_path": "evil/model",
    "transformers_version": "99.0.0",
    "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}},
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "evil/kernel"},
    "torchscript": True,
    "base_model_tp_plan": {"layers.*": "evil"},
    "tie_encoder_decoder": 5,
    "sub_configs": {"a": "b"},
    "id2label": {"0": 5},
    "problem_type": "evil",
    "__class__": "evil",
    "pruned_heads": {"0": [0, 1]},
    "torch_dtype_of_activations": "evil",
}


@pytest.mark.parametrize("family", TINY_SIZES)
def test_keys_that_decide_what_is_loaded_are_not_handed_on(family: str, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "hf", family)
    honest = _logits(in_transformers(HFReader(path), torch.float32))
    edit_config(path, **HOSTILE)
    (path / "modeling.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    reader = HFReader(path)
    assert not set(HOSTILE) & set(settings(reader.model_config))
    assert "evil" not in transformers_config(reader.model_config).to_json_string()
    model = in_transformers(reader, torch.float32)
    assert model.config._attn_implementation == ("eager" if family == "gpt_oss" else "sdpa")
    assert torch.equal(_logits(model), honest)
    assert not (tmp_path / "ran").exists()


def test_what_lies_beside_the_weights_does_not_count(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "hf", "llama")
    honest = _logits(in_transformers(HFReader(path), torch.float32))
    (path / "generation_config.json").write_text("[" * 10_000)
    (path / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(S'" + str(tmp_path / "ran").encode() + b"'\ntR.")
    assert torch.equal(_logits(in_transformers(HFReader(path), torch.float32)), honest)
    assert not (tmp_path / "ran").exists()


def test_nothing_is_told_but_the_result(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from megatron_prune.__main__ import main
    from tests.models import byte_tokenizer, tiny_llama, words

    byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    edit_config(tmp_path / "hf", attn_implementation="evil/kernel")
    text = words(tmp_path / "text.jsonl")
    capfd.readouterr()
    assert main(["evaluate", "--input", str(tmp_path / "hf"), "--text", str(text), "--window", "64"]) == 0
    assert capfd.readouterr().err == ""


def test_no_folder_of_the_compiler_stays(tmp_path: Path) -> None:
    """In a process of its own: a library is imported once."""
    path = tiny_model(tmp_path / "hf", "llama")
    (tmp_path / "tmp").mkdir()
    code = "import sys, torch; from pathlib import Path; "
    code += "from megatron_prune.exporting.padding import in_transformers as f; "
    code += "from megatron_prune.model.convert import HFReader as R; f(R(Path(sys.argv[1])), torch.float32); "
    code += "assert 'torch._dynamo.package' in sys.modules"
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=True)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_file_as_published_is_kept(tmp_path: Path) -> None:
    """What is not handed on is not lost: it stands in the export."""
    path = tiny_model(tmp_path / "hf", "llama")
    edit_config(path, architectures=["LlamaForCausalLM"], note="mine")
    assert HFReader(path).model_config.hf_config["note"] == "mine"
    assert json.loads((path / "config.json").read_text())["note"] == "mine"
