"""Scores of experts and of their weights against transformers' own model, hooked; and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import megatron_prune.backend as backend
from megatron_prune.__main__ import main
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.trimming import Trim
from megatron_prune.methods.reap import reap_score
from megatron_prune.model.checkpoint import load_model
from megatron_prune.model.convert import HFReader
from megatron_prune.statistics.passes import Passes
from tests.models import byte_tokenizer, tiny_model, words

LENGTH, SAMPLES = 32, 5
FAMILIES = {"qwen3_moe": {}, "olmoe": {}, "mixtral": {}, "qwen2_moe": {"norm_topk_prob": False}}
FAMILIES |= {"glm4_moe": {"routed_scaling_factor": 1.0}, "gpt_oss": {}}
FAMILIES |= {"deepseek_v3": {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}}
FAMILIES |= {"deepseek_v2": {"routed_scaling_factor": 1.0}}
FIRST_IS_DENSE = ("glm4_moe", "deepseek_v3", "deepseek_v2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of every family that has experts."""
    root = tmp_path_factory.mktemp("experts")
    words(root / "words.jsonl", documents=8)
    groups = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    models = {name: (name, sizes) for name, sizes in FAMILIES.items()} | {"grouped": ("glm4_moe", groups)}
    for family, (kind, sizes) in models.items():
        byte_tokenizer(tiny_model(root / f"{family}_hf", kind, vocab_size=257, **sizes))
        assert main(["import", "--input", str(root / f"{family}_hf"), "--output", str(root / family)]) == 0
    return root


def prune(root: Path, family: str, method: str, target: str, output: Path, *options: str) -> int:
    """The verb on the calibration text."""
    text = ["--calibration", str(root / "words.jsonl"), "--calibration-samples", str(SAMPLES)]
    inputs = ["--input", str(root / family), "--output", str(output), "--method", method, "--target", target]
    return main(["prune", *inputs, *text, "--calibration-seq-length", str(LENGTH), *options])


