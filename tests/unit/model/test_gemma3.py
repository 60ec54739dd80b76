"""Gemma 3: two bases of rotary positions, norms after attention and MLP, scaled embeddings; what is refused and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import pytest
import torch
from safetensors.torch import load_file

from megatron_prune.__main__ import main
from megatron_prune.decision.source import open_model
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.methods.shape_search import Refit, refitted, settled, sites
from megatron_prune.model.build import inverse_frequencies
from megatron_prune.model.cost import parameters
from megatron_prune.model.families import FAMILIES, family_of
from megatron_prune.model.family import check_config
from megatron_prune.model.prunable import FC2, PROJECTION
from megatron_prune.statistics.compensation import Compensation
from megatron_prune.statistics.passes import Passes
from megatron_prune.statistics.walk import WholeWeights
from tests import runs
from tests.models import TWO_ROPES, byte_tokenizer, edit_config, tiny_model, words
from tests.unit.model.test_other_families import GEMMA3

NEW = {key: value for key, value in GEMMA3.items() if not key.startswith("rope") and key != "sliding_window_pattern"}


def test_what_a_published_one_means() -> None:
    config = family_of(GEMMA3).from_hf(GEMMA3)
    assert (config.rotary_base, config.window_rotary_base, config.rope_scaling) == (1e6, 1e4, None)
    assert config.window_layers == tuple(number % 6 != 5 for number in range(26))
    assert [config.window(layer) for layer in (4, 5)] == [512, None]
    assert parameters(config) / 1e9 == pytest.approx(1.0, rel=1e-3) and config.tie_word_embeddings
    assert config.embedding_scale == 1152**0.5 and config.gain_offset == 1.0 and not config.centred_norm
    angles = inverse_frequencies(config, torch.device("cpu"))
    assert len(angles) == 256
    for number, base in ((1, 1e6), (129, 1e4)):
        assert float(angles[number]) == pytest.approx(base ** (-1 / 128), rel=1e-5)


def test_both_ways_to_write_the_two_bases_mean_the_same() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    scaled = {
        "full_attention": TWO_ROPES["full_attention"] | {"rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e4},
    }
    new = NEW | {"rope_parameters": scaled, "layer_types": (kinds * 5)[:26]}
    old = GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    a, b = (family_of(values).from_hf(values) for values in (new, old))
    assert replace(a, hf_config={}) == replace(b, hf_config={}) and a.rope_scaling == {
        "rope_type": "linear",
        "factor": 8,
    }
    plain, scaled_angles = (inverse_frequencies(x, torch.device("cpu")) for x in (replace(a, rope_scaling=None), a))
    assert torch.equal(scaled_angles[:128], plain[:128] / 8) and torch.equal(scaled_angles[128:], plain[128:])
    assert family_of(NEW).from_hf(NEW).rotary_base == 1e6, "what is meant where it says nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation: 'silu'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"sliding_window_pattern": 1}, "sliding_window_pattern = 1; it must be a whole number of at least 2"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0; it must be a number above 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'; supported: 'default', 'linear'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor = None; it must be a number above 0"),
        ({"rope_scaling": 3}, "gives 3 as rope parameters"),
        ({"rope_local_base_freq": -1}, "rope_local_base_freq = -1"),
        ({"rope_parameters": {"rope_theta": {}}}, "allowed: full_attention, sliding_attention"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "gives 10000.0 as rope parameters; they must be an object"),
        ({"rope_parameters": [1]}, "as rope parameters; they must be an object"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope type 'linear' in layers with windows",
        ),
    ],
)
def test_what_would_change_the_logits_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        family_of(GEMMA3).from_hf(GEMMA3 | change)


def test_constants_that_contradict_the_family_are_refused() -> None:
    config = family_of(GEMMA3).from_hf(GEMMA3)
    check_config(config, FAMILIES["gemma3_text"])
    for change, message in (
        ({"post_layernorm": False}, "post_layernorm is False"),
        ({"scaled_embedding": False}, "scaled_embedding is False"),
        ({"window_rotary_base": None}, "window_rotary_base = None"),
    ):
        with pytest.raises(UserError, match=message):
            check_config(replace(config, **change), FAMILIES["gemma3_text"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a llama model has none"):
        llama = family_of({"model_type": "llama"}).from_hf({**SMALL})
        check_config(replace(llama, window_rotary_base=1e4), FAMILIES["llama"])


SMALL = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2}


def test_a_setting_changes_the_logits(tmp_path: Path) -> None:
    """Negative control of the parity tests."""
    byte_tokenizer(tiny_model(tmp_path / "hf", "gemma3_text", vocab_size=257))
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "ck")]) == 0
    for number, change in enumerate(
        [
            {"query_pre_attn_scalar": 16},
            {"sliding_window": 9},
            {"layer_types": ["full_attention", "sliding_attention"]},
            {"rope_parameters": TWO_ROPES | {"full_attention": {"rope_type": "default", "rope_theta": 1000.0}}},
            {"rope_parameters": TWO_ROPES | {"sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}}},
        ]
    ):
        byte_tokenizer(tiny_model(tmp_path / str(number), "gemma3_text", vocab_size=257))
        edit_config(tmp_path / str(number), **change)
        assert main(["verify", "--input", str(tmp_path / "ck"), "--against", str(tmp_path / str(number))]) == 1, change


@pytest.mark.parametrize("tied", [True, False])
def test_a_smaller_width_multiplies_embeddings_by_what_the_whole_one_did(tmp_path: Path, tied: bool) -> None:
    """Its own config.json says sqrt(24) in place of sqrt(32); the norm before a tied output layer takes that back."""
    folder = tiny_model(tmp_path / "hf", "gemma3_text", tie_word_embeddings=tied, vocab_size=257)
    weights = load_file(folder / "model.safetensors")
    byte_tokenizer(folder)
    words(tmp_path / "w.jsonl", documents=4)
    text = ["--calibration", str(tmp_path / "w.jsonl"), "--calibration-samples", "2", "--calibration-seq-length", "16"]
    choice = ["--method", "minitron", "--target", "hidden_size=24", "--no-norm-gain", "--refit", "none"]
    for verb, names, more in (
        ("import", ("hf", "ck"), []),
        ("prune", ("ck", "run"), [*choice, *text]),
        ("trim", ("run", "cut"), []),
        ("export", ("cut", "back"), []),
    ):
        inputs = ["--input", str(tmp_path / names[0]), "--output", str(tmp_path / names[1])]
        assert main([verb, *inputs, *more]) == 0
    after = load_file(tmp_path / "back" / "model.safetensors")
    name, norm = "model.embed_tokens.weight", "model.norm.weight"
    kept = [n for n in range(32) if _is_column(after[name], weights[name][:, n])]
    assert len(kept) == 24
    torch.testing.assert_close(after[name] * 24**0.5, weights[name][:, kept] * 32**0.5)
    factor = (32 / 24) ** 0.5 if tied else 1.0
    torch.testing.assert_close((1 + after[norm]) * factor, 1 + weights[norm][kept])


def test_gains_make_up_for_channels_after_attention_and_mlp_too(tmp_path: Path) -> None:
    """Each gain is multiplied by the mean over tokens of root mean square of what stays / root mean square of all."""
    from transformers import AutoModelForCausalLM

    folder = byte_tokenizer(tiny_model(tmp_path / "hf", "gemma3_text", vocab_size=257))
    tokens = torch.randint(0, 257, (3, 16), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    names = ("post_attention_layernorm", "post_feedforward_layernorm")
    for name, module in reference.named_modules():
        if name.endswith(names):
            module.register_forward_hook(lambda _m, inputs, _o, name=name: seen.update({name: inputs[0]}))
    with torch.no_grad():
        reference(tokens)
    kept = [n for n in range(32) if n % 4]
    with backend.running(backend.Layout()):
        model = open_model(folder).load(backend.Layout())
        units = replace(Units.all(model.config), hidden=tuple(kept))
        found = [settled(layer) for layer in Passes(model, tokens).observe_each(sites(model.config))]
        before = {name: tensor.clone() for name, tensor in WholeWeights(model).layer(1).items()}
        of_moments = refitted(model.config, found, units, Refit(None))(1, before)
        Compensation(model, units, tokens, "none", 0.01, norm_gain=True).run(lambda _layers: None)
        after = WholeWeights(model).layer(1)
    for path, name in zip((PROJECTION, FC2), names, strict=True):
        squares = seen[f"model.layers.1.{name}"].double().square()
        ratio = (squares[..., kept].mean(-1) / squares.mean(-1)).sqrt().mean()
        gain = f"{path}.post_layernorm.weight"
        torch.testing.assert_close(1 + after[gain], (1 + before[gain]) * float(ratio))
        together = (squares.sum((0, 1))[kept].mean() / squares.sum((0, 1)).mean()).sqrt()
        torch.testing.assert_close(1 + of_moments[gain], (1 + before[gain]) * float(together), rtol=1e-4, atol=1e-4)
        assert abs(float(ratio) - 1) > 2e-4  # twenty times the tolerance


def _is_column(found: torch.Tensor, column: torch.Tensor) -> bool:
    wanted = column * (32 / 24) ** 0.5
    return bool(((found - wanted[:, None]).abs() < 1e-5).all(0).any())


def test_the_language_part_of_a_model_that_sees_is_named(tmp_path: Path) -> None:
    values = {"model_type": "gemma3", "text_config": GEMMA3, "vision_config": {"model_type": "siglip_vision_model"}}
    with pytest.raises(UserError, match="its text_config is of a gemma3_text model: save that alone"):
        family_of(values)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export --input ck --output x --format fms", "this is a gemma3_text model; use --format hf"),
        ("export --input ck --output x --format maxtext", "MaxText export is for"),
    ],
)
def test_what_does_not_take_it_says_so_in_a_line(
    tmp_path: Path, command: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.imported(tmp_path, "gemma3_text"))
    runs.refused_in_a_line(command, message, capsys)
