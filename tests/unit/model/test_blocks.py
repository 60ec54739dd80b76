"""Layers of different sizes: config.json and back, the weight table, what a token costs, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.errors import UserError
from megatron_prune.model import convert
from megatron_prune.model.blocks import Block, to_list
from megatron_prune.model.convert import HFReader
from megatron_prune.model.cost import kv_cache_bytes, parameters
from megatron_prune.model.families import FAMILIES, ModelConfig, check_exportable, dimensions, family_of, get_family
from megatron_prune.training.throughput import flops_per_token
from tests.models import tiny_blocks, tiny_llama

LAYERS = [Block(4, 2, 64), Block(0, 0, 48), Block(2, 2, 0), Block(6, 2, 64)]


def tiny_config(path: Path, **overrides: Any) -> ModelConfig:
    """Sizes of a uniform model of four layers: hidden 48, heads 8 wide."""
    sizes = dict(hidden_size=48, num_attention_heads=6, head_dim=8, num_hidden_layers=4)
    return HFReader(tiny_llama(path / "hf", **sizes | overrides)).model_config


def test_config_json_and_back(tmp_path: Path) -> None:
    uniform = tiny_config(tmp_path)
    config = uniform.with_blocks(LAYERS)
    assert (config.num_attention_heads, config.num_query_groups, config.ffn_hidden_size) == (6, 2, 64)
    written = get_family("llama").to_hf(config)
    assert written["model_type"] == "llama_blocks" and written["architectures"] == ["BlocksLlamaForCausalLM"]
    again = family_of(written).from_hf(json.loads(json.dumps(written)))
    assert replace(again, hf_config={}) == replace(config, hf_config={})
    assert again.fingerprint() == config.fingerprint() != uniform.fingerprint()
    assert get_family("llama").to_hf(again) == written
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_equal_layers_are_no_blocks(tmp_path: Path) -> None:
    uniform = tiny_config(tmp_path)
    assert uniform.with_blocks([uniform.block(0)] * 4) == uniform
    assert "blocks" not in uniform.to_dict(), "uniform checkpoints are as they were"
    assert uniform.with_blocks([Block(3, 1, 10)] * 2).num_layers == 2


def test_table_has_each_layers_shapes_and_lacks_absent_halves(tmp_path: Path) -> None:
    config = tiny_config(tmp_path).with_blocks(LAYERS)
    maps = {map.megatron: map for map in get_family("llama").weights(config)}
    shapes = {name.split(".", 2)[2]: map.shape for name, map in maps.items() if map.layer is not None}
    assert not [
        name for name in shapes if name.startswith(("1.self_attention", "1.input_layernorm", "2.mlp", "2.pre_mlp"))
    ]
    assert shapes["0.self_attention.linear_qkv.weight"] == ((4 + 2 + 2) * 8, 48)
    assert shapes["2.self_attention.linear_proj.weight"] == (48, 2 * 8)
    assert shapes["1.mlp.linear_fc1.weight"] == (2 * 48, 48)
    assert maps["decoder.layers.3.self_attention.linear_qkv.weight"].shard_unit == (3 + 2) * 8


def test_merge_and_split_use_the_layers_own_groups(tmp_path: Path) -> None:
    config = tiny_config(tmp_path).with_blocks(LAYERS)
    for map in get_family("llama").weights(config):
        parts = [torch.randn(shape) for shape in map.shapes]
        whole = convert.merge(map, parts, config)
        assert whole.shape == map.shape
        assert all(torch.equal(a, b) for a, b in zip(parts, convert.split(map, whole, config), strict=True))
        shards = [convert.shard(map, whole, rank, 2) for rank in range(2)]
        assert torch.equal(convert.unshard(map, shards, config), whole)
        if map.megatron.endswith("2.self_attention.linear_qkv.weight"):  # groups of one head
            assert torch.equal(whole[:24], torch.cat([part[:8] for part in parts]))


def test_costs_are_sums_over_the_layers(tmp_path: Path) -> None:
    uniform = tiny_config(tmp_path)
    config = uniform.with_blocks(LAYERS)
    attention = [48 * 8 * (2 * h + 2 * g) + 48 * bool(h) for h, g in ((4, 2), (0, 0), (2, 2), (6, 2))]
    mlp = [3 * 48 * ffn + 48 * bool(ffn) for ffn in (64, 48, 0, 64)]
    assert parameters(config) == sum(attention) + sum(mlp) + 2 * 128 * 48 + 48
    assert kv_cache_bytes(config) == 2 * (2 + 2 + 2) * 8 * 4
    saved = flops_per_token(uniform, 100) - flops_per_token(config, 100)
    layers = range(4)
    fewer = sum(dimensions(uniform, n)["query"] - dimensions(config, n)["query"] for n in layers)
    norms = 2 * 48  # of the absent halves
    assert saved == 6 * (parameters(uniform) - parameters(config) - norms) + 12 * 100 * fewer


def test_uniform_fills_groups_and_adds_groups(tmp_path: Path) -> None:
    llama, config = get_family("llama"), tiny_config(tmp_path)
    assert llama.uniform(config) == config
    assert llama.uniform(config.with_blocks(LAYERS)) == config
    five = replace(config, num_attention_heads=5, num_query_groups=5)
    assert llama.uniform(five).num_attention_heads == llama.uniform(five).num_query_groups == 6
    seven = replace(config, num_attention_heads=7, num_query_groups=1)
    assert (llama.uniform(seven).num_attention_heads, llama.uniform(seven).num_query_groups) == (8, 1)
    nine = config.with_blocks([Block(3, 3, 8), Block(6, 2, 8)])  # 3 groups of 3 heads hold both
    assert (
        nine.num_attention_heads,
        llama.uniform(nine).num_attention_heads,
        llama.uniform(nine).num_query_groups,
    ) == (
        9,
        12,
        3,
    )


def test_what_transformers_would_not_open_is_said_early(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    check_exportable(config)
    check_exportable(config.with_blocks(LAYERS))
    with pytest.raises(UserError, match="44 is not a multiple of the 6 attention heads.*--layers padded"):
        check_exportable(replace(config, hidden_size=44))
    with pytest.raises(UserError, match="hidden_size 48 has no divisor from 49 on"):
        check_exportable(config.with_blocks([Block(49, 49, 8), Block(1, 1, 8), Block(0, 0, 8)]))
    gpt2 = HFReader(tiny_blocks(tmp_path / "gpt2", "gpt2")).model_config
    check_exportable(gpt2)
    with pytest.raises(UserError, match="hidden_size 32 has no divisor from 5 on"):
        check_exportable(gpt2.with_blocks([Block(5, 5, 8), Block(1, 1, 8)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda blocks: {}, "no list of layers"),
        (lambda blocks: blocks[:-1], "4 layers and 3 block_configs"),
        (lambda blocks: [*blocks[:-1], {"attention": {"no_op": True}}], "layer 3 lacks attention or ffn"),
        (lambda blocks: [*blocks[:-1], 7], "layer 3 lacks attention or ffn"),
        (lambda blocks: [blocks[0] | {"ffn": {"ffn_mult": 2.6}}, *blocks[1:]], "layer 0 gives ffn_hidden_size = None"),
        (lambda blocks: [blocks[0] | {"ffn": {"replace_with_linear": True}}, *blocks[1:]], "replace_with_linear"),
        (
            lambda blocks: [blocks[0] | {"attention": {"num_attention_heads": 3, "num_query_groups": 2}}, *blocks[1:]],
            "layer 0 has 3 attention heads and 2 query groups",
        ),
        (lambda blocks: to_list([Block(0, 0, 8)] * 4), "no layer keeps its attention; at least one of the 4"),
    ],
)
def test_lists_that_are_not_ours_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    written = FAMILIES["llama"].to_hf(tiny_config(tmp_path).with_blocks(LAYERS))
    with pytest.raises(UserError, match=message):
        family_of(written).from_hf(written | {"block_configs": change(written["block_configs"])})


def test_a_list_in_an_ordinary_config_is_not_overlooked(tmp_path: Path) -> None:
    """Nor is the name of the form without its list taken for an ordinary model."""
    written = FAMILIES["llama"].to_hf(tiny_config(tmp_path).with_blocks(LAYERS))
    with pytest.raises(UserError, match="model_type 'llama'"):
        family_of(written | {"model_type": "llama"})
    with pytest.raises(UserError, match="model_type 'llama_blocks'"):
        family_of({key: value for key, value in written.items() if key != "block_configs"})


def test_sizes_that_contradict_each_other_are_an_error(tmp_path: Path) -> None:
    config = tiny_config(tmp_path).with_blocks(LAYERS)
    for change in ({"num_layers": 3}, {"ffn_hidden_size": 65}):
        with pytest.raises(ValueError, match="with_blocks"):
            replace(config, **change)
    with pytest.raises(ValueError, match="no layer"):
        Block(4, 0, 8)
