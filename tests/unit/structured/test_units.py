"""Units and cutting: the identity changes nothing, what is cut equals what is masked, ties and groups are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.decision.masks import MaskInfo
from megatron_prune.decision.pruned import cut
from megatron_prune.decision.source import open_model
from megatron_prune.decision.trimming import Trim
from megatron_prune.decision.units import BlockUnits, Units
from megatron_prune.errors import UserError
from megatron_prune.model.cost import forward_flops, kv_cache_bytes, parameters
from megatron_prune.model.families import family_of
from megatron_prune.model.forward import logits
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.training.masking import mask_units
from tests.models import tiny_model

FAMILIES = ("llama", "qwen3", "gpt2")


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with backend.running(backend.Layout()):
        yield


def load(path: Path, family: str, **sizes: int) -> PrunableModel:
    return open_model(tiny_model(path, family, **sizes)).load(backend.Layout())


def thin(model: PrunableModel) -> Units:
    """Some units of every kind but channels, other ones in every layer."""
    config = model.config
    groups = (1,) if config.num_query_groups == 2 else (0, 3)
    heads = (2, 3) if config.num_query_groups == 2 else (0, 3)
    blocks = tuple(BlockUnits(groups, heads, tuple(range(n, 40 + n))) for n in range(config.num_layers))
    return replace(Units.all(config), blocks=blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_nothing_changes_no_bit(tmp_path: Path, family: str) -> None:
    model = load(tmp_path, family)
    same = cut(model, Units.all(model.config))
    assert replace(same.config, hf_config={}) == replace(model.config, hf_config={})
    for map in model.maps:
        assert torch.equal(model.whole(map), same.whole(map)), map.megatron


@pytest.mark.parametrize("family", [*FAMILIES, "nemotron", "gemma3_text"])
@pytest.mark.parametrize("channels", [False, True])
def test_a_masked_model_equals_the_cut_one(tmp_path: Path, family: str, channels: bool) -> None:
    """Zeros do what absence does, for heads, groups, neurons and layers, and for channels if norms skip them."""
    model = load(tmp_path, family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 3})
    units = thin(model).without_layers([1])
    if channels:
        units = replace(units, hidden=tuple(n for n in range(model.config.hidden_size) if n % 4 != 1))
    smaller = cut(model, units)
    mask_units(model, units)
    tokens = torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(0))
    assert parameters(smaller.config) < parameters(model.config)
    assert smaller.config.ffn_hidden_size == 40
    torch.testing.assert_close(logits(smaller, tokens), logits(model, tokens), atol=2e-5, rtol=0)
    for module in model.chunks[0].modules():
        if getattr(module, "kept", None) is not None:
            module.kept = None  # the negative control: norms that count every channel
    if channels:
        assert not torch.allclose(logits(smaller, tokens), logits(model, tokens), atol=2e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_residual_channels_go_from_every_weight(tmp_path: Path, tied: bool) -> None:
    model = load(tmp_path, "llama", tie_word_embeddings=tied)
    kept = (0, 3, 4, 9, 17, 20, 30, 31)
    smaller = cut(model, replace(Units.all(model.config), hidden=kept))
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert torch.equal(smaller.whole(smaller.by_name[name]), model.whole(model.by_name[name])[:, list(kept)])
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    assert torch.equal(smaller.whole(smaller.by_name[name]), model.whole(model.by_name[name])[list(kept)])
    name = "embedding.word_embeddings.weight"
    assert torch.equal(smaller.whole(smaller.by_name[name]), model.whole(model.by_name[name])[:, list(kept)])
    assert ("output_layer.weight" in smaller.by_name) == (not tied)
    tokens = torch.randint(128, (1, 6), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(logits(smaller, tokens)).all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layers": ()}, "layers"),
        ({"layers": (1, 0)}, "layers"),
        ({"hidden": (0, 32)}, "hidden"),
        ({"blocks": (BlockUnits((0, 1), (0, 1, 2), (0,)),) * 2}, "different numbers of heads"),
        ({"blocks": (BlockUnits((0,), (0, 2), (0,)),) * 2}, "different numbers of heads"),
        ({"blocks": (BlockUnits((0,), (0,), (0, 0)),) * 2}, "ffn of layer 0"),
        ({"blocks": ()}, "are described"),
    ],
)
def test_units_that_make_no_model(tmp_path: Path, change: dict[str, object], why: str) -> None:
    config = load(tmp_path, "llama").config
    with pytest.raises(ValueError, match=why):
        replace(Units.all(config), **change).config(config)  # type: ignore[arg-type]


def test_a_decision_is_read_as_it_was_written_and_damage_is_noticed(tmp_path: Path) -> None:
    model = load(tmp_path / "hf", "llama")
    units = thin(model).without_layers([0])
    info = MaskInfo("minitron", "num_layers=1", {}, "llama", model.config.fingerprint())
    Trim(info, units).save(tmp_path / "decision", model.config)
    found = Trim.load(tmp_path / "decision")
    assert found == Trim(info, units)
    found.check_model(model.config)
    with pytest.raises(UserError, match="another"):
        found.check_model(replace(model.config, vocab_size=3))
    file = tmp_path / "decision" / "units.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match="damaged"):
        Trim.load(tmp_path / "decision")


def llama_8b() -> dict[str, object]:
    """Sizes of LLaMA-3.1-8B."""
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    }


def test_parameters_of_published_shapes() -> None:
    """LLaMA-3.1-8B: Meta's 8,030,261,248; LLM-Pruner's ratio 0.25 on layers 4 to 29; Minitron's 4B width."""
    config = family_of(llama_8b()).from_hf(llama_8b())
    assert parameters(config) == 8_030_261_248
    small = BlockUnits(tuple(range(6)), tuple(range(24)), tuple(range(10752)))
    whole = Units.all(config)
    blocks = tuple(small if 4 <= n < 30 else block for n, block in enumerate(whole.blocks))
    assert parameters(replace(whole, blocks=blocks).config(config)) == 6_612_586_496
    assert kv_cache_bytes(config) == 2 * 32 * 8 * 128 * 2
    assert forward_flops(config, 0) == 2 * (parameters(config) - 128256 * 4096 - 65 * 4096)


def test_a_decision_whose_units_make_no_model_is_refused(tmp_path: Path) -> None:
    """Query groups that keep different numbers of heads, say: a damaged or hostile run."""
    model = load(tmp_path / "model", "llama")
    info = MaskInfo("minitron", "num_attention_heads=3", {}, "llama", model.config.fingerprint())
    for heads in ((0,), (0, 1), (0, 1, 2)):
        blocks = tuple(replace(block, heads=heads) for block in Units.all(model.config).blocks)
        with pytest.raises(UserError, match="units make no model"):
            Trim(info, replace(Units.all(model.config), blocks=blocks)).check_model(model.config)
    Trim(info, thin(model)).check_model(model.config)
