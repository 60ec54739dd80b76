"""Orders of channels: against all groupings there are, and in models, whose outputs stay as they were."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.data.calibration import windows
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.decision.source import open_model
from megatron_prune.decision.units import Units
from megatron_prune.methods.permutation import best_order, kept
from tests.models import TINY_SIZES, c4_documents, c4_sample, stories260k, tiny_model
from tests.runs import imported, refused_in_a_line

C4_HELD_OUT = Path("held_out.jsonl")
CALIBRATION = "--calibration w.jsonl --calibration-samples 3 --calibration-seq-length 24"


def best_of_all(scores: Tensor, n: int) -> float:
    """What the best of all ways to part 8 channels into two groups of 4 keeps, one way after the other."""
    best = 0.0
    for others in itertools.combinations(range(1, 8), 3):
        groups = [[0, *others], sorted(set(range(8)) - {0, *others})]
        found = sum(float(row[group].sort().values[-n:].sum()) for row in scores for group in groups)
        best = max(best, found)
    return best


@pytest.mark.parametrize("n", [1, 2, 3])
def test_eight_channels_are_parted_to_gain_half_of_what_can_be_gained(n: int) -> None:
    shares = []
    for seed in range(20):
        scores = torch.rand(12, 8, generator=torch.Generator().manual_seed(seed)) ** 3
        order = best_order(scores, n, 4)
        assert sorted(order) == list(range(8))
        own, found, best = kept(scores, n, 4), kept(scores[:, order], n, 4), best_of_all(scores, n)
        assert own <= found <= best * (1 + 1e-6)
        shares.append((found - own) / max(best - own, 1e-9))
    assert sum(shares) / len(shares) > 0.5
    assert sum(share > 0.999 for share in shares) > 1


def test_channels_that_want_the_same_rows_are_parted() -> None:
    """Four channels are large in the first rows alone and stand together: two of them would go."""
    scores = torch.full((8, 16), 0.01)
    for channel in range(16):
        scores[2 * (channel // 4) : 2 * (channel // 4) + 2, channel] = 1.0
    assert kept(scores, 2, 4) == pytest.approx(16 + 8 * 3 * 0.02)
    order = best_order(scores, 2, 4)
    assert kept(scores[:, order], 2, 4) == pytest.approx(32, rel=0.02)
    assert best_order(scores[:, order], 2, 4) == list(range(16)), "the best there is stays"


def test_channels_stay_in_their_stretch() -> None:
    scores = torch.rand(6, 32, generator=torch.Generator().manual_seed(0)) ** 4
    order = best_order(scores, 2, 4, at_once=16)
    assert sorted(order[:16]) == list(range(16)) and order != list(range(32))
    assert kept(scores[:, best_order(scores, 2, 4)], 2, 4) >= kept(scores[:, order], 2, 4) > kept(scores, 2, 4)


def test_units_may_stand_in_any_order_only_where_all_stay(tmp_path: Path) -> None:
    config = open_model(tiny_model(tmp_path / "hf", "llama")).config
    units = Units.all(config)
    turned = replace(units, hidden=units.hidden[::-1])
    assert turned.config(config) == config
    block = units.blocks[0]
    for wrong, what in {
        replace(units, hidden=(1, 0)): "hidden",
        replace(units, hidden=(*units.hidden[1:], 1)): "hidden",
        replace(units, blocks=(replace(block, heads=block.heads[::-1]), *units.blocks[1:])): "heads",
        replace(units, blocks=(replace(block, ffn=block.ffn[:8][::-1]), *units.blocks[1:])): "ffn",
    }.items():
        with pytest.raises(ValueError, match=f"{what}.* are not rising numbers"):
            wrong.config(config)


def logits(directory: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(tokens).logits


@pytest.mark.parametrize("family", sorted(TINY_SIZES))
def test_a_model_of_every_family_computes_the_same(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    imported(tmp_path, family)
    assert main(["permute", "ck", "permuted", *CALIBRATION.split()]) == 0
    told = capsys.readouterr().out
    assert "next-token loss of 3 windows" in told
    assert main("export permuted permuted_hf".split()) == 0 and main("export ck whole_hf".split()) == 0
    tokens = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(1))
    found, expected = logits(Path("permuted_hf"), tokens), logits(Path("whole_hf"), tokens)
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()
    now, before = load_file("permuted_hf/model.safetensors"), load_file("whole_hf/model.safetensors")
    moved = {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}
    assert len(moved) > len(now) / 3
    for name in moved:
        assert torch.equal(now[name].flatten().sort().values, before[name].flatten().sort().values), name


def test_orders_are_chosen_by_weights_and_inputs_as_a_second_computation_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs are those that transformers' own linears see; an order by the weights alone is another one."""
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    imported(tmp_path, "llama")
    assert main(["permute", "ck", "permuted", *CALIBRATION.split()]) == 0
    assert main("export permuted permuted_hf".split()) == 0
    model = AutoModelForCausalLM.from_pretrained("hf", dtype=torch.float32)
    squares: dict[str, Tensor] = {}
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            linear.register_forward_hook(
                lambda _module, inputs, _output, name=name: squares.update(
                    {name: squares.get(name, torch.zeros(())) + inputs[0].double().square().sum((0, 1))}
                )
            )
    with torch.no_grad():
        for window in windows(["w.jsonl"], load_tokenizer(Path("hf"), 257), 3, 24, 0).tokens:
            model(window[None])
    scores = {
        name: model.get_submodule(name).weight.detach().abs() * found.sqrt().float() for name, found in squares.items()
    }
    now = load_file("permuted_hf/model.safetensors")
    reading = []
    for number, names in itertools.product(range(2), ("self_attn.q self_attn.k self_attn.v", "mlp.gate mlp.up")):
        rows = torch.cat([scores[f"model.layers.{number}.{name}_proj"] for name in names.split()])
        reading.append(rows / rows.mean())
    hidden = best_order(torch.cat(reading), 2, 4)
    assert torch.equal(now["model.embed_tokens.weight"], model.model.embed_tokens.weight.detach()[:, hidden])
    for number in range(2):
        name = f"model.layers.{number}.mlp.down_proj"
        weight = model.get_submodule(name).weight.detach()
        order, other = best_order(scores[name], 2, 4), best_order(weight.abs(), 2, 4)
        assert torch.equal(now[f"{name}.weight"], weight[hidden][:, order]) and order != other


