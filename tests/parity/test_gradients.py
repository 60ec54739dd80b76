"""Gradients of all weights, biases and norms against transformers', in fp32: what each family does with its replicated
and sharded parameters under tensor, sequence and pipeline parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.gradients import RandomWindows
from tests.distributed.launch import EP2, EP2_TP2_SP, PP2, TP2, TP2_SP, TP2_SP_ETP1, Layout, launch, must_pass
from tests.models import byte_tokenizer, tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = 1e-5
"""Of the largest gradient of a tensor."""
CASES = [
    ("qwen2", TP2_SP),
    ("qwen3", TP2),
    ("qwen3", TP2_SP),
    ("nemotron", TP2_SP),
    ("gpt2", TP2),
    ("gpt2", TP2_SP),
    ("gpt2", PP2),
    ("qwen3_moe", EP2),
    ("qwen3_moe", EP2_TP2_SP),
    ("qwen2_moe", EP2),
    ("glm4_moe", EP2_TP2_SP),
    ("olmoe", TP2_SP),
    ("mixtral", TP2_SP),
    ("gpt_oss", EP2),
    ("gpt_oss", EP2_TP2_SP),
    ("gpt_oss", TP2_SP_ETP1),
    ("gpt_oss", PP2),
    ("gemma3_text", TP2),
    ("gemma3_text", TP2_SP),
    ("gemma3_text", PP2),
    ("deepseek_v3", EP2),
    ("deepseek_v3", EP2_TP2_SP),
    ("deepseek_v2", TP2_SP),
]

EVERY = {
    "glm4_moe": {"num_experts_per_tok": 6},
    "deepseek_v3": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 6},
}
"""So that each expert has some tokens."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model imported, and its gradients in every layout."""
    root = tmp_path_factory.mktemp("gradients")
    commands = []
    for model_type in dict(CASES):
        every = EVERY.get(model_type, {})
        byte_tokenizer(tiny_model(root / f"{model_type}_hf", model_type, vocab_size=257, **every))
        commands.append(["import", "--input", str(root / f"{model_type}_hf"), "--output", str(root / model_type)])
    for model_type, layout in CASES:
        parallel = [str(layout.tensor), str(layout.pipeline), str(layout.sequence_parallel)]
        parallel += [str(layout.expert), str(layout.expert_tensor)] if layout.expert_tensor else [str(layout.expert)]
        output = root / f"{model_type}_{layout.name}.safetensors"
        commands.append(["gradients", str(root / model_type), str(output), *parallel])
    must_pass(launch(2, commands, root / "commands"))
    return root


def reference(directory: Path) -> dict[str, Tensor]:
    """Gradients of the same loss in transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = RandomWindows(model.config.vocab_size).tokens
    logits = model(tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    alternating = model.config.model_type == "gpt_oss"
    gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return dict(each for name, gradient in gradients for each in of_experts(name, gradient, alternating))


def of_experts(name: str, gradient: Tensor, alternating: bool) -> Iterator[tuple[str, Tensor]]:
    """A gradient by the names of the experts' own weights; `alternating`: `[in, out]`, with gate and up as gpt-oss has
    them.
    """
    start, _, field = name.rpartition(".")
    if not start.endswith("mlp.experts"):
        yield name, gradient
        return
    what, pair = "bias" if field.endswith("_bias") else "weight", field.startswith("gate_up_proj")
    kinds = ("gate_proj", "up_proj") if pair else ("down_proj",)
    for number, of_one in enumerate(gradient):
        if alternating:
            parts = [of_one[..., half::2].t() for half in (0, 1)] if pair else [of_one.t()]
        else:
            parts = list(of_one.chunk(2)) if pair else [of_one]
        yield from ((f"{start}.{number}.{kind}.{what}", part) for kind, part in zip(kinds, parts, strict=True))


@pytest.mark.parametrize(("model_type", "layout"), CASES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_gradients_equal_transformers(root: Path, model_type: str, layout: Layout) -> None:
    from safetensors.torch import load_file

    expected = reference(root / f"{model_type}_hf")
    found = load_file(root / f"{model_type}_{layout.name}.safetensors")
    if model_type == "mixtral":
        names = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj.", ".block_sparse_moe.": ".mlp."}
        for old, new in names.items():
            found = {name.replace(old, new): gradient for name, gradient in found.items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, f"{name} has no gradient to compare"
        assert (found[name] - gradient).abs().max() <= TOLERANCE * gradient.abs().max(), name