def routed(directory: Path, tokens: Tensor) -> list[dict[int, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """By layer and expert: inputs, inputs of the down projection, gates and outputs of the tokens that are sent there.

    From transformers' own hidden states and routing, one expert at a time.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    seen: list[Any] = []
    handles = [
        layer.mlp.experts.register_forward_hook(lambda module, inputs, _output: seen.append((module, *inputs)))
        for layer in model.model.layers
        if hasattr(layer.mlp, "experts")
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    found = []
    for module, hidden, chosen, gates in seen:
        layer = {}
        for expert in range(len(module.gate_up_proj)):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            layer[expert] = (hidden[token], *through(module, expert, hidden[token], gates[token, place]))
        found.append(layer)
    return found


def through(module: Any, expert: int, x: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of an expert's down projection, the gates, and its outputs."""
    if hasattr(module, "gate_up_proj_bias"):  # gpt-oss
        both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = both[:, ::2].clamp(max=module.limit), both[:, 1::2].clamp(-module.limit, module.limit)
        inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        return inner, gates, inner @ module.down_proj[expert] + module.down_proj_bias[expert]
    gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
    inner = F.silu(gate) * up
    return inner, gates, inner @ module.down_proj[expert].T


def calibration(seed: int = 0) -> Tensor:
    """Some windows."""
    return torch.randint(0, 257, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_activity_is_that_of_transformers_experts(root: Path, family: str) -> None:
    tokens = calibration()
    expected = routed(root / f"{family}_hf", tokens)
    with backend.running(backend.Layout()):
        found = Passes(load_model(root / family, backend.Layout()), tokens).expert_activity()
    assert [activity is None for activity in found] == [family in FIRST_IS_DENSE and n == 0 for n in range(len(found))]
    for activity, layer in zip([each for each in found if each is not None], expected, strict=True):
        for expert, (_inputs, _inner, gates, outputs) in layer.items():
            norms = outputs.norm(dim=-1)
            assert int(activity.tokens[expert]) == len(gates)
            mean = float((gates * norms).mean()) if len(gates) else 0.0
            assert float(reap_score(activity)[expert]) == pytest.approx(mean, rel=1e-5)
            assert float(activity.norms[expert]) == pytest.approx(float(norms.sum()), rel=1e-5)
            assert float(activity.gates[expert]) == pytest.approx(float(gates.sum()), rel=1e-5)
        total = sum(float(gates.sum()) for _, _, gates, _ in layer.values())
        renormalised = family in ("qwen3_moe", "mixtral", "glm4_moe", "gpt_oss", "deepseek_v3")
        assert (total == pytest.approx(SAMPLES * LENGTH, rel=1e-5)) == renormalised


def test_reap_keeps_the_highest_means_and_not_the_highest_sums(root: Path, tmp_path: Path) -> None:
    from megatron_prune.data.calibration import windows
    from megatron_prune.data.tokenizer import load_tokenizer

    assert prune(root, "qwen3_moe", "reap", "num_moe_experts=5", tmp_path / "run") == 0
    kept = Trim.load(tmp_path / "run" / "decision").units
    tokenizer = load_tokenizer(root / "qwen3_moe" / "tokenizer", 257)
    tokens = windows([root / "words.jsonl"], tokenizer, SAMPLES, LENGTH, 0).tokens
    for block, layer in zip(kept.blocks, routed(root / "qwen3_moe_hf", tokens), strict=True):
        sums = {expert: float((gates * out.norm(dim=-1)).sum()) for expert, (_, _, gates, out) in layer.items()}
        means = {expert: sums[expert] / max(1, len(layer[expert][2])) for expert in layer}
        assert block.experts == tuple(sorted(sorted(means, key=means.__getitem__)[-5:]))


def test_groups_of_experts_keep_equally_many(root: Path, tmp_path: Path) -> None:
    """Of the highest means in each of two groups of four; what stays is the model without the others."""
    from transformers import AutoModelForCausalLM

    from megatron_prune.data.calibration import windows
    from megatron_prune.data.tokenizer import load_tokenizer

    sizes = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    byte_tokenizer(tiny_model(tmp_path / "two_hf", "deepseek_v3", vocab_size=257, **sizes))
    shutil.copy(root / "words.jsonl", tmp_path / "words.jsonl")
    assert main(["import", "--input", str(tmp_path / "two_hf"), "--output", str(tmp_path / "two")]) == 0
    assert prune(tmp_path, "two", "reap", "num_moe_experts=4", tmp_path / "run") == 0
    kept = Trim.load(tmp_path / "run" / "decision").units
    tokens = windows(
        [tmp_path / "words.jsonl"], load_tokenizer(tmp_path / "two" / "tokenizer", 257), SAMPLES, LENGTH, 0
    ).tokens
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two_hf", dtype=torch.float32).eval()
    both_lowest = []
    for number, layer in enumerate(routed(tmp_path / "two_hf", tokens), start=1):
        sums = {n: float((gates * out.norm(dim=-1)).sum()) for n, (_, _, gates, out) in layer.items()}
        mean = {n: total / max(1, len(layer[n][2])) for n, total in sums.items()}
        gone = [n for group in (range(4), range(4, 8)) for n in sorted(group, key=mean.__getitem__)[:2]]
        assert kept.blocks[number].experts == tuple(n for n in range(8) if n not in gone)
        both_lowest.append(set(gone) == set(sorted(mean, key=mean.__getitem__)[:4]))
        model.model.layers[number].mlp.gate.e_score_correction_bias[gone] = -1e9
    assert not all(both_lowest), "the test could not tell groups from none"
    for verb in (["trim", "--input", "run", "--output", "cut"], ["export", "--input", "cut", "--output", "cut_hf"]):
        assert main([str(tmp_path / word) if word in ("run", "cut", "cut_hf") else word for word in verb]) == 0
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "cut_hf", dtype=torch.float32).eval()
    with torch.no_grad():
        difference = (smaller(tokens).logits - model(tokens).logits).abs().max()
    assert float(difference) < 1e-5
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    before, after = (load_file(tmp_path / name / "model.safetensors")[bias] for name in ("two_hf", "cut_hf"))
    assert torch.equal(after, before[list(kept.blocks[1].experts)])
    edited(tmp_path / "run", [[], [0, 1, 2, 4], [0, 1, 4, 5]])
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "other")]) == 2


