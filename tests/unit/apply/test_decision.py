"""Decisions on disk: exact bits back, exact patterns, whole or absent, damage noticed."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_prune.decision.masks import (
    MaskInfo,
    Masks,
    MaskWriter,
    check_mask,
    pack_mask,
    prunable_shapes,
    unpack_mask,
)
from megatron_prune.decision.target import NM, Unstructured
from megatron_prune.errors import UserError
from megatron_prune.kernels.selection import select_matrix, select_nm, select_rows
from megatron_prune.model.families import FAMILIES, ModelConfig

CONFIG: ModelConfig = FAMILIES["llama"].from_hf({
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
})  # fmt: skip


def info(target: str = "2:4") -> MaskInfo:
    calibration = {"source": ["c4.txt"], "count": 2, "sha256": "00"}
    return MaskInfo("wanda", target, {"blocks": 1}, "llama", CONFIG.fingerprint(), 7, calibration, {"by": "test"})


def random_layers(n: int = 2, m: int = 4, config: ModelConfig = CONFIG) -> list[tuple[int, dict[str, Tensor]]]:
    """Random N:M masks for every prunable weight, layer by layer."""
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: select_nm(torch.rand(shape, generator=generator), n, m) for name, shape in prunable_shapes(config).items()
    }
    return [
        (layer, {name: mask for name, mask in masks.items() if f"layers.{layer}." in name})
        for layer in range(config.num_layers)
    ]


@pytest.fixture
def saved(tmp_path: Path) -> Masks:
    return Masks.save(tmp_path / "decision", info(), random_layers())


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 21), st.integers(0, 2**31))
def test_packing_is_exact_for_sizes_that_fill_no_byte(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_mask(mask)
    assert bits.dtype == np.uint8 and bits.shape == (-(-rows * columns // 8),)
    assert torch.equal(unpack_mask(bits, mask.shape), mask)


def test_every_mask_comes_back(saved: Masks) -> None:
    expected = {name: mask for _, masks in random_layers() for name, mask in masks.items()}
    again = Masks.load(saved.directory)
    assert again.names() == list(expected) and again.layers() == [0, 1, 2]
    for name, mask in expected.items():
        assert again.get(name).dtype == torch.bool and torch.equal(again.get(name), mask)
    assert again.info == info() and again.target == NM(2, 4)


def test_file_is_readable_without_this_package(saved: Masks) -> None:
    from safetensors import safe_open

    name = "model.layers.1.mlp.down_proj.weight"
    with safe_open(saved.directory / "layer_00001.safetensors", framework="np") as opened:
        shape = json.loads(opened.metadata()["shapes"])[name]
        bits = np.unpackbits(opened.get_tensor(name), count=shape[0] * shape[1]).reshape(shape)
    assert np.array_equal(bits.astype(bool), saved.get(name).numpy())


def test_summary_counts_every_projection(saved: Masks) -> None:
    rows = saved.summary()
    assert len(rows) == 3 * 7 and [row.layer for row in rows] == sorted(row.layer for row in rows)
    assert {row.projection for row in rows if row.layer == 2} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    down = next(row for row in rows if row.projection == "down_proj")
    assert (down.size, down.kept, down.density) == (16 * 24, 16 * 12, 0.5)
    assert saved.density == 0.5


def test_check_proves_the_pattern(saved: Masks) -> None:
    saved.check()
    saved.check("2:4")
    with pytest.raises(UserError, match=r"q_proj.*keeps 2 of the 4 inputs from 0 on in row 0; 1:4 keeps exactly 1"):
        saved.check("1:4")


def test_one_of_four_keeps_one() -> None:
    mask = torch.tensor([[1, 0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    check_mask(mask, NM(1, 4), "w")
    with pytest.raises(UserError, match="3:4 keeps exactly 3"):
        check_mask(mask, NM(3, 4), "w")


def test_half_density_is_not_two_of_four() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0]], dtype=torch.bool)
    check_mask(mask, Unstructured(0.5), "w")
    with pytest.raises(UserError, match=r"keeps 3 of the 4 inputs from 0 on .*wrong groups: 2"):
        check_mask(mask, NM(2, 4), "w")


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_unstructured_counts_of_the_methods_pass(sparsity: float) -> None:
    score = torch.rand(13, 31, generator=torch.Generator().manual_seed(1))
    check_mask(select_rows(score, sparsity), Unstructured(sparsity), "w")
    check_mask(select_matrix(score, sparsity), Unstructured(sparsity), "w")
    with pytest.raises(UserError, match="keeps 0 of 403"):
        check_mask(torch.zeros_like(score, dtype=torch.bool), Unstructured(sparsity), "w")


def test_writer_refuses_a_mask_that_breaks_its_target(tmp_path: Path) -> None:
    layers = random_layers()
    name = next(iter(layers[1][1]))
    layers[1][1][name][3, 0] ^= True
    with pytest.raises(UserError, match=f"{name} keeps . of the 4 inputs from 0 on in row 3"):
        Masks.save(tmp_path / "decision", info(), layers)
    assert not list(tmp_path.iterdir()), "neither the decision nor its half-written folder may stay"


def test_interrupted_decision_leaves_nothing_and_a_new_run_starts_clean(tmp_path: Path) -> None:
    def die() -> None:
        MaskWriter(tmp_path / "decision", info()).add_layer(*random_layers()[0])
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == 9 and (tmp_path / "decision.partial").exists()
    assert not (tmp_path / "decision").exists()
    assert Masks.save(tmp_path / "decision", info(), random_layers()[1:]).layers() == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["decision"]


def test_existing_decision_is_not_overwritten(saved: Masks) -> None:
    with pytest.raises(UserError, match="already exists"):
        MaskWriter(saved.directory, info())


def test_layer_cannot_be_written_twice(tmp_path: Path) -> None:
    with MaskWriter(tmp_path / "decision", info()) as writer:
        for layer, masks in random_layers():
            writer.add_layer(layer, masks)
        with pytest.raises(ValueError, match="layer 0"):
            writer.add_layer(*random_layers()[0])


def test_notes_may_be_added_until_close(tmp_path: Path) -> None:
    writer = MaskWriter(tmp_path / "decision", info())
    writer.add_layer(*random_layers()[0])
    writer.notes["weights_changed"] = True
    assert writer.close().info.notes == {"by": "test", "weights_changed": True}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_masks_are_bool(tmp_path: Path, dtype: torch.dtype) -> None:
    with (
        pytest.raises(ValueError, match="expected bool"),
        MaskWriter(tmp_path / "decision", info()) as writer,
    ):
        writer.add_layer(0, {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4, dtype=dtype)})


def test_damaged_truncated_and_missing_layer_files_are_noticed(saved: Masks) -> None:
    file = saved.directory / "layer_00002.safetensors"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for damaged in (bytes(flipped), whole[:-1], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="layer_00002.safetensors is damaged"):
            Masks.load(saved.directory)
    file.unlink()
    with pytest.raises(UserError, match="layer_00002.safetensors is missing"):
        Masks.load(saved.directory)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99, "kind": "masks"}', '{"format": 1, "kind": "masks"}'])
def test_damaged_decision_json(saved: Masks, text: str) -> None:
    (saved.directory / "decision.json").write_text(text)
    with pytest.raises(UserError, match="decision.json"):
        Masks.load(saved.directory)


def test_folder_that_is_no_decision(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="decision.json does not exist"):
        Masks.load(tmp_path)


def test_unknown_weight_names_the_nearest(saved: Masks) -> None:
    with pytest.raises(UserError, match="nearest: model.layers.0.self_attn.q_proj.weight"):
        saved.get("model.layers.0.self_attn.q_prj.weight")


def test_decision_for_another_model_is_refused(saved: Masks, tmp_path: Path) -> None:
    from dataclasses import replace

    saved.check_model(CONFIG)
    with pytest.raises(UserError, match="another model: the mask of model.layers.0.mlp.gate_proj.weight has shape"):
        saved.check_model(replace(CONFIG, ffn_hidden_size=32))
    with pytest.raises(UserError, match="no mask for model.layers.3"):
        saved.check_model(replace(CONFIG, num_layers=4))
    with pytest.raises(UserError, match="does not have model.layers.2"):
        saved.check_model(replace(CONFIG, num_layers=2))


def test_masks_belong_to_the_model_that_they_were_decided_for(saved: Masks) -> None:
    """Not to another of the same shapes."""
    saved.check_origin(CONFIG)
    other = replace(CONFIG, rotary_base=1e6)
    saved.check_model(other)  # as a start of learning they will do
    with pytest.raises(UserError, match="another llama model"):
        saved.check_origin(other)