def test_more_is_kept_of_a_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wanda's 2:4 of a model that was trained: held-out perplexity falls, and not with orders for other groups."""
    c4 = c4_sample()
    monkeypatch.chdir(tmp_path)
    stories260k(tmp_path / "hf")
    text = f"--calibration {c4} --calibration-documents 200 --calibration-samples 16 --calibration-seq-length 128"
    c4_documents(C4_HELD_OUT, 1900, None)
    assert main(f"permute hf permuted {text}".split()) == 0
    found = {}
    for model in ("hf", "permuted"):
        assert main(f"prune {model} {model}_run --method wanda --target 2:4 {text}".split()) == 0
        words = f"evaluate {model}_run --text {C4_HELD_OUT} --window 256 --windows 64 --output {model}.json"
        assert main(words.split()) == 0
        found[model] = json.loads(Path(f"{model}.json").read_text())["perplexity"]
    assert found["permuted"] < 0.98 * found["hf"], found


def test_a_smaller_model_and_one_that_lost_single_weights_have_no_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    imported(tmp_path, "llama")
    for method, target in (("shortgpt", "num_layers=1"), ("magnitude", "0.5")):
        text = CALIBRATION if method == "shortgpt" else ""
        assert main(f"prune ck {method} --method {method} --target {target} {text}".split()) == 0
        assert main(f"trim {method} {method}_model".split()) == 0
        assert main(f"permute {method}_model {method}_permuted {CALIBRATION}".split()) == 0


def test_what_cannot_be_ordered_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    imported(tmp_path, "llama")
    assert main("prune ck run --method magnitude --target 2:4".split()) == 0
    assert main("trim run sparse".split()) == 0
    for command, message in {
        "permute ck x": "permute needs calibration text and none was given",
        f"permute ck x --target 0.5 {CALIBRATION}": "--target 0.5 was given; permute takes a pattern N:M alone",
        f"permute ck x --target 2:4@0.5 {CALIBRATION}": "permute takes a pattern N:M alone",
        f"permute ck x --target 1:3 {CALIBRATION}": "its 32 inputs are not a multiple of 3",
        f"permute sparse x {CALIBRATION}": "sparse was pruned to 2:4, and another order would take its groups apart",
        f"permute run x {CALIBRATION}": "trim",
        f"permute ck sparse {CALIBRATION}": "exists",
    }.items():
        refused_in_a_line(command, message, capsys)
