"""Scores from gradients against the papers' formulas on what autograd gives in transformers' model: random weights,
three heads in each group, nothing planted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import parse_any_target
from megatron_prune.decision.units import Units
from megatron_prune.methods.base import get_method
from megatron_prune.methods.llm_pruner import LLMPruner
from megatron_prune.methods.structured import Refitted
from megatron_prune.methods.taylor import Importance
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.statistics.passes import Passes
from tests.models import tiny_model
from tests.reference import GROUPS, HEADS, UNEVEN, WIDTH, Reference, best

LAYERS, HIDDEN, FFN = 3, 48, 40
TOKENS = torch.randint(64, (5, 16), generator=torch.Generator().manual_seed(4))
FORMS = ("vector", "element1", "element2", "mix")
ALL = {"protected_first": 0, "protected_last": 0, "gradient_windows": 0, "gradient_length": 0}
GPT2 = {"vocab_size": 64, "n_embd": 48, "n_inner": 40, "n_layer": 3, "n_head": 6, "n_positions": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", UNEVEN),
    "tied": ("llama", UNEVEN | {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2),  # tied, biases, learned positions, matrices turned, one for query, key and value
}


@dataclass(frozen=True)
class Both:
    """A model here and in transformers."""

    model: PrunableModel
    reference: Reference
    gradients: dict[str, Tensor]
    """Of each window by each parameter, transformers'."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Both]]:
    with backend.running(backend.Layout()):
        found = {}
        for name, (family, sizes) in MODELS.items():
            path = tiny_model(tmp_path_factory.mktemp(name), family, **sizes)
            reference = Reference(path, TOKENS)
            found[name] = Both(open_model(path).load(backend.Layout()), reference, reference.gradients())
        yield found


def chosen(model: PrunableModel, name: str, target: str, tokens: Tensor = TOKENS, **options: Any) -> Units:
    method = get_method(name, **options)
    assert isinstance(method, Refitted)
    return method.choose(model.config, Passes(model, tokens), parse_any_target(target))  # type: ignore[arg-type]


def importance(model: PrunableModel, form: str, tokens: Tensor = TOKENS, outer: bool = True) -> Importance:
    method = LLMPruner(taylor=form, gradient_windows=0, gradient_length=0)
    return method._importance(model.config, Passes(model, tokens), outer)


