"""Merged experts (REAM) against a second computation: transformers' own model, one expert and one neuron at a time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.data.calibration import windows
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.decision.trimming import Trim
from megatron_prune.model.convert import HFReader
from megatron_prune.statistics.merging import alignment, grouped, unit_distance
from tests.models import byte_tokenizer, tiny_model, words

LENGTH, SAMPLES, COUNT, SIZE = 32, 5, 4, 3
FAMILIES: dict[str, dict[str, Any]] = {"qwen3_moe": {}, "glm4_moe": {}, "gpt_oss": {"num_local_experts": 8}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and each of them with its experts merged, exported."""
    root = tmp_path_factory.mktemp("merged")
    words(root / "words.jsonl", documents=8)
    for family, sizes in FAMILIES.items():
        byte_tokenizer(tiny_model(root / f"{family}_hf", family, vocab_size=257, **sizes))
        assert main(["import", "--input", str(root / f"{family}_hf"), "--output", str(root / family)]) == 0
        assert merge(root, family, root / f"{family}_run") == 0
        small, out = root / f"{family}_small", root / f"{family}_merged_hf"
        assert main(["trim", "--input", str(root / f"{family}_run"), "--output", str(small)]) == 0
        assert main(["export", "--input", str(small), "--output", str(out)]) == 0
    return root


def merge(root: Path, family: str, output: Path, *options: str, target: str = f"num_moe_experts={COUNT}") -> int:
    """The verb."""
    text = ["--calibration", str(root / "words.jsonl"), "--calibration-samples", str(SAMPLES)]
    inputs = ["--input", str(root / family), "--output", str(output), "--method", "ream", "--target", target]
    options = options or ("--group-size", str(SIZE))
    return main(["prune", *inputs, *text, "--calibration-seq-length", str(LENGTH), *options])


