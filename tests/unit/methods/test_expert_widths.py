"""Minitron on models with experts: what stays against activations of transformers' own model, and what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.decision.trimming import Trim
from megatron_prune.model import cost
from megatron_prune.model.checkpoint import read_description
from tests.models import byte_tokenizer, tiny_model, words
from tests.unit.methods.test_experts import LENGTH, SAMPLES, prune, routed

FAMILIES: dict[str, dict[str, Any]] = {"qwen3_moe": {}, "mixtral": {}, "glm4_moe": {}, "qwen2_moe": {}}
PLAIN = ("--refit", "none", "--norm-gain", "false")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of every kind of family."""
    root = tmp_path_factory.mktemp("widths")
    words(root / "words.jsonl", documents=8)
    for family, sizes in FAMILIES.items():
        byte_tokenizer(tiny_model(root / f"{family}_hf", family, vocab_size=257, **sizes))
        assert main(["import", "--input", str(root / f"{family}_hf"), "--output", str(root / family)]) == 0
    return root


def tokens_of(root: Path, family: str) -> Tensor:
    """The calibration windows."""
    from megatron_prune.data.calibration import windows
    from megatron_prune.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(root / family / "tokenizer", 257)
    return windows([root / "words.jsonl"], tokenizer, SAMPLES, LENGTH, 0).tokens


def by_window(directory: Path, tokens: Tensor) -> list[dict[int, dict[int, Tensor]]]:
    """By layer and expert: what enters the down projection, window by window, `[tokens sent there, neurons]`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    seen: list[Any] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_hook(lambda module, inputs, _: seen.append((module, *inputs)))
    with torch.no_grad():
        model(tokens)
    found = []
    for module, hidden, chosen, _gates in seen:
        layer = {}
        for expert in range(len(module.gate_up_proj)):
            token = (chosen == expert).nonzero(as_tuple=True)[0]
            gate, up = (hidden[token] @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            inner = F.silu(gate) * up
            layer[expert] = {int(n): inner[token // LENGTH == n] for n in (token // LENGTH).unique()}
        found.append(layer)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_an_experts_neurons_are_ranked_by_its_own_tokens(root: Path, tmp_path: Path, family: str) -> None:
    """The root over windows of the squared means of |x|; each expert chooses its own."""
    assert prune(root, family, "minitron", "moe_ffn_hidden_size=12", tmp_path / "run", *PLAIN) == 0
    kept = Trim.load(tmp_path / "run" / "decision").units
    expected = by_window(root / f"{family}_hf", tokens_of(root, family))
    sparse = [block for block in kept.blocks if block.experts]
    assert len(sparse) == len(expected) == (2 if family == "glm4_moe" else len(kept.blocks))
    for block, layer in zip(sparse, expected, strict=True):
        for expert, neurons in zip(block.experts, block.expert_ffn, strict=True):
            if layer[expert]:
                score = sum(x.abs().mean(0).double().square() for x in layer[expert].values()).sqrt()
                assert neurons == tuple(sorted(score.topk(12).indices.tolist())), expert
        assert len(set(block.expert_ffn)) > 1


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_channels_are_ranked_by_what_both_norms_of_every_layer_give(root: Path, tmp_path: Path, family: str) -> None:
    """In layers with experts too, where the second goes to the router and to all of them: every token counts once."""
    from transformers import AutoModelForCausalLM

    assert prune(root, family, "minitron", "hidden_size=24", tmp_path / "run", *PLAIN) == 0
    model = AutoModelForCausalLM.from_pretrained(root / f"{family}_hf", dtype=torch.float32).eval()
    seen: list[Tensor] = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        model(tokens_of(root, family))
    score = sum(x.abs().mean(1).double().square().sum(0).sqrt() for x in seen)
    assert len(seen) == 2 * len(model.model.layers)
    assert Trim.load(tmp_path / "run" / "decision").units.hidden == tuple(sorted(score.topk(24).indices.tolist()))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_computes_what_the_whole_model_does_with_the_rest_at_zero(
    root: Path, tmp_path: Path, family: str
) -> None:
    from transformers import AutoModelForCausalLM

    target = "moe_ffn_hidden_size=12"
    target += ",moe_shared_expert_intermediate_size=20" if family == "qwen2_moe" else ""
    target += ",ffn_hidden_size=40,num_moe_experts=4" if family == "glm4_moe" else ""
    assert prune(root, family, "minitron", target, tmp_path / "run", *PLAIN) == 0
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "cut")]) == 0
    assert main(["export", "--input", str(tmp_path / "cut"), "--output", str(tmp_path / "hf")]) == 0
    assert main(["verify", "--input", str(tmp_path / "cut"), "--against", str(tmp_path / "hf")]) == 0
    units = Trim.load(tmp_path / "run" / "decision").units
    model = AutoModelForCausalLM.from_pretrained(root / f"{family}_hf", dtype=torch.float32).eval()
    with torch.no_grad():
        for block, layer in zip(units.blocks, model.model.layers, strict=True):
            if not block.experts:
                _zero_others(layer.mlp.down_proj.weight, block.ffn)
                continue
            for expert, neurons in zip(block.experts, block.expert_ffn, strict=True):
                _zero_others(layer.mlp.experts.down_proj[expert], neurons)
            gone = [n for n in range(len(layer.mlp.experts.down_proj)) if n not in block.experts]
            assert len(gone) == (4 if family == "glm4_moe" else 0)
            if gone:  # chosen by a bias that gates do not have
                layer.mlp.gate.e_score_correction_bias[gone] = -1e9
            shared = getattr(layer.mlp, "shared_expert", getattr(layer.mlp, "shared_experts", None))
            if shared is not None:
                _zero_others(shared.down_proj.weight, block.shared_ffn)
        tokens = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(1))
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()(tokens).logits
        assert torch.allclose(found, model(tokens).logits, atol=1e-5)


def _zero_others(weight: Tensor, kept: tuple[int, ...]) -> None:
    others = torch.ones(weight.shape[1], dtype=torch.bool)
    others[list(kept)] = False
    assert others.any() and not others.all()
    weight[:, others] = 0.0


def test_experts_are_fitted_to_what_they_gave(root: Path, tmp_path: Path) -> None:
    """Least squares on each expert's own tokens, against a solver of its own."""
    options = ("--refit", "local", "--refit-damping", "1e-9")
    assert prune(root, "mixtral", "minitron", "moe_ffn_hidden_size=12", tmp_path / "run", *options) == 0
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "cut")]) == 0
    assert main(["export", "--input", str(tmp_path / "cut"), "--output", str(tmp_path / "hf")]) == 0
    units, weights = Trim.load(tmp_path / "run" / "decision").units, load_file(tmp_path / "hf" / "model.safetensors")
    whole = load_file(root / "mixtral_hf" / "model.safetensors")
    layers = routed(root / "mixtral_hf", tokens_of(root, "mixtral"))
    for layer, (block, seen) in enumerate(zip(units.blocks, layers, strict=True)):
        for expert in block.experts:
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"
            kept = list(block.expert_ffn[expert])
            _inputs, inner, _gates, outputs = (x.double() for x in seen[expert])
            assert len(inner) > len(kept)
            fitted = torch.linalg.lstsq(inner[:, kept], outputs).solution.T
            before = inner[:, kept] @ whole[name].double()[:, kept].T
            errors = [(x - outputs).norm() for x in (inner[:, kept] @ weights[name].double().T, before)]
            assert torch.allclose(weights[name].double(), fitted, atol=2e-4)
            assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("refit", ["none", "local", "propagated"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_all_widths_together(root: Path, tmp_path: Path, family: str, refit: str) -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_query_groups": 1, "moe_ffn_hidden_size": 12}
    sizes |= {"num_moe_experts": 3, "num_layers": 1}
    target = ",".join(f"{key}={value}" for key, value in sizes.items())
    assert prune(root, family, "minitron", target, tmp_path / "run", "--refit", refit) == 0
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "cut")]) == 0
    config = read_description(tmp_path / "cut").config
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert main(["export", "--input", str(tmp_path / "cut"), "--output", str(tmp_path / "hf")]) == 0
    assert main(["verify", "--input", str(tmp_path / "cut"), "--against", str(tmp_path / "hf")]) == 0