@pytest.mark.parametrize("score", ["frequency", "ean", "random"])
def test_other_scores_choose_otherwise(root: Path, tmp_path: Path, score: str) -> None:
    runs = [tmp_path / "reap", tmp_path / score]
    assert prune(root, "qwen3_moe", "reap", "num_moe_experts=4", runs[0]) == 0
    assert prune(root, "qwen3_moe", "reap", "num_moe_experts=4", runs[1], "--score", score) == 0
    first, second = (Trim.load(run / "decision").units for run in runs)
    assert first != second and all(len(block.experts) == 4 for block in second.blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_fewer_experts_is_the_whole_one_without_their_rows(
    root: Path, tmp_path: Path, family: str
) -> None:
    count = 3
    assert prune(root, family, "reap", f"num_moe_experts={count}", tmp_path / "run") == 0
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "cut")]) == 0
    assert main(["export", "--input", str(tmp_path / "cut"), "--output", str(tmp_path / "hf")]) == 0
    assert main(["verify", "--input", str(tmp_path / "cut"), "--against", str(tmp_path / "hf")]) == 0
    readers = [HFReader(x) for x in (root / f"{family}_hf", tmp_path / "hf")]
    whole, smaller = ({name: reader.read(name) for name in reader.names()} for reader in readers)
    kept = Trim.load(tmp_path / "run" / "decision").units
    for name, tensor in smaller.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        expected = whole.get(name)
        if layer is not None and ".experts." in name:
            number = int(name.split(".experts.")[1].split(".")[0])
            other = kept.blocks[layer].experts[number]
            expected = whole[name.replace(f".experts.{number}.", f".experts.{other}.")]
        elif layer is not None and (".gate." in name or ".router." in name):
            expected = whole[name][list(kept.blocks[layer].experts)]
        assert expected is not None and torch.equal(tensor, expected), name
    assert sum(".experts." in name for name in smaller) < sum(".experts." in name for name in whole)


def test_wanda_weighs_an_experts_inputs_by_the_tokens_sent_to_it(root: Path, tmp_path: Path) -> None:
    """Not by gates: what enters the down projection is what tools that hook transformers see."""
    from megatron_prune.data.calibration import windows
    from megatron_prune.data.tokenizer import load_tokenizer

    assert prune(root, "qwen3_moe", "wanda", "2:4", tmp_path / "run") == 0
    masks = Masks.load(tmp_path / "run" / "decision")
    tokenizer = load_tokenizer(root / "qwen3_moe" / "tokenizer", 257)
    tokens = windows([root / "words.jsonl"], tokenizer, SAMPLES, LENGTH, 0).tokens
    (first, *_) = routed(root / "qwen3_moe_hf", tokens)
    weights = load_file(root / "qwen3_moe_hf" / "model.safetensors")
    compared = 0
    for expert, (inputs, _inner, _gates, _outputs) in first.items():
        if len(inputs):
            for name in (f"model.layers.0.mlp.experts.{expert}.{each}_proj.weight" for each in ("gate", "up")):
                score = (weights[name].abs() * pruned_norm(root, tmp_path, tokens, expert)).unflatten(1, (-1, 4))
                best = torch.zeros_like(score).scatter_(2, score.topk(2, dim=2).indices, 1.0).flatten(1).bool()
                compared += best.numel()
                assert torch.equal(best, masks.get(name)), name
    assert compared