def expert(module: Any, number: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and outputs of one of transformers' experts for all tokens `[tokens, hidden]`."""
    if hasattr(module, "gate_up_proj_bias"):  # gpt-oss
        both = x @ module.gate_up_proj[number] + module.gate_up_proj_bias[number]
        gate, up = both[:, ::2].clamp(max=module.limit), both[:, 1::2].clamp(-module.limit, module.limit)
        inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        return inner, inner @ module.down_proj[number] + module.down_proj_bias[number]
    gate, up = (x @ module.gate_up_proj[number].T).chunk(2, dim=-1)
    inner = F.silu(gate) * up
    return inner, inner @ module.down_proj[number].T


def neurons(module: Any, number: int) -> Tensor:
    """All weights of each neuron of an expert, in any order that is the same for all experts."""
    if hasattr(module, "gate_up_proj_bias"):
        both, bias = module.gate_up_proj[number], module.gate_up_proj_bias[number]
        gate, up = both[:, ::2].T, both[:, 1::2].T
        return torch.cat([gate, up, bias[::2, None], bias[1::2, None], module.down_proj[number]], 1)
    gate, up = module.gate_up_proj[number].chunk(2)
    return torch.cat([gate, up, module.down_proj[number].T], 1)


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two vectors."""
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def expected_groups(
    family: str, layer: Any, hidden: Tensor, chosen: Tensor, gates: Tensor
) -> tuple[dict[int, list[int]], list[float]]:
    """Groups by centre, and scores, of a layer of transformers' model: from its inputs, choices and gates."""
    module = layer.mlp.experts
    router = layer.mlp.router if family == "gpt_oss" else layer.mlp.gate
    logits = F.linear(hidden, router.weight, getattr(router, "bias", None)).float()
    soft = logits.sigmoid() if family == "glm4_moe" else logits.softmax(-1)
    count = len(module.down_proj)
    outputs = [expert(module, number, hidden)[1] for number in range(count)]
    scores = []
    for number in range(count):
        token, place = (chosen == number).nonzero(as_tuple=True)
        size = gates[token, place] * outputs[number][token].norm(dim=1)
        scores.append(float(size.double().mean()) if len(token) else 0.0)
    centres = sorted(range(count), key=lambda e: scores[e])[-COUNT:]
    free = [e for e in range(count) if e not in centres]
    means = [(soft[:, e, None] * outputs[e]).mean(0) for e in range(count)]
    found = {}
    for centre in sorted(centres, key=lambda e: -scores[e]):
        alike = {e: cosine(means[centre], means[e]) / 2 + cosine(logits[:, centre], logits[:, e]) / 2 for e in free}
        found[centre] = sorted(free, key=lambda e: -alike[e])[: SIZE - 1]
        free = [e for e in free if e not in found[centre]]
    assert not free
    return {centre: [centre, *others] for centre, others in found.items()}, scores


def best_order(module: Any, centre: int, other: int, hidden: Tensor) -> list[int]:
    """The alignment, with distances of unit vectors one by one."""
    from scipy.optimize import linear_sum_assignment

    a, b = (expert(module, e, hidden)[0].double() for e in (centre, other))
    v, w = (neurons(module, e).double() for e in (centre, other))
    cost = np.empty((a.shape[1], b.shape[1]))
    for i, j in itertools.product(range(a.shape[1]), range(b.shape[1])):
        first = a[:, i] / a[:, i].norm() - b[:, j] / b[:, j].norm()
        cost[i, j] = float(first.norm() + (v[i] / v[i].norm() - w[j] / w[j].norm()).norm())
    return linear_sum_assignment(cost)[1].tolist()


def first_sparse(family: str, directory: Path, tokens: Tensor) -> tuple[int, Any, Tensor, Tensor, Tensor]:
    """Number and module of the first layer with experts, the inputs of its experts, choices and gates."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    number = next(n for n, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    layer, seen = model.model.layers[number], []
    handle = layer.mlp.experts.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    (hidden, chosen, gates) = seen[0]
    return number, layer, hidden, chosen, gates


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_first_layers_experts_are_what_a_second_computation_gives(root: Path, family: str) -> None:
    tokenizer = load_tokenizer(root / family / "tokenizer", 257)
    tokens = windows([root / "words.jsonl"], tokenizer, SAMPLES, LENGTH, 0).tokens
    number, layer, hidden, chosen, gates = first_sparse(family, root / f"{family}_hf", tokens)
    groups, scores = expected_groups(family, layer, hidden, chosen, gates)
    units = Trim.load(root / f"{family}_run" / "decision").units
    assert units.blocks[number].experts == tuple(sorted(groups))
    assert sorted(map(len, groups.values())) == [1, 1, 3, 3]  # most stay alone, as few as it takes grow
    _, merged, *_ = first_sparse(family, root / f"{family}_merged_hf", tokens)
    module, small = layer.mlp.experts, merged.mlp.experts
    for place, centre in enumerate(sorted(groups)):
        group = groups[centre]
        share = torch.tensor([scores[e] for e in group], dtype=torch.float64)
        share /= share.sum()
        total = torch.zeros_like(neurons(module, centre).double())
        for e, part in zip(group, share, strict=True):
            order = list(range(len(total))) if e == centre else best_order(module, centre, e, hidden)
            assert e == centre or order != sorted(order)
            total += part * neurons(module, e).double()[order]
        torch.testing.assert_close(neurons(small, place).double(), total, rtol=1e-5, atol=1e-6)
        if family == "gpt_oss":
            bias = sum(part * module.down_proj_bias[e].double() for e, part in zip(group, share, strict=True))
            torch.testing.assert_close(small.down_proj_bias[place].double(), bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_merged_opens_in_transformers_and_keeps_the_centres_rows(root: Path, family: str) -> None:
    small, out = root / f"{family}_small", root / f"{family}_merged_hf"
    assert main(["verify", "--input", str(small), "--against", str(out)]) == 0
    whole, merged = HFReader(root / f"{family}_hf"), HFReader(out)
    units, changed = Trim.load(root / f"{family}_run" / "decision").units, 0
    for name in merged.names():
        tensor = merged.read(name)
        if ".experts." in name:
            changed += 1
        elif ".gate." in name or ".router." in name:
            kept = list(units.blocks[int(name.split(".")[2])].experts)
            assert torch.equal(tensor, whole.read(name)[kept]), name
        else:
            assert torch.equal(tensor, whole.read(name)), name
    assert changed


@torch.no_grad()
def test_a_later_layer_is_merged_for_what_the_merged_one_gives(root: Path) -> None:
    """With the first layer's experts merged in transformers' model, the second's follow from its own hidden states."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(root / "qwen3_moe" / "tokenizer", 257)
    tokens = windows([root / "words.jsonl"], tokenizer, SAMPLES, LENGTH, 0).tokens
    whole = AutoModelForCausalLM.from_pretrained(root / "qwen3_moe_hf", dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(root / "qwen3_moe_merged_hf", dtype=torch.float32).eval()
    found = []
    for first in (whole.model.layers[0], merged.model.layers[0]):
        whole.model.layers[0] = first
        seen: list[Any] = []
        layer = whole.model.layers[1]
        handle = layer.mlp.experts.register_forward_hook(lambda _m, inputs, _o, seen=seen: seen.append(inputs))
        whole(tokens)
        handle.remove()
        groups, scores = expected_groups("qwen3_moe", layer, *seen[0])
        best = max(groups, key=lambda centre: len(groups[centre]) * 100 - centre)
        found.append((tuple(sorted(groups)), groups, scores, layer.mlp.experts, seen[0][0], best))
    units = Trim.load(root / "qwen3_moe_run" / "decision").units
    centres, groups, scores, module, hidden, best = found[1]
    assert units.blocks[1].experts == centres
    group = groups[best]
    share = torch.tensor([scores[e] for e in group], dtype=torch.float64)
    total = sum(
        part * neurons(module, e).double()[list(range(24)) if e == best else best_order(module, best, e, hidden)]
        for e, part in zip(group, share / share.sum(), strict=True)
    )
    small = merged.model.layers[1].mlp.experts
    torch.testing.assert_close(neurons(small, centres.index(best)).double(), total, rtol=1e-5, atol=1e-6)
    dense = found[0]
    assert [dense[2][e] for e in group] != [scores[e] for e in group]


def test_groups_of_a_router_keep_equally_many_centres(root: Path, tmp_path: Path) -> None:
    sizes = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "n_routed_experts": 16}
    byte_tokenizer(tiny_model(tmp_path / "grouped_hf", "glm4_moe", vocab_size=257, **sizes))
    assert main(["import", "--input", str(tmp_path / "grouped_hf"), "--output", str(tmp_path / "grouped")]) == 0
    (tmp_path / "words.jsonl").symlink_to(root / "words.jsonl")
    assert merge(tmp_path, "grouped", tmp_path / "run", target="num_moe_experts=8") == 0
    for block in Trim.load(tmp_path / "run" / "decision").units.blocks[1:]:
        assert [sum(expert // 4 == group for expert in block.experts) for group in range(4)] == [2, 2, 2, 2]


def test_groups_take_the_most_alike_from_the_highest_score_on() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.3])
    likeness = torch.zeros(5, 5)
    likeness[1] = torch.tensor([0.2, 1.0, 0.0, 0.9, 0.1])
    likeness[2] = torch.tensor([0.3, 0.0, 1.0, 1.0, 0.4])
    assert grouped(scores, likeness, (1, 2), 3) == {1: [3, 0], 2: [4]}
    assert grouped(scores, likeness, (1, 2), 5) == {1: [3, 0, 4], 2: []}
    with pytest.raises(ValueError, match="2 groups of 2 have no room for 5"):
        grouped(scores, likeness, (1, 2), 2)


def test_alignment_finds_the_order_of_permuted_neurons() -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    order = torch.randperm(9, generator=generator)
    other = 3.0 * vectors[order] + 0.01 * torch.randn(9, 20, generator=generator, dtype=torch.float64)
    distance = unit_distance(vectors @ other.t(), vectors.square().sum(1), other.square().sum(1))
    assert order[alignment(distance)].tolist() == list(range(9))
    expected = torch.cdist(F.normalize(vectors), F.normalize(other))
    torch.testing.assert_close(distance, expected)
    nothing = torch.zeros(1, dtype=torch.float64)
    assert float(unit_distance(nothing[:, None], nothing, nothing)) == pytest.approx(2**0.5)


REFUSED = {
    "no room": ((f"num_moe_experts={COUNT}", "--group-size", "1"), "group_size 1 was given; allowed: 2 or more"),
    "small groups": (("num_moe_experts=3", "--group-size", "2"), "no room for 8 experts; give --group-size 3 or more"),
    "layers": (("num_layers=1", "--group-size", "4"), "it can change num_moe_experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(root: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    (target, *options), expected = REFUSED[case]
    assert merge(root, "qwen3_moe", tmp_path / "run", *options, target=target) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line and not (tmp_path / "run").exists()
