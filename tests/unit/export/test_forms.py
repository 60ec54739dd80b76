"""A model whose layers differ as a Hugging Face directory: padded, with a modelling file, and as block_configs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.exporting.forms import CLASSES, costs, form_of
from megatron_prune.exporting.huggingface import write_hf
from megatron_prune.exporting.padding import in_transformers, padded
from megatron_prune.model.convert import HFReader
from megatron_prune.model.cost import kv_cache_bytes, parameters
from megatron_prune.model.families import Block, get_family
from tests.models import BLOCKS, tiny_blocks, tiny_llama

TOKENS = torch.arange(34).reshape(2, 17) * 7 % 257
GENERATE: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)


def write(reader: HFReader, directory: Path, form: str) -> Path:
    """Export a model in a form."""
    config = reader.model_config
    weights = ((name, reader.read(name)) for name in reader.names())
    if form == "padded":
        write_hf(directory, get_family(config.family).uniform(config), padded(config, weights), reader.directory)
    else:
        write_hf(directory, config, weights, reader.directory, with_code=form == "custom")
    return directory


def opened(directory: Path, **options: Any) -> Any:
    """The model as transformers opens it; fails when a tensor is missing or left over."""
    from transformers import AutoModelForCausalLM

    model, about = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, **options
    )
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), about
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of fixed tokens."""
    return model(TOKENS).logits


@pytest.mark.parametrize("family", CLASSES)
def test_custom_and_padded_compute_the_same(tmp_path: Path, family: str) -> None:
    """The modelling file uses every weight as it is; so it is the proof of the padding too."""
    reader = HFReader(tiny_blocks(tmp_path / "given", family))
    ordinary = opened(write(reader, tmp_path / "padded", "padded"))
    custom = opened(write(reader, tmp_path / "custom", "custom"), trust_remote_code=True)
    assert type(ordinary).__name__ == CLASSES[family] + "ForCausalLM"
    assert sum(p.numel() for p in custom.parameters()) == parameters(reader.model_config)
    assert torch.allclose(logits(custom), logits(ordinary), atol=1e-5) and logits(custom).abs().max() > 0.1
    without = in_transformers(HFReader(tmp_path / "custom"), torch.float32).eval()
    assert torch.equal(logits(without), logits(ordinary))
    for options in ({}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}):
        said = [model.generate(TOKENS[:, :5], **GENERATE, **options) for model in (custom, ordinary)]
        assert torch.equal(*said) and said[0].shape[1] > 5, options


def test_saved_again_by_transformers(tmp_path: Path) -> None:
    """With its code, which a saved model must have beside it; our reader needs only the config."""
    reader = HFReader(tiny_blocks(tmp_path / "given", tie_word_embeddings=True))
    model = opened(write(reader, tmp_path / "custom", "custom"), trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(opened(tmp_path / "again", trust_remote_code=True)), logits(model))
    again = HFReader(tmp_path / "again")
    assert again.model_config.fingerprint() == reader.model_config.fingerprint()
    for name in reader.names():
        assert torch.equal(again.read(name), reader.read(name)), name


def test_training_and_other_kernels(tmp_path: Path) -> None:
    model = opened(
        write(HFReader(tiny_blocks(tmp_path / "given")), tmp_path / "custom", "custom"), trust_remote_code=True
    )
    before = logits(model)
    model.set_attn_implementation("eager")
    assert torch.allclose(logits(model), before, atol=1e-5), "each layer follows what is set for the model"
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("form", ["custom", "blocks"])
def test_nothing_runs_without_trust(tmp_path: Path, form: str) -> None:
    from transformers import AutoModelForCausalLM

    write(HFReader(tiny_blocks(tmp_path / "given")), tmp_path / "new", form)
    with pytest.raises(ValueError, match="trust_remote_code|llama_blocks"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "new", trust_remote_code=False)