@pytest.mark.parametrize(("method", "measure"), [("reap", "parameters"), ("minitron", "active_parameters")])
def test_a_budget_is_used_and_kept(root: Path, tmp_path: Path, method: str, measure: str) -> None:
    whole = cost.cost(read_description(root / "qwen3_moe").config, measure)
    limit = int(0.75 * whole)
    assert prune(root, "qwen3_moe", method, f"{measure}={limit}", tmp_path / "run") == 0
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "cut")]) == 0
    config = read_description(tmp_path / "cut").config
    assert 0.8 * limit < cost.cost(config, measure) <= limit
    if method == "reap":
        more = config.num_moe_experts or 0
        assert 3 <= more < 8 and config.moe_ffn_hidden_size == 24


REFUSED = {
    "no dense layer": ("qwen3_moe", "ffn_hidden_size=16", "every layer of the model has experts"),
    "no shared experts": ("qwen3_moe", "moe_shared_expert_intermediate_size=8", "has none"),
    "counted shared experts": ("glm4_moe", "moe_shared_expert_intermediate_size=8", "counts its shared experts"),
    "wider than it is": ("qwen3_moe", "moe_ffn_hidden_size=25", "the model has 24"),
    "too little": ("qwen3_moe", "parameters=100", "no shape with at least"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(root: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, target, expected = REFUSED[case]
    assert prune(root, family, "minitron", target, tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line and not (tmp_path / "run").exists()


def test_too_small_a_budget_for_whole_experts(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(root, "qwen3_moe", "reap", "parameters=100", tmp_path / "run") == 2
    assert "with 3 experts in a layer, which routing needs" in capsys.readouterr().err
