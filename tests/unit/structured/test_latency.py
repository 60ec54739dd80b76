"""Budgets of latency: what a table says of models, what `latency` measures, and a search that keeps to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.__main__ import main
from megatron_prune.config import LatencyConfig
from megatron_prune.decision.latency import SAME, LatencyTable
from megatron_prune.decision.target import LATENCY, Budget
from megatron_prune.errors import UserError
from megatron_prune.methods.base import get_method
from megatron_prune.model.blocks import Block
from megatron_prune.model.families import ModelConfig, family_of
from megatron_prune.search import latency as latency_module
from tests.models import byte_tokenizer, tiny_llama, tiny_model, words

CALIBRATION = "--calibration-samples 6 --calibration-seq-length 16".split()
SEARCH = "--levels 4 --survivors 1 --fitness-tokens 32 --training-tokens 0".split()
EVOLVED = "--generations 2 --offspring 4".split()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with 4 heads in 2 groups, 64 neurons and 2 layers, its table, and text."""
    root = tmp_path_factory.mktemp("latency")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    words(root / "words.jsonl")
    table(config(root)).save(root / "table.json")
    return root


def config(root: Path) -> ModelConfig:
    found = json.loads((root / "hf" / "config.json").read_text())
    return family_of(found).from_hf(found)


def table(model: ModelConfig) -> LatencyTable:
    """Attention of 10 us a head, an MLP that takes as long with 32 neurons as with 64."""
    about = {"model": {name: getattr(model, name) for name in SAME}}
    return LatencyTable(about, {(4, 2): 40.0, (2, 2): 20.0}, {64: 100.0, 32: 100.0, 16: 30.0}, 7.0)


def test_time_of_a_model_is_that_of_its_parts(root: Path) -> None:
    whole = config(root)
    measured = table(whole)
    assert measured.of(whole) == 7 + 2 * (40 + 100)
    layers = [Block(4, 2, 24), Block(2, 2, 0)]
    assert measured.of(whole.with_blocks(layers)) == 7 + 40 + 65 + 20
    assert measured.of(whole.with_blocks([Block(4, 2, 8), Block(0, 0, 48)])) == 7 + 40 + 15 + 100


def test_a_table_is_only_used_for_what_it_was_measured_on(root: Path) -> None:
    whole = config(root)
    with pytest.raises(UserError, match="no attention with 1 query groups"):
        table(whole).of(replace(whole, num_attention_heads=2, num_query_groups=1))
    with pytest.raises(UserError, match=r"another model: hidden_size 16 \(the table: 32\)"):
        table(whole).of(replace(whole, hidden_size=16))
    with pytest.raises(UserError, match="ends at size 64 and 65"):
        table(whole).of(replace(whole, ffn_hidden_size=65))


def test_what_is_written_is_read_again(root: Path, tmp_path: Path) -> None:
    assert LatencyTable.load(root / "table.json") == table(config(root))
    good = json.loads((root / "table.json").read_text())
    for key, value in (("mlp_us", []), ("attention_us", [[4, 2]]), ("about", {"model": {}}), ("mlp_us", [[64, -1]])):
        (tmp_path / "bad.json").write_text(json.dumps(good | {key: value}))
        with pytest.raises(UserError, match="is not a latency table"):
            LatencyTable.load(tmp_path / "bad.json")


def test_the_verb_measures_every_size(root: Path) -> None:
    given = ["latency", "--input", str(root / "hf"), "--output", str(root / "measured.json"), "--levels", "4"]
    assert main([*given, "--prompt-length", "16", "--repeats", "2"]) == 0
    found = LatencyTable.load(root / "measured.json")
    assert set(found.attention) == {(4, 2), (2, 2), (1, 1)}
    assert set(found.mlp) == {64, 48, 32, 16} and found.rest > 0
    assert found.about["prompt_length"] == 16 and found.about["environment"]["packages"]
    assert found.of(config(root)) == pytest.approx(found.rest + 2 * (found.attention[4, 2] + found.mlp[64]), abs=1)


def measuring(root: Path, **options: int) -> LatencyConfig:
    given = {"levels": 4, "batch_size": 3, "prompt_length": 16, "repeats": 2} | options
    return LatencyConfig(input=root / "hf", output=root / "unused.json", **given)


def test_halves_are_run_alone_on_a_batch_of_prompts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn, once more than they are counted, with the angles of so many positions; the rest makes all logits."""
    ran: list[tuple[Block, dict[str, Any]]] = []

    def layer(model: ModelConfig, dtype: torch.dtype, number: int) -> Callable[..., None]:
        assert dtype == torch.float32 and model.hidden_size == 32
        return lambda **given: ran.append((model.block(number), given))

    monkeypatch.setattr(latency_module, "whole_layer", layer)
    with backend.running(backend.Layout()):
        latency_module.measure(config(root), measuring(root))
        logits = latency_module._rest(config(root), "float32", measuring(root))()
    attention = [Block(heads, groups, 0) for heads, groups in ((1, 1), (2, 2), (4, 2))]
    assert [block for block, _ in ran] == 3 * [*attention, *(Block(0, 0, ffn) for ffn in (16, 32, 48, 64))]
    for _, given in ran:
        assert given.keys() == {"hidden_states", "attention_mask", "rotary_pos_emb"} and given["attention_mask"] is None
        assert given["hidden_states"].shape == (16, 3, 32) and given["hidden_states"].dtype == torch.float32
        assert given["rotary_pos_emb"].shape[0] == 16
    assert logits.shape == (16, 3, 257)  # type: ignore[attr-defined]


def test_medians_are_of_all_rounds_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In microseconds; the parts take turns."""
    now, order = [0.0], []
    costs = {"a": iter([900, 1, 5, 3]), "b": iter([0, 2, 2, 40])}

    def part(name: str) -> None:
        order.append(name)
        now[0] += next(costs[name]) * 1e-6

    monkeypatch.setattr(latency_module, "_now", lambda: now[0])
    found = latency_module._medians([partial(part, "a"), partial(part, "b")], 3)
    assert found == pytest.approx([3, 2]) and order == ["a", "b"] * 4


