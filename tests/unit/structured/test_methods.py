"""What does nothing is what goes: planted units, published choices from given scores, bad requests."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import Budget, parse_any_target
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.methods.base import get_method
from megatron_prune.methods.depth import exchanged
from megatron_prune.methods.fit import check_target
from megatron_prune.methods.flap import Flap, standardised
from megatron_prune.methods.minitron import head_scores
from megatron_prune.methods.shape_search import candidates
from megatron_prune.methods.structured import Refitted, keep_best, lowest
from megatron_prune.methods.taylor import salience
from megatron_prune.model.cost import parameters
from megatron_prune.model.forward import logits
from megatron_prune.model.prunable import FC1, FC2, LINEARS, PROJECTION, QKV, PrunableModel
from megatron_prune.statistics.channels import RESIDUAL, BlockInfluence, ChannelActivations
from megatron_prune.statistics.gradients import Gradient
from megatron_prune.statistics.passes import Passes
from megatron_prune.statistics.store import StatisticsStore
from megatron_prune.statistics.walk import LayerWalk
from tests.models import tiny_blocks, tiny_model

LAYERS, GROUP, NEURON, CHANNEL, LAYER = 4, 1, 5, 7, 2


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with backend.running(backend.Layout()):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PrunableModel:
    """A model in which a group, a neuron and a channel of every layer and a whole layer do nothing."""
    path = tiny_model(tmp_path_factory.mktemp("planted"), "llama", num_hidden_layers=LAYERS)
    planted = open_model(path).load(backend.Layout())

    def change(name: str, zero: Any) -> None:
        map = planted.by_name[name]
        tensor = planted.whole(map).clone()
        zero(tensor)
        planted.assign(map, tensor)

    def no_value(qkv: torch.Tensor) -> None:  # rows of a group: two heads of queries, a key, a value, 8 channels each
        qkv.unflatten(0, (2, 32))[GROUP, 24:] = 0

    for layer in range(LAYERS):
        name = f"decoder.layers.{layer}."
        change(name + "self_attention.linear_qkv.weight", no_value)
        change(name + "mlp.linear_fc1.weight", lambda w: w.unflatten(0, (2, 64))[1, NEURON].zero_())
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            change(name + norm + ".weight", lambda gain: gain[CHANNEL].zero_())
        for path_ in ("self_attention.linear_proj", "mlp.linear_fc2"):
            change(name + path_ + ".weight", lambda w: w[CHANNEL].zero_())
            if layer == LAYER:
                change(name + path_ + ".weight", lambda w: w.zero_())
    change("embedding.word_embeddings.weight", lambda w: w[:, CHANNEL].zero_())
    return planted


def chosen(model: PrunableModel, name: str, target: str, **options: Any) -> Units:
    method = get_method(name, **options)
    assert isinstance(method, Refitted)
    tokens = own_text(model)
    asked = parse_any_target(target)
    check_target(model.config, asked)
    return method.choose(model.config, Passes(model, tokens), asked)  # type: ignore[arg-type]


@functools.cache
def own_text(model: PrunableModel) -> torch.Tensor:
    """Windows `[6, 24]` that the model itself has written: every layer that works makes them likelier."""
    tokens = torch.randint(128, (6, 1), generator=torch.Generator().manual_seed(1))
    for _ in range(23):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


WIDTH = [
    ("minitron", {}),
    ("minitron", {"heads": "activations"}),
    ("minitron", {"heads": "activations", "batch": "mean", "sequence": "l2"}),
    ("minitron", {"heads": "activations", "sequence": "var"}),
]
ENDS = {"protected_first": 0, "protected_last": 0}
TAYLOR = [("llm_pruner", {"taylor": taylor, **ENDS}) for taylor in ("vector", "element1", "element2", "mix")]


@pytest.mark.parametrize(("name", "options"), [*WIDTH, *TAYLOR, ("llm_pruner", {"global_ranking": True, **ENDS})])
def test_a_group_and_a_neuron_that_do_nothing_go(model: PrunableModel, name: str, options: dict[str, Any]) -> None:
    units = chosen(model, name, "num_query_groups=1,ffn_hidden_size=63", **options)
    layers = [n for n in range(LAYERS) if n != LAYER]  # of the layer that does nothing any neuron is as good
    assert all(units.blocks[n].groups == (1 - GROUP,) for n in layers)
    assert all(units.blocks[n].heads == (0, 1) for n in layers)
    if not options.get("global_ranking"):
        assert all(NEURON not in units.blocks[n].ffn and len(units.blocks[n].ffn) == 63 for n in layers)


@pytest.mark.parametrize(("name", "options"), [*WIDTH, *TAYLOR])
def test_a_channel_that_does_nothing_goes(model: PrunableModel, name: str, options: dict[str, Any]) -> None:
    units = chosen(model, name, "hidden_size=31", **options)
    assert units.hidden == tuple(n for n in range(32) if n != CHANNEL)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("shortgpt", {}),
        ("shortened_llama", {}),
        ("shortened_llama", {"criterion": "taylor"}),
        ("shortened_llama", {"criterion": "taylor", "protected_first": 1, "protected_last": 1}),
        ("llm_pruner", ENDS),
        *(("minitron", {"depth": depth}) for depth in ("block_influence", "contiguous", "single", "combined")),
    ],
)
def test_a_layer_that_does_nothing_goes(model: PrunableModel, name: str, options: dict[str, Any]) -> None:
    assert chosen(model, name, "num_layers=3", **options).layers == (0, 1, 3)


def test_flap_removes_what_does_not_fluctuate(model: PrunableModel) -> None:
    """Of every layer what does nothing goes first, and the budget is met with the last unit removed."""
    budget = parameters(model.config) - 7000
    units = chosen(model, "flap", f"parameters={budget}")
    assert budget - 48 * 32 < parameters(units.config(model.config)) <= budget
    for layer, block in enumerate(units.blocks):
        if layer != LAYER:
            assert len(block.ffn) == 64 or NEURON not in block.ffn
            assert len(block.groups) == 2 or block.groups == (1 - GROUP,)
    assert any(len(block.ffn) < 64 for block in units.blocks)


def test_a_budget_gets_the_best_of_the_shapes_within_it(model: PrunableModel) -> None:
    """Close to the budget, never above; of the candidates the one of lowest loss; a hopeless budget is refused."""
    budget = Budget(int(0.8 * parameters(model.config)))
    shapes = list(candidates(model.config, budget))
    sizes = [parameters(replace(model.config, **shape.given())) for shape in shapes]  # type: ignore[arg-type]
    assert len(shapes) > 3 and all(0.95 * budget.limit <= size <= budget.limit for size in sizes)
    assert all(shape.hidden_size % shape.num_attention_heads == 0 for shape in shapes)  # type: ignore[operator]
    units = chosen(model, "minitron", str(budget), depth="block_influence")
    smaller = units.config(model.config)
    assert parameters(smaller) in sizes
    if smaller.num_layers < LAYERS:
        assert LAYER not in units.layers
    with pytest.raises(UserError, match="no shape"):
        chosen(model, "minitron", "parameters=9K")


def test_kept_statistics_serve_another_target_without_a_pass(
    model: PrunableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, method = own_text(model), get_method("minitron")
    assert isinstance(method, Refitted)
    first, other = parse_any_target("ffn_hidden_size=40"), parse_any_target("num_query_groups=1,hidden_size=24")

    def choose(target: Any, store: StatisticsStore | None) -> Units:
        return method.choose(model.config, Passes(model, tokens, store=store), target)  # type: ignore[attr-defined]

    expected = choose(other, None)
    assert choose(first, StatisticsStore(tmp_path / "kept", model, tokens)) == choose(first, None)
    with monkeypatch.context() as patched:
        patched.setattr(LayerWalk, "__init__", lambda *_: pytest.fail("a pass was run"))
        assert choose(other, StatisticsStore(tmp_path / "kept", model, tokens)) == expected
    with pytest.raises(UserError, match="another tokens"):
        StatisticsStore(tmp_path / "kept", model, tokens.flip(0))
    file = next((tmp_path / "kept").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match="missing or damaged"):
        choose(other, StatisticsStore(tmp_path / "kept", model, tokens))


def test_part_of_the_windows_has_a_folder_of_its_own_or_none(model: PrunableModel, tmp_path: Path) -> None:
    tokens = own_text(model)
    passes = Passes(model, tokens, store=StatisticsStore(tmp_path / "kept", model, tokens))
    named = passes.part(slice(0, 4), "fit")
    assert named.store is not None and named.store.folder == tmp_path / "kept" / "fit"
    assert torch.equal(named.tokens, tokens[:4])  # type: ignore[arg-type]
    assert passes.part(slice(4, 6)).store is None
    assert Passes(model, tokens).part(slice(0, 4), "fit").store is None


def test_only_what_a_layer_has_is_seen(tmp_path: Path) -> None:
    """Of layers that lack their attention, neither half, or their MLP."""
    blocks = open_model(tiny_blocks(tmp_path)).load(backend.Layout())
    tokens = torch.randint(128, (2, 8), generator=torch.Generator().manual_seed(0))
    found = Passes(blocks, tokens).observe({**dict.fromkeys(LINEARS, ChannelActivations), RESIDUAL: BlockInfluence})
    attention, mlp = {QKV, PROJECTION}, {FC1, FC2}
    assert [set(layer) - {RESIDUAL} for layer in found] == [mlp, attention | mlp, attention, attention | mlp]
    assert all(RESIDUAL in layer for layer in found)


def test_losses_without_layers_are_those_of_smaller_models(model: PrunableModel) -> None:
    """Shared prefixes change nothing."""
    tokens = torch.randint(128, (5, 24), generator=torch.Generator().manual_seed(2))
    passes = Passes(model, tokens)
    sets = [frozenset[int](), frozenset({0}), frozenset({1, 3}), frozenset({1}), frozenset({LAYER})]
    losses = passes.losses_without(sets)
    alone = [passes.loss(Units.all(model.config).without_layers(removed)) for removed in sets]
    assert losses == pytest.approx(alone, rel=1e-6)
    assert losses[0] == pytest.approx(losses[4], rel=1e-6) and losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_sets_of_layers_share_passes_as_far_as_their_states_may_be_held(
    model: PrunableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine sets' states of 5 x 24 tokens x 32 channels in float32: ten sets are two passes, with the same losses."""
    tokens = torch.randint(128, (5, 24), generator=torch.Generator().manual_seed(2))
    passes, widths = Passes(model, tokens), []
    plain = Passes._losses_without

    def counted(self: Passes, sets: list[frozenset[int]]) -> Any:
        widths.append(len(sets))
        return plain(self, sets)

    sets = [frozenset({n % LAYERS, n // LAYERS}) for n in range(10)]
    expected = passes.losses_without(sets)
    monkeypatch.setattr(Passes, "_losses_without", counted)
    for held, found in ((9 * 5 * 24 * 32 * 4, [9, 1]), (9 * 5 * 24 * 32 * 4 - 1, [8, 2]), (1, [8, 2]), (10**9, [10])):
        monkeypatch.setattr("megatron_prune.statistics.passes.HELD_BYTES", held)
        widths.clear()
        assert passes.losses_without(sets) == expected and widths == found


def test_shapes_of_a_deep_model_are_a_tenth_of_its_layers_apart(model: PrunableModel) -> None:
    config = replace(model.config, num_layers=35, hidden_size=64)
    shapes = candidates(config, Budget(int(0.7 * parameters(config))))
    assert {shape.num_layers for shape in shapes} == {35, 31, 27, 23}
    shape = shapes[0]
    exact = Budget(parameters(replace(config, **shape.given())))  # type: ignore[arg-type]
    assert shape in candidates(config, exact)


def test_options_out_of_range_are_refused(model: PrunableModel) -> None:
    for damping in (0.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="refit_damping"):
            Flap(refit_damping=damping)
    Flap(refit_damping=1e6)
    Flap(refit="local").check(model.config, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no biases to take the mean"):
        Flap(refit="mean").check(model.config, None)  # type: ignore[arg-type]
    Flap(refit="mean").check(replace(model.config, linear_bias=True), None)  # type: ignore[arg-type]


def test_gradients_are_those_of_autograd(model: PrunableModel) -> None:
    """Against transformers' own backward pass over the same windows."""
    from megatron_prune.model.convert import split

    tokens = torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(3))
    found = dict(Passes(model, tokens).gradients())
    reference = reference_gradients(model, tokens)
    for name, gradient in found[1].items():
        map = model.by_name[f"decoder.layers.1.{name}"]
        for hf, part in zip(map.hf, split(map, gradient.total, model.config), strict=True):
            torch.testing.assert_close(part.float(), reference[hf], atol=1e-5, rtol=1e-4)


def reference_gradients(model: PrunableModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum over windows of the gradients of their mean losses, by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**model.config.hf_config)
    theirs = AutoModelForCausalLM.from_config(config).float()
    theirs.load_state_dict({name: weight.clone() for name, weight in model.hf_weights()}, strict=False)
    for window in tokens:
        theirs(window[None], labels=window[None]).loss.backward()
    return {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}


def test_shortgpt_on_given_scores_chooses_the_published_layers() -> None:
    """LLaMA-2 7B, 9 layers: the paper's set 21 to 29, whatever the order of the scores inside it."""
    scores = [1.0 - 0.02 * n for n in range(32)]
    for rank, layer in enumerate([27, 26, 25, 28, 24, 29, 23, 21, 22]):
        scores[layer] = 0.01 * rank
    assert lowest(scores, 9) == tuple(range(21, 30))
    assert lowest(scores, 2, protected={27, 26}) == (25, 28)


def test_scores_of_single_tensors() -> None:
    assert torch.allclose(head_scores(torch.tensor([3.0, 4.0, 0.0, 1.0]), 2), torch.tensor([5.0, 1.0]))
    assert keep_best(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2) == (1, 3)
    assert torch.allclose(standardised(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]))
    assert torch.equal(standardised(torch.ones(3)), torch.zeros(3))
    gradient = Gradient(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    gradient.add(torch.tensor([[1.0, -1.0], [0.0, 2.0]]))
    gradient.add(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    parts = (gradient.weight, gradient.total, gradient.squares)
    expected = {"vector": [0.0, 4.0], "element1": [4.0, 8.0], "element2": [6.0, 40.0]}
    for taylor, rows in expected.items():
        assert torch.allclose(salience(*parts, taylor, 0).float(), torch.tensor(rows))
    first, second = torch.tensor([[2.0, -2.0], [6.0, -2.0]]), torch.tensor([[2.0, 4.0], [36.0, 4.0]])
    assert torch.allclose(salience(*parts, "mix", 1).float(), (first - second / 2).abs().sum(0))
    by_rows = Gradient(gradient.weight)
    by_rows.add(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    by_rows.add_rows(torch.tensor([0]), torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 0.0]]))
    assert torch.equal(by_rows.total, torch.tensor([[4.0, -1.0], [0.0, 2.0]]).double())
    assert torch.equal(by_rows.squares, torch.tensor([[16.0, 1.0], [0.0, 4.0]]).double())


class Additive:
    """Passes over a model whose loss grows by a number for each layer that is missing; remembers what was asked."""

    def __init__(self, worth: list[float]) -> None:
        self.worth = worth
        self.asked: list[list[frozenset[int]]] = []

    def losses_without(self, sets: list[frozenset[int]]) -> list[float]:
        self.asked.append(sets)
        return [sum(self.worth[layer] for layer in removed) for removed in sets]

    def window_losses_without(self, sets: list[frozenset[int]]) -> list[list[float]]:
        """Of four windows, far apart in how hard they are, which every set of layers shares."""
        return [[loss + 100 * window for window in range(4)] for loss in self.losses_without(sets)]


def test_the_exchanges_that_promise_most_are_tried() -> None:
    """Of 5 x 15 the 32 of lowest difference, none of a protected layer, until none helps; at most four rounds."""
    worth = [float((7 * n) % 20) for n in range(20)]
    passes, start = Additive(worth), frozenset({1, 2, 3, 4, 6})
    found = exchange(passes, start)
    others = [n for n in range(1, 20) if n not in start]
    pairs = sorted((worth[new] - worth[old], old, new) for old in start for new in others)[:32]
    assert passes.asked[0] == [start - {old} | {new} for _, old, new in pairs]
    assert found == frozenset(sorted(range(1, 20), key=worth.__getitem__)[:5])
    assert exchange(Additive(worth), found) == found
    rising = Additive([float(n) for n in range(20)])
    assert exchange(rising, frozenset(range(14, 20))) == frozenset({1, 2, 3, 4, 14, 15})
    assert exchange(rising, frozenset(range(20))) == frozenset(range(20))


def exchange(passes: Additive, start: frozenset[int]) -> frozenset[int]:
    """With layer 0 protected."""
    return exchanged(passes, passes, start, passes.worth, frozenset({0}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "target", "options", "why"),
    [
        ("shortgpt", "ffn_hidden_size=32", {}, "supports num_layers"),
        ("shortgpt", "num_layers=9", {}, "the model has 4"),
        ("minitron", "num_attention_heads=3", {}, "allowed: 2, 4"),
        ("minitron", "parameters=1B", {}, "give less"),
        ("flap", "num_layers=3", {}, "a budget"),
        ("flap", "parameters=20", {}, "too many"),
        ("shortened_llama", "num_layers=3", {"criterion": "taylor+"}, "4 are protected"),
        ("shortened_llama", "num_layers=3", {"protected_first": 3, "protected_last": 1}, "4 are protected"),
        ("shortened_llama", "num_layers=3", {"protected_first": 9}, "4 are protected"),
        ("shortened_llama", "num_layers=3", {"protected_last": 9}, "4 are protected"),
        ("shortened_llama", "num_layers=3", {"criterion": "size"}, "allowed: ppl, taylor, taylor"),
        ("shortened_llama", "num_layers=3", {"protected_last": -1}, "0 or more"),
        ("llm_pruner", "num_layers=3", {"protected_last": -1}, "0 or more"),
        ("llm_pruner", "num_layers=3", {"gradient_length": 1}, "at least 2 tokens"),
        ("llm_pruner", "num_query_groups=1", {}, "leave 0 to prune"),
        ("minitron", "num_layers=3", {"depth": "deep"}, "allowed: block_influence"),
        ("minitron", "num_layers=3", {"refit": "all"}, "allowed: none, mean"),
        ("llm_pruner", "num_layers=3", {"taylor": "third"}, "allowed: vector"),
    ],
)
def test_requests_that_cannot_be_met(
    model: PrunableModel, name: str, target: str, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        chosen(model, name, target, **options)
