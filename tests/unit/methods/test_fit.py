"""Whether a target fits a model's sizes: every number of heads and groups, every share of a row, to the edge."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prune.decision.target import NM, Budget, Shape, Unstructured, parse_target
from megatron_prune.errors import UserError
from megatron_prune.methods.fit import check_shards, check_target
from megatron_prune.model.families import ModelConfig, family_of

HEADS, GROUPS, HEAD, HIDDEN, FFN, LAYERS, WORDS = 12, 4, 8, 36, 88, 3, 100
"""The output projection has 96 inputs, the down projection 88, the others 36."""


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    found: dict[str, Any] = {
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": WORDS,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return family_of(found).from_hf(found)


def said(model: ModelConfig, target: Any) -> str:
    """What a target is refused with; nothing when it fits."""
    try:
        check_target(model, target)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("groups", [None, 1, 2, 3, 4, 5])
def test_every_group_keeps_equally_many_of_its_heads(model: ModelConfig, groups: int | None) -> None:
    """Allowed are the numbers that one, two or three heads in each of the groups make."""
    kept = groups or GROUPS
    makes = [kept * each for each in range(1, HEADS // GROUPS + 1)]
    for heads in range(1, HEADS + 3):
        complaint = said(model, Shape(num_attention_heads=heads, num_query_groups=groups))
        if kept > GROUPS:
            assert complaint.endswith(f"num_query_groups={kept}: the model has {GROUPS}; give that or less") or (
                heads > HEADS and "num_attention_heads" in complaint
            )
        elif heads > HEADS:
            assert complaint.endswith(f"num_attention_heads={heads}: the model has {HEADS}; give that or less")
        elif heads in makes:
            assert not complaint
        else:
            allowed = ", ".join(map(str, makes))
            assert f"heads={heads} with {kept} query groups" in complaint and complaint.endswith(f"allowed: {allowed}")


def test_sizes_may_be_the_models_own_and_no_larger(model: ModelConfig) -> None:
    own = {"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_query_groups": GROUPS}
    for name, size in own.items():
        assert not said(model, Shape(**{name: size})) and not said(model, Shape(**{name: 1}))
        assert said(model, Shape(**{name: size + 1})) == (
            f"target {name}={size + 1}: the model has {size}; give that or less"
        )


def test_a_budget_is_below_the_whole_model(model: ModelConfig) -> None:
    attention = HIDDEN * HEAD * (HEADS + 2 * GROUPS) + HEAD * HEADS * HIDDEN
    whole = 2 * WORDS * HIDDEN + LAYERS * (attention + 3 * HIDDEN * FFN + 2 * HIDDEN) + HIDDEN
    assert not said(model, Budget(whole - 1))
    assert said(model, Budget(whole)) == f"target parameters={whole}: the whole model has {whole}; give less"
    cache = 2 * LAYERS * GROUPS * HEAD * 4
    assert not said(model, Budget(cache - 1, "kv_cache_bytes")) and said(model, Budget(cache, "kv_cache_bytes"))


def test_groups_of_inputs_fill_every_row(model: ModelConfig) -> None:
    """36, 96 and 88 inputs: M of 2 and 4 divide all of them, 8 all but 36, 3 all but 88."""
    for pattern, wrong in (("1:2", ""), ("2:4", ""), ("4:8", "qkv"), ("2:3", "fc2"), ("0.37", "")):
        complaint = said(model, parse_target(pattern))
        assert bool(complaint) == bool(wrong) and wrong in complaint


@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 5, 8, 11, 16, 24])
def test_no_group_lies_across_two_ranks(model: ModelConfig, tensor: int) -> None:
    """Of the linears whose inputs are shared out: the output projection's and the down projection's."""
    for m in (2, 4, 8):
        fits = all(width % tensor == 0 and (width // tensor) % m == 0 for width in (HEADS * HEAD, FFN))
        if fits:
            check_shards(model, NM(1, m), tensor)
        else:
            with pytest.raises(UserError, match=f"gives each rank .* inputs of .*, not a multiple of {m} as 1:{m}"):
                check_shards(model, NM(1, m), tensor)
    check_shards(model, Unstructured(0.5), tensor)
    check_shards(model, Shape(num_layers=2), tensor)


def test_groups_of_an_expert_may_lie_where_it_is_shared() -> None:
    """Of an expert by its own flag, and of the rest of the model by the other."""
    from tests.models import TINY_SIZES

    tiny = {"model_type": "qwen3_moe", "hidden_act": "silu", "rms_norm_eps": 1e-6, **TINY_SIZES["qwen3_moe"]}
    model = family_of(tiny).from_hf(tiny | {"moe_intermediate_size": 12})
    check_shards(model, NM(2, 4), 2, expert_tensor=1)
    check_shards(model, NM(2, 4), 1)
    for tensor, expert_tensor, flag in (
        (1, 2, "--expert-tensor-parallel-size 2"),
        (2, None, "--tensor-model-parallel"),
    ):
        with pytest.raises(UserError, match=rf"{flag}.* gives each rank 6 inputs of .*local_experts\.0\.linear_fc2"):
            check_shards(model, NM(2, 4), tensor, expert_tensor)