@pytest.mark.parametrize("blocks", [None, [(0, 0, 48), (4, 2, 64)], [(4, 2, 64)], [(2, 2, 0), (4, 4, 24)]])
def test_layers_that_lack_a_half_are_measured_by_what_they_have(
    root: Path, blocks: list[tuple[int, int, int]] | None
) -> None:
    """Also where that is the first one: every size of every layer is in the table, and so is the model."""
    whole = config(root)
    model = whole if blocks is None else whole.with_blocks([Block(*sizes) for sizes in blocks])
    with backend.running(backend.Layout()):
        found = latency_module.measure(model, measuring(root, levels=2, repeats=1))
    there = {model.block(layer) for layer in range(model.num_layers)}
    assert {(b.num_attention_heads, b.num_query_groups) for b in there if b.num_attention_heads} <= set(found.attention)
    assert {b.ffn_hidden_size for b in there if b.ffn_hidden_size} <= set(found.mlp)
    assert all(heads and groups for heads, groups in found.attention) and all(found.mlp)
    parts = [
        found._attention(model.block(n)) + found._mlp(model.block(n).ffn_hidden_size) for n in range(model.num_layers)
    ]
    assert found.of(model) == round(found.rest + sum(parts)) > 0


@pytest.mark.parametrize("search", ["evolution", "integer"])
def test_a_search_spends_its_budget_where_it_saves_time(root: Path, search: str) -> None:
    """Half of the MLP saves nothing by this table, so no layer ends there; the answer is within the budget."""
    run = root / search
    limit = 230
    given = ["prune", "--input", str(root / "hf"), "--output", str(run), "--method", "darwinlm", *CALIBRATION, *SEARCH]
    given += ["--calibration", str(root / "words.jsonl"), "--search", search]
    given += EVOLVED if search == "evolution" else []
    assert main([*given, "--target", f"{LATENCY}={limit}", "--latency-table", str(root / "table.json")]) == 0
    from megatron_prune.decision.trimming import Trim

    whole = config(root)
    smaller = Trim.load(run / "decision").units.config(whole)
    assert table(whole).of(smaller) <= limit < table(whole).of(whole)
    assert not {48, 32} & {smaller.block(layer).ffn_hidden_size for layer in range(2)}
    assert main(["trim", "--input", str(run), "--output", str(root / f"{search}_small")]) == 0
    assert main(["verify", "--input", str(root / f"{search}_small")]) == 0


def test_free_groups_are_finer_steps(root: Path, tmp_path: Path) -> None:
    from megatron_prune.search.levels import Level, attention_levels

    source = json.loads((tiny_model(tmp_path / "m", "llama", num_attention_heads=8) / "config.json").read_text())
    model = family_of(source).from_hf(source)
    free = attention_levels(model, 0, 10, free_groups=True)
    assert free == [Level(2, 4), Level(2, 3), Level(2, 2), Level(2, 1), Level(1, 1), Level()]
    run = root / "free"
    given = ["prune", "--input", str(root / "hf"), "--output", str(run), "--method", "darwinlm", *CALIBRATION, *SEARCH]
    given += ["--calibration", str(root / "words.jsonl"), "--target", "parameters=27K", "--free-groups"]
    assert main(given) == 0
    assert main(["trim", "--input", str(run), "--output", str(root / "free_small")]) == 0
    assert main(["verify", "--input", str(root / "free_small")]) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--target", "latency_us=200"], "goes with --latency-table"),
        (["--target", "parameters=20K", "--latency-table", "{root}/table.json"], "other targets go without"),
        (["--target", "latency_us=999", "--latency-table", "{root}/table.json"], "the whole model has 287"),
        (["--target", "latency_us=200", "--latency-table", "{root}/words.jsonl"], "is damaged"),
        (["--target", "parameters=20K", "--lr", "1e-3", "--recompute"], "--lr, --recompute was given"),
    ],
)
def test_mistakes_are_one_line(root: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["prune", "--input", str(root / "hf"), "--output", str(root / "never"), "--method", "darwinlm"]
    given += ["--calibration", str(root / "words.jsonl"), *CALIBRATION, *SEARCH]
    assert main([*given, *(word.format(root=root) for word in more)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert said in line and not (root / "never").exists()


def test_other_methods_refuse_it() -> None:
    with pytest.raises(UserError, match="its budgets may limit parameters"):
        get_method("flap").accept(Budget(10, LATENCY))