class Oracle:
    """The formulas of the paper, section 3.2, on per-window gradients of the sum of the windows' losses."""

    def __init__(self, both: Both, form: str) -> None:
        self.both = both
        self.form = form

    def along(self, name: str, dim: int) -> Tensor:
        """Importance of every index of a parameter's dimension."""
        w, g = self.both.reference.weight(name), self.both.gradients[name]
        first, second = w * g.sum(0), w**2 * (g**2).sum(0)
        rest = [d for d in range(w.dim()) if d != dim]

        def total(x: Tensor) -> Tensor:
            return x.sum(rest) if rest else x

        if self.form == "vector":
            return total(first).abs()
        return total({"element1": first, "element2": second, "mix": first - second / 2}[self.form].abs())

    def llama_layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of its groups, its neurons and, of its tensors, the channels."""
        at, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        ffn = self.along(f"{mlp}gate_proj.weight", 0) + self.along(f"{mlp}up_proj.weight", 0)
        ffn = ffn + self.along(f"{mlp}down_proj.weight", 1)
        query = self.along(f"{at}q_proj.weight", 0) + self.along(f"{at}o_proj.weight", 1)
        key_value = self.along(f"{at}k_proj.weight", 0) + self.along(f"{at}v_proj.weight", 0)
        heads, shared = query.view(HEADS, WIDTH).sum(1), key_value.view(GROUPS, WIDTH).sum(1)
        groups = torch.stack([heads[:3].sum() + shared[0], heads[3:].sum() + shared[1]])
        hidden = sum(self.along(f"{at}{x}_proj.weight", 1) for x in "qkv") + self.along(f"{at}o_proj.weight", 0)
        hidden = hidden + self.along(f"{mlp}gate_proj.weight", 1) + self.along(f"{mlp}up_proj.weight", 1)
        hidden = hidden + self.along(f"{mlp}down_proj.weight", 0)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            hidden = hidden + self.along(f"model.layers.{layer}.{norm}.weight", 0)
        return groups, ffn, hidden

    def gpt2_layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `llama_layer`; matrices are `[in, out]`, every head is a group."""
        h = f"transformer.h.{layer}."
        rows = self.along(h + "attn.c_attn.weight", 1) + self.along(h + "attn.c_attn.bias", 0)
        groups = rows.view(3, HEADS, WIDTH).sum((0, 2))
        groups = groups + self.along(h + "attn.c_proj.weight", 0).view(HEADS, WIDTH).sum(1)
        ffn = self.along(h + "mlp.c_fc.weight", 1) + self.along(h + "mlp.c_fc.bias", 0)
        ffn = ffn + self.along(h + "mlp.c_proj.weight", 0)
        hidden = self.along(h + "attn.c_attn.weight", 0) + self.along(h + "mlp.c_fc.weight", 0)
        for linear in ("attn.c_proj", "mlp.c_proj"):
            hidden = hidden + self.along(f"{h}{linear}.weight", 1) + self.along(f"{h}{linear}.bias", 0)
        for norm in ("ln_1", "ln_2"):
            hidden = hidden + self.along(f"{h}{norm}.weight", 0) + self.along(f"{h}{norm}.bias", 0)
        return groups, ffn, hidden

    def outside(self, name: str) -> Tensor:
        """Channels of the tensors outside all layers."""
        if name == "gpt2":
            ends = [self.along(f"transformer.{table}.weight", 1) for table in ("wte", "wpe")]
            return sum([*ends, *(self.along(f"transformer.ln_f.{x}", 0) for x in ("weight", "bias"))], torch.zeros(48))
        hidden = self.along("model.embed_tokens.weight", 1) + self.along("model.norm.weight", 0)
        return hidden + self.along("lm_head.weight", 1) if name == "untied" else hidden


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_importance_is_the_papers_formula_over_all_coupled_tensors(
    models: dict[str, Both], name: str, form: str
) -> None:
    both = models[name]
    oracle = Oracle(both, form)
    found = importance(both.model, form)
    hidden = oracle.outside(name)
    for layer in range(LAYERS):
        groups, ffn, part = oracle.gpt2_layer(layer) if name == "gpt2" else oracle.llama_layer(layer)
        hidden = hidden + part
        torch.testing.assert_close(found.groups[layer], groups, rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(found.ffn[layer], ffn, rtol=2e-4, atol=1e-6)
        assert found.layers[layer] == pytest.approx(float(groups.sum() + ffn.sum()), rel=1e-4)
    torch.testing.assert_close(found.hidden, hidden, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_what_is_most_important_stays(models: dict[str, Both], name: str, form: str) -> None:
    both = models[name]
    oracle = Oracle(both, form)
    parts = [oracle.llama_layer(layer) for layer in range(LAYERS)]
    options = {"taylor": form, **ALL}
    width = chosen(both.model, "llm_pruner", "num_query_groups=1,ffn_hidden_size=23,hidden_size=29", **options)
    for block, (groups, ffn, _) in zip(width.blocks, parts, strict=True):
        assert block.groups == best(groups, 1) and block.ffn == best(ffn, 23)
        assert block.heads == tuple(range(3 * block.groups[0], 3 * block.groups[0] + 3))
    assert width.hidden == best(sum((hidden for _, _, hidden in parts), oracle.outside(name)), 29)
    layers = torch.stack([groups.sum() + ffn.sum() for groups, ffn, _ in parts])
    assert chosen(both.model, "llm_pruner", "num_layers=2", **options).layers == best(layers, 2)


def test_only_the_first_tokens_of_the_first_windows_are_looked_at(models: dict[str, Both]) -> None:
    model, target = models["untied"].model, "num_query_groups=1,ffn_hidden_size=23"
    few = {**ALL, "gradient_windows": 2, "gradient_length": 7}
    assert chosen(model, "llm_pruner", target, **few) == chosen(model, "llm_pruner", target, TOKENS[:2, :7], **ALL)
    assert chosen(model, "llm_pruner", target, **few) != chosen(model, "llm_pruner", target, **ALL)
    default = get_method("llm_pruner").options()
    assert (default["gradient_windows"], default["gradient_length"]) == (10, 64)


def test_gradients_outside_all_layers_come_when_they_are_complete(models: dict[str, Both]) -> None:
    both = models["untied"]
    order = [(layer, sorted(found)) for layer, found in Passes(both.model, TOKENS).gradients(outer=True)]
    assert order[0] == (None, ["decoder.final_layernorm.weight", "output_layer.weight"])
    assert [layer for layer, _ in order[1:-1]] == [2, 1, 0]
    assert order[-1] == (None, ["embedding.word_embeddings.weight"])
    assert all(layer is not None for layer, _ in Passes(both.model, TOKENS).gradients())


def test_a_channel_from_the_embedding_to_the_output_is_not_removed_for_being_absent_from_the_layers(
    tmp_path: Path,
) -> None:
    """No layer reads or writes channel 7; it carries 15 times an embedding to 8 times an output row."""
    path = tiny_model(tmp_path, "llama", num_hidden_layers=4)
    reference = Reference(path, TOKENS)
    with torch.no_grad():
        for name, weight in reference.model.named_parameters():
            if "proj" in name:
                (weight[7] if "o_proj" in name or "down" in name else weight[:, 7]).zero_()
        reference.model.model.embed_tokens.weight[:, 7] *= 15
        reference.model.lm_head.weight[:, 7] *= 8
    reference.model.save_pretrained(path)
    model = open_model(path).load(backend.Layout())
    for form in FORMS:
        assert 7 in chosen(model, "llm_pruner", "hidden_size=31", taylor=form, **ALL).hidden


# --- Shortened LLaMA ---


def deep(path: Path) -> Both:
    """Eight layers of different importance."""
    tiny_model(path, "llama", **(UNEVEN | {"num_hidden_layers": 8}))
    reference = Reference(path, TOKENS)
    return Both(open_model(path).load(backend.Layout()), reference, reference.gradients())


def test_layers_are_ranked_by_their_loss_or_by_taylor(tmp_path: Path) -> None:
    """`ppl` and `taylor` protect no layer; `+` is the first four and the last two."""
    both = deep(tmp_path)
    taylor = torch.zeros(8).double()
    for name, gradient in both.gradients.items():
        if "_proj" in name:  # matrices alone: no norms
            taylor[int(name.split(".")[2])] += (both.reference.weight(name) * gradient.sum(0)).abs().sum()
    losses = []
    for layer in range(8):
        kept = [module for number, module in enumerate(both.reference.layers) if number != layer]
        with both.reference.only(kept) as shorter:
            losses.append(
                sum(float(shorter(w[None], labels=w[None], use_cache=False).loss) for w in TOKENS) / len(TOKENS)
            )
    for count in (2, 5, 7):
        target = f"num_layers={8 - count}"
        assert chosen(both.model, "shortened_llama", target).layers == best(torch.tensor(losses), 8 - count)
        by_taylor = chosen(both.model, "shortened_llama", target, criterion="taylor")
        assert by_taylor.layers == best(taylor, 8 - count)
    plus = chosen(both.model, "shortened_llama", "num_layers=7", criterion="taylor+")
    assert set(range(8)) - set(plus.layers) == {4 if taylor[4] < taylor[5] else 5}
    plus = chosen(both.model, "shortened_llama", "num_layers=6", criterion="taylor+")
    assert plus.layers == (0, 1, 2, 3, 6, 7)
