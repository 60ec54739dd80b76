"""Weights that stay dense by a share: which ones, against a second computation through transformers' model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_prune import prune_model
from megatron_prune.__main__ import main
from megatron_prune.data.calibration import windows
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.target import NM, Unstructured, parse_any_target, parse_target, title
from megatron_prune.errors import UserError
from megatron_prune.methods.fit import dense_room
from megatron_prune.search.integer import best_worth
from tests.models import byte_tokenizer, c4_documents, stories260k, tiny_model, words
from tests.runs import prune_to, refused_in_a_line, refused_to_prune

WINDOWS, SAMPLES, LENGTH = "4x32", 4, 32
"""Of the calibration."""
SHARE = 0.3
FAMILIES = ("llama", "gpt2", "qwen3_moe")
"""GPT-2 has queries, keys and values in one weight, stored transposed."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense_share")
    words(root / "words.jsonl")
    for family in FAMILIES:
        byte_tokenizer(tiny_model(root / family, family, vocab_size=257))
    return root


def named(model: torch.nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Prunable weights as a checkpoint has them: transformers 5 keeps the experts of a layer together."""
    found = dict(model.named_parameters())
    weights = dict[str, Tensor]()
    for name in names:
        if name in found:
            weights[name] = found[name]
            continue
        layer, _, rest = name.partition(".experts.")
        expert, part = int(rest.split(".")[0]), rest.split(".")[1]
        if part == "down_proj":
            weights[name] = found[f"{layer}.experts.down_proj"][expert]
        else:
            gate, up = found[f"{layer}.experts.gate_up_proj"][expert].chunk(2)
            weights[name] = gate if part == "gate_proj" else up
    return weights


def second_costs(
    dense: Path, pruned: Path, names: list[str], text: Path, samples: int = SAMPLES, length: int = LENGTH
) -> tuple[dict[str, float], float]:
    """What every weight's pruning costs by gradients halfway, and what all of it does, by transformers' models."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (dense, pruned)]
    tokens = windows([text], AutoTokenizer.from_pretrained(dense), samples, length, 0).tokens

    def loss(model: Callable[..., object]) -> Tensor:
        logits = model(tokens).logits[:, :-1]  # type: ignore[attr-defined]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    with torch.no_grad():
        gap = float(loss(models[1]) - loss(models[0]))
        differences = {
            name: a.detach() - b.detach()
            for (name, a), b in zip(named(models[0], names).items(), named(models[1], names).values(), strict=True)
        }
        for a, b in zip(models[1].parameters(), models[0].parameters(), strict=True):
            a.add_(b).div_(2)
    loss(models[1]).backward()
    slopes = {name: parameter.grad for name, parameter in models[1].named_parameters()}

    class Slopes(torch.nn.Module):
        """Gradients by the names of their weights."""

        def named_parameters(self, *_: object, **__: object) -> object:
            return slopes.items()

    found = named(Slopes(), names)
    return {name: -float((found[name] * difference).sum()) for name, difference in differences.items()}, gap


@pytest.mark.parametrize(
    ("family", "method", "rest"),
    [
        ("llama", "sparsegpt", "2:4"),
        ("llama", "wanda", "0.6"),
        ("gpt2", "sparsegpt", "0.5"),
        ("qwen3_moe", "wanda", "2:4"),
    ],
)
def test_what_stays_costs_most_for_its_size(
    root: Path, tmp_path: Path, family: str, method: str, rest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No choice within the share is worth more, by costs of an independent computation."""
    assert prune_to(root, tmp_path / "all", method, rest, family, windows=WINDOWS) == 0
    capsys.readouterr()
    assert prune_to(root, tmp_path / "some", method, f"{rest},dense=30%", family, windows=WINDOWS) == 0
    told = capsys.readouterr()
    masks = Masks.load(tmp_path / "some" / "decision")
    names = masks.names()
    costs, _ = second_costs(root / family, tmp_path / "all_hf", names, root / "words.jsonl")
    chosen = [name for name in names if masks.get(name).all()]
    assert sorted(parse_target(masks.info.target).dense) == sorted(chosen)
    sizes = {name: masks.get(name).numel() for name in names}
    limit = SHARE * sum(sizes.values())
    assert chosen and sum(sizes[name] for name in chosen) <= limit
    worth = sum(costs[name] for name in chosen)
    greedy, used = 0.0, 0
    for name in sorted(names, key=lambda name: -costs[name] / sizes[name]):
        if costs[name] > 0 and used + sizes[name] <= limit:
            greedy, used = greedy + costs[name], used + sizes[name]
    assert worth >= greedy * (1 - 2e-4)
    if len(names) <= 16:
        every = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
        fit = (some for some in every if sum(sizes[name] for name in some) <= limit)
        assert worth == pytest.approx(max(sum(costs[name] for name in some) for some in fit), rel=2e-4)
    assert f"{worth:.3f} of the {sum(costs.values()):.3f} nats" in told.out + told.err


def test_the_model_is_pruned_as_if_they_had_been_named(root: Path, tmp_path: Path) -> None:
    """Bit for bit: nothing of the first pruning is left."""
    assert prune_to(root, tmp_path / "share", "sparsegpt", "2:4,dense=40%", windows=WINDOWS) == 0
    masks = Masks.load(tmp_path / "share" / "decision")
    assert prune_to(root, tmp_path / "named", "sparsegpt", masks.info.target, windows=WINDOWS) == 0
    files = [tmp_path / name / "model.safetensors" for name in ("share_hf", "named_hf")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "share" / "all_pruned").exists()


def test_a_trained_model_keeps_more_than_by_equal_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out perplexity, beside as many dense weights in tiles of every weight, and beside the worst choice; and the
    shares of all weights make up what pruning costs.
    """
    monkeypatch.chdir(tmp_path)
    held_out, calibration = c4_documents(Path("held_out.jsonl"), 1900, None), c4_documents(Path("c4.jsonl"), None, 200)
    stories260k(tmp_path / "hf")
    text = f"--calibration {calibration} --calibration-samples 16 --calibration-seq-length 128"
    found = dict[str, float]()

    def pruned(name: str, target: str) -> Masks:
        assert main(f"prune hf {name} --method sparsegpt --target {target} {text} --export {name}_hf".split()) == 0
        words = f"evaluate {name}_hf --text {held_out} --window 256 --windows 64 --output {name}.json"
        assert main(words.split()) == 0
        found[name] = json.loads(Path(f"{name}.json").read_text())["perplexity"]
        return Masks.load(Path(name) / "decision")

    masks = pruned("share", "2:4,dense=25%")
    pruned("tiles", "2:4@0.75,tile=8xall")
    pruned("all", "2:4")
    costs, gap = second_costs(Path("hf"), Path("all_hf"), masks.names(), calibration, 16, 128)
    assert sum(costs.values()) == pytest.approx(gap, rel=0.2)
    worst, sizes = list[str](), {name: masks.get(name).numel() for name in masks.names()}
    for name in sorted(sizes, key=lambda name: costs[name] / sizes[name]):
        if sum(sizes[each] for each in worst) + sizes[name] <= sum(sizes.values()) / 4:
            worst.append(name)
    pruned("worst", f"2:4,dense={'+'.join(worst)}")
    assert found["share"] < found["tiles"] < found["all"] and found["share"] < found["worst"], found


def test_they_travel_and_are_verified(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A long list of names is in the files, and not in what is printed."""
    assert prune_to(root, tmp_path / "run", "wanda", "2:4,dense=45%", windows=WINDOWS) == 0
    printed = capsys.readouterr()
    found = json.loads((tmp_path / "run_hf" / "pruning.json").read_text())["target"]
    assert found == json.loads((tmp_path / "run" / "run.json").read_text())["target"]
    count = len(parse_target(found).dense)
    assert count > 1
    for form in ("run", "run_hf"):
        assert main(["verify", str(tmp_path / form)]) == 0
        printed = capsys.readouterr()
        assert f"pattern 2:4,dense={count} weights: holds, {count} weights are left dense" in printed.out
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert f"wanda 2:4,dense={count} weights" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report")]) == 0
    refused_in_a_line(
        f"verify {tmp_path / 'run_hf'} --target 2:4,dense=45%", "does not say which weights stay dense", capsys
    )


def test_a_list_of_many_names_goes_along_everywhere(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into a run, a checkpoint, a Hugging Face directory and a file of masks, and from all of them."""
    names = "+".join(f"model.layers.{layer % 2}.self_attn.{x}_proj.weight" for x in "qk" for layer in range(30))
    target = f"2:4,dense={names}"
    assert len(target) > 2000
    run, masks, given = tmp_path / "run", tmp_path / "masks.npz", tmp_path / "given"
    assert prune_to(root, run, "wanda", target, windows=WINDOWS) == 0
    assert main(["trim", str(run), str(tmp_path / "ck")]) == 0
    assert main(["export", str(run), str(masks), "--format", "mask-npz"]) == 0
    assert main(["import", str(root / "llama"), str(given), "--mask", str(masks)]) == 0
    for form in (run, tmp_path / "ck", tmp_path / "run_hf", given):
        capsys.readouterr()
        assert main(["verify", str(form)]) == 0, form
        assert "pattern 2:4,dense=60 weights: holds, 4 weights are left dense" in capsys.readouterr().out
    for form in (run, masks):
        assert main(["inspect", str(form)]) == 0
        assert "2:4,dense=60 weights" in capsys.readouterr().out


def test_a_process_that_was_lost_behind_the_end_changes_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that torchrun's restarted processes find is the one that they were asked for; any other is refused."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    command = f"prune {root / 'llama'} {tmp_path / 'run'} --method wanda --calibration {root / 'words.jsonl'}"
    command += f" --calibration-samples {SAMPLES} --calibration-seq-length {LENGTH} --target 2:4,dense="
    assert main(f"{command}30%".split()) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert main(f"{command}30%".split()) == 0
    assert "was finished when a process was lost" in capsys.readouterr().out
    assert main(f"{command}40%".split()) == 2
    assert "2:4,dense=40%" in capsys.readouterr().err


def test_a_model_in_memory(root: Path) -> None:
    """The weights of one share are all there, and they are whole weights."""
    model = AutoModelForCausalLM.from_pretrained(root / "llama", dtype=torch.float32)
    texts = [json.loads(line)["text"] for line in (root / "words.jsonl").read_text().splitlines()]
    how = {"texts": texts, "calibration_samples": SAMPLES, "calibration_seq_length": LENGTH}
    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    pruned = prune_model(model, tokenizer, method="wanda", target="2:4,dense=30%", **how)
    before = dict(model.named_parameters())
    zeros = {n: float((w == 0).float().mean()) for n, w in pruned.named_parameters() if "_proj" in n}
    whole = [name for name, share in zeros.items() if share == 0]
    assert whole and all(torch.equal(before[name], dict(pruned.named_parameters())[name]) for name in whole)
    assert sum(before[name].numel() for name in whole) <= SHARE * sum(before[name].numel() for name in zeros)
    assert {share for share in zeros.values() if share} == {0.5}


def test_the_best_within_a_limit() -> None:
    """Not the best for their size one after the other; what costs nothing is not restored."""
    assert best_worth([6.0, 5.0, 5.0], [6, 5, 5], 10) == [1, 2]
    assert best_worth([6.0, -5.0, 0.0], [6, 1, 1], 10) == [0]
    assert best_worth([1.0], [11], 10) == [] == best_worth([-1.0], [1], 10)
    generator = torch.Generator().manual_seed(0)
    for n in range(30):
        worth = (torch.randn(10, generator=generator) * 10.0 ** -(n % 10)).tolist()
        sizes = torch.randint(1, 9, (10,), generator=generator).tolist()
        every = itertools.chain.from_iterable(itertools.combinations(range(10), n) for n in range(11))
        best = max(sum(worth[i] for i in some) for some in every if sum(sizes[i] for i in some) <= 20)
        found = best_worth(worth, sizes, 20)
        assert sum(worth[i] for i in found) >= best * (1 - 2e-4) and sum(sizes[i] for i in found) <= 20


@pytest.mark.parametrize("share", ["1" * 100_000, "1" * 100_000 + "x", "1" * 100_000 + "%"])
def test_numbers_that_go_on_are_refused_at_once(share: str) -> None:
    """No time is lost on them: they may stand in files from outside."""
    for text in (f"2:4,dense={share}", f"{share},dense=a", share, f"2:4@{share}"):
        with pytest.raises(UserError):
            parse_any_target(text)


def test_a_share_is_the_decimal_that_was_written() -> None:
    """Though 0.29 * 100 is below 29."""
    assert dense_room(0.29, [4096 * 4096] * 100) == 29 * 4096 * 4096
    assert dense_room(0.35, [768 * 768] * 20) == 7 * 768 * 768
    assert dense_room(0.2999, [10]) == 2


def test_how_it_is_written() -> None:
    assert parse_any_target("2:4,dense=25%") == NM(2, 4, dense_share=0.25)
    assert parse_any_target({"n": 2, "m": 4, "dense": "12.3%"}) == NM(2, 4, dense_share=0.123)
    assert str(NM(2, 4, dense_share=0.123)) == "2:4,dense=12.3%"
    both = Unstructured(0.5, spread=0.1, dense_share=0.5)
    assert str(both) == "0.5,spread=0.1,dense=50%" and parse_any_target(str(both)) == both
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    assert title(f"2:4,dense={'+'.join(names)}") == "2:4,dense=3 weights"
    assert title("2:4,dense=up_proj+down_proj") == "2:4,dense=up_proj+down_proj"
    with pytest.raises(UserError, match="is not understood"):
        parse_any_target({"n": 2, "m": 4, "dense": "25%", "dense_share": 0.9})
    with pytest.raises(UserError, match="does not say which weights stay dense"):
        NM(2, 4, dense_share=0.5).leaves("w")


def test_nothing_is_left_where_no_weight_is_worth_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is known when the model has been pruned once."""
    monkeypatch.setattr("megatron_prune.workbench.best_worth", lambda *_: [])
    message = "no weight that is so small costs anything when it is pruned; give a larger share, or name the weights"
    refused_to_prune(root, tmp_path / "run", "wanda", "2:4,dense=5%", message, capsys)
    assert not list(tmp_path.iterdir())


MISTAKES = {
    "all": ("wanda", "2:4,dense=100%", "dense=1.0 of the weights is not possible; give a share between 0 and 100%"),
    "nothing": ("wanda", "2:4,dense=0%", "give a share between 0 and 100%"),
    "no number": ("wanda", "0.5,dense=nan%", "give a share between 0 and 100%"),
    "too little": ("sparsegpt", "2:4,dense=0.01%", "the smallest of 14 prunable weights is"),
    "without text": ("magnitude", "2:4,dense=25%", "it looks at no text: name the weights, or use wanda"),
    "of units": ("minitron", "num_layers=1,dense=25%", "dense= is for patterns of weights"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(root: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    method, target, message = MISTAKES[case]
    refused_to_prune(root, tmp_path / "run", method, target, message, capsys)


def test_only_what_changes_is_remembered(root: Path) -> None:
    from megatron_prune.decision.source import open_model

    with backend.running(backend.Layout()):
        model = open_model(root / "llama").load(backend.Layout())
        some, _, other, *_ = (map for map in model.maps if map.prunable)
        first = model.whole(some).clone()
        with model.remembering() as before:
            model.assign(some, first + 1)
            model.assign(some, first + 2)
        model.assign(other, model.whole(other) * 2)  # when nobody looks any more
        assert list(before) == [some.megatron] and not torch.equal(model.whole(some), first)
        model.put_back(before)
        assert torch.equal(model.whole(some), first)