@pytest.mark.parametrize("form", ["custom", "blocks"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_our_reader_reads_it_back_without_code(tmp_path: Path, family: str, form: str) -> None:
    reader = HFReader(tiny_blocks(tmp_path / "given", family))
    if (family, form) == ("gpt2", "custom"):
        with pytest.raises(UserError, match="no modelling file for gpt2; allowed: padded, blocks"):
            form_of(reader.model_config, "custom")
        return
    again = HFReader(write(reader, tmp_path / "new", form))
    assert [p.suffix for p in (tmp_path / "new").glob("*.py")] == ([".py"] if form == "custom" else [])
    assert again.model_config.fingerprint() == reader.model_config.fingerprint()
    assert all(torch.equal(again.read(name), reader.read(name)) for name in reader.names())


def test_padded_places_heads_in_their_groups(tmp_path: Path) -> None:
    """Layer 2 has two groups of one head; padded, four groups of two: heads 0 and 2, groups 0 and 1."""
    reader = HFReader(tiny_blocks(tmp_path / "given"))
    wide = HFReader(write(reader, tmp_path / "padded", "padded"))
    heads = [wide.read(f"model.layers.2.self_attn.{name}_proj.weight") for name in "qkv"]
    own = [reader.read(f"model.layers.2.self_attn.{name}_proj.weight") for name in "qkv"]
    filled = [[number for number, head in enumerate(part.split(8)) if head.any()] for part in heads]
    assert filled == [[0, 2], [0, 1], [0, 1]]
    assert torch.equal(heads[0][:8], own[0][:8]) and torch.equal(heads[0][16:24], own[0][8:])
    assert not wide.read("model.layers.0.self_attn.o_proj.weight").any()
    assert not wide.read("model.layers.2.post_attention_layernorm.weight").any()


def test_megatron_core_reads_the_list_where_all_heads_are_kept(tmp_path: Path) -> None:
    import megatron_prune.backend  # isort: skip  # noqa: F401
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

    config = HFReader(tiny_llama(tmp_path / "hf", num_hidden_layers=3)).model_config
    layers = [Block(4, 2, 64), Block(0, 0, 48), Block(4, 4, 0)]
    hf_config = get_family("llama").to_hf(config.with_blocks(layers))
    read = HeterogeneousTransformerConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        heterogeneous_layers_config_encoded_json=json.dumps(hf_config),
        cuda_graph_scope=[],
    )
    found = [
        (not b.attention.no_op, b.attention.num_query_groups, not b.mlp.no_op, b.mlp.ffn_hidden_size)
        for b in read.per_block_parameters
    ]
    assert found == [(True, 2, True, 64), (False, None, True, 48), (True, 4, False, None)]


def test_costs_say_what_each_form_is(tmp_path: Path) -> None:
    config = HFReader(tiny_blocks(tmp_path / "given")).model_config
    wide = get_family("llama").uniform(config)
    ordinary, custom, blocks = costs(config, "custom")
    assert f"padded: {parameters(wide):,} parameters, {4 * parameters(wide):,} bytes" in ordinary
    assert f"{kv_cache_bytes(wide):,} of cache a token" in ordinary and "the most to compute" in ordinary
    assert f"custom (written): {parameters(config):,} parameters" in custom and "trust_remote_code" in custom
    assert "no layers with fewer heads" in blocks
    same = config.with_blocks([Block(4, 2, 64), Block(0, 0, 48), Block(4, 4, 0), Block(4, 1, 8)])
    assert "no layers with fewer heads" not in costs(same, "blocks")[2]
    assert all("\n" not in line for line in costs(config, "padded"))


def test_forms_of_uniform_models(tmp_path: Path) -> None:
    """Ordinary, unless its heads do not divide its hidden size: then heads of zeros help."""
    reader = HFReader(tiny_llama(tmp_path / "hf", head_dim=8))
    assert form_of(reader.model_config, None) is None
    for form in ("padded", "custom", "blocks"):
        with pytest.raises(UserError, match=f"--layers {form} was given and all layers of this model are alike"):
            form_of(reader.model_config, form)
    odd = replace(reader.model_config, num_attention_heads=6, num_query_groups=2)  # 6 does not divide 32
    assert form_of(odd, "padded") == "padded" and len(costs(odd, "padded")) == 1
    assert get_family("llama").uniform(odd).num_attention_heads == 8


def test_blocks_are_really_different() -> None:
    assert len(set(BLOCKS)) == len(BLOCKS) and any(not heads for heads, _, _ in BLOCKS)
    assert any(not ffn for _, _, ffn in BLOCKS)