def pruned_norm(root: Path, folder: Path, tokens: Tensor, expert: int) -> Tensor:
    """Norms of an expert's inputs in layer 0: statistics of a layer are taken before anything of it is pruned."""
    del folder
    inputs = routed(root / "qwen3_moe_hf", tokens)[0][expert][0]
    return inputs.norm(dim=0)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_with_few_tokens_are_told(
    root: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words(tmp_path / "one.jsonl", documents=1)
    text = ["--calibration", str(tmp_path / "one.jsonl"), "--calibration-samples", "1"]
    inputs = ["--input", str(root / "qwen3_moe"), "--output", str(tmp_path / "run")]
    choice = ["--method", method, "--target", "2:4", "--calibration-seq-length", "4"]
    assert main(["prune", *inputs, *choice, *text]) == 0
    told = capsys.readouterr()
    said = told.out + told.err
    assert "no calibration token for experts" in said and "pruned by magnitude" in said
    assert ("fewer calibration tokens than inputs" in said) == (method == "sparsegpt")
    masks, weights = Masks.load(tmp_path / "run" / "decision"), load_file(root / "qwen3_moe_hf/model.safetensors")
    line = next(line for line in said.splitlines() if "layer 0: no calibration token" in line)
    expert = line.split("experts ")[1].split(",")[0].split(".")[0]
    name = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
    size = weights[name].abs().unflatten(1, (-1, 4))
    best = torch.zeros_like(size).scatter_(2, size.topk(2, dim=2).indices, 1.0).flatten(1).bool()
    assert torch.equal(best, masks.get(name))


def test_experts_taken_some_at_a_time_are_pruned_alike(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_prune.statistics import runner

    passes: list[int] = []
    collect = runner._collect
    monkeypatch.setattr(runner, "_collect", lambda *given: passes.append(len(given[-1])) or collect(*given))
    assert prune(root, "qwen3_moe", "sparsegpt", "2:4", tmp_path / "together") == 0
    assert passes == [18, 18]
    monkeypatch.setattr(runner, "HELD_BYTES", 5 * 8 * 32 * 32)
    assert prune(root, "qwen3_moe", "sparsegpt", "2:4", tmp_path / "shares") == 0
    assert len(passes) > 8 and sum(passes[2:]) == 36
    one, other = (Masks.load(tmp_path / name / "decision") for name in ("together", "shares"))
    assert all(torch.equal(one.get(name), other.get(name)) for name in one.names())
    with backend.running(backend.Layout()):
        runs = (tmp_path / name / "weights" for name in ("together", "shares"))
        a, b = (load_model(run, backend.Layout()) for run in runs)
        assert all(torch.equal(x, b.parameters[name]) for name, x in a.parameters.items())


REFUSED = {
    "fewer than a token needs": ("qwen3_moe", "reap", "num_moe_experts=2", "each token goes to 3 experts"),
    "more than there are": ("qwen3_moe", "reap", "num_moe_experts=9", "the model has 8; give that or less"),
    "no experts in the target": ("qwen3_moe", "reap", "num_layers=1", "it can change num_moe_experts"),
    "width of a model with experts": (
        "qwen3_moe",
        "llm_pruner",
        "ffn_hidden_size=16",
        "cannot prune a model with expert",
    ),
    "groups of experts": (
        "grouped",
        "reap",
        "num_moe_experts=4",
        "4 groups of experts, which keep equally many, at least 2",
    ),
    "a budget": ("qwen3_moe", "flap", "parameters=20000", "cannot prune a model with experts to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(root: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, method, target, expected = REFUSED[case]
    assert prune(root, family, method, target, tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line and not (tmp_path / "run").exists()


def test_masks_of_other_experts_are_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model with twice as many, as a start, and by hand in a run."""
    byte_tokenizer(tiny_model(tmp_path / "hf", "qwen3_moe", vocab_size=257, num_experts=4))
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "few")]) == 0
    magnitude = ["prune", "--method", "magnitude", "--target", "2:4"]
    for model, run in ((root / "qwen3_moe", "many_run"), (tmp_path / "few", "run")):
        assert main([*magnitude, "--input", str(model), "--output", str(tmp_path / run)]) == 0
    learn = ["--method", "maskllm", "--target", "2:4", "--prior", str(tmp_path / "many_run")]
    data = ["--data", str(root / "words.jsonl"), "--seq-length", "16", "--train-iters", "1", "--global-batch-size", "1"]
    capsys.readouterr()
    inputs = ["--input", str(tmp_path / "few"), "--output", str(tmp_path / "learned")]
    assert main(["prune", *inputs, *learn, *data]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "experts.4." in line and not (tmp_path / "learned").exists()
    shutil.rmtree(tmp_path / "run" / "decision")
    shutil.copytree(tmp_path / "many_run" / "decision", tmp_path / "run" / "decision")
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "cut")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "experts.4." in line and not (tmp_path / "cut").exists()


def test_expert_flags_without_experts_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.models import tiny_llama

    byte_tokenizer(tiny_llama(tmp_path / "hf", vocab_size=257))
    flags = ["--expert-tensor-parallel-size", "1"]
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "x"), *flags]) == 2
    assert "the model has no experts: drop it" in capsys.readouterr().err


def test_a_dense_model_has_no_experts_to_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.models import tiny_llama

    words(tmp_path / "words.jsonl", documents=2)
    byte_tokenizer(tiny_llama(tmp_path / "llama", vocab_size=257))
    assert prune(tmp_path, "llama", "reap", "num_moe_experts=2", tmp_path / "run") == 2
    assert "has no experts" in capsys.readouterr().err


def edited(run: Path, experts: list[list[int]], **after: int) -> None:
    """Change the experts that a decision keeps, layer by layer, and what it says of them, with the right checksum."""
    folder = run / "decision"
    tensors = load_file(folder / "units.safetensors")
    for layer, numbers in enumerate(experts):
        tensors[f"layers.{layer:05d}.experts"] = torch.tensor(numbers, dtype=torch.int32)
    save_file(tensors, folder / "units.safetensors")
    about = json.loads((folder / "trim.json").read_text())
    about["sha256"] = hashlib.sha256((folder / "units.safetensors").read_bytes()).hexdigest()
    about["after"] |= after
    (folder / "trim.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("experts", "after", "expected"),
    [
        ([[0, 1], [0, 1]], {"num_moe_experts": 2}, "each token goes to 3"),
        ([[0, 1, 2, 3, 4]] * 2, {"num_moe_experts": 7}, "5 experts of 24 neurons stay; trim.json has other sizes"),
        ([[0, 1, 2, 3], [0, 1, 2, 3, 4]], {}, "4 experts of 24 neurons stay"),
        ([[0, 1, 2, 3, 8]] * 2, {}, "experts are not rising numbers below 8"),
        ([[], []], {}, "no layer has experts"),
    ],
)
def test_decisions_on_experts_that_make_no_model_are_refused(
    root: Path,
    tmp_path: Path,
    experts: list[list[int]],
    after: dict[str, int],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prune(root, "qwen3_moe", "reap", "num_moe_experts=5", tmp_path / "run") == 0
    edited(tmp_path / "run", experts, **after)
    capsys.readouterr()
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "cut")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line and not (tmp_path / "cut").exists()


@pytest.mark.parametrize("method", ["shortgpt", "minitron"])
def test_layers_can_go(root: Path, tmp_path: Path, method: str) -> None:
    assert prune(root, "qwen3_moe", method, "num_layers=1", tmp_path / "run") == 0
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "cut")]) == 0
    assert main(["export", "--input", str(tmp_path / "cut"), "--output", str(tmp_path / "hf")]) == 0
    assert main(["verify", "--input", str(tmp_path / "cut"), "--against", str(tmp_path / "hf")]) == 0
