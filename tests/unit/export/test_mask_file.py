"""Mask .npz files: plain numpy reads them, other people's are read, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prune.decision.mask_file import load_mask_npz, mask_npz_pattern, save_mask_npz
from megatron_prune.decision.masks import MaskInfo, Masks, prunable_shapes
from megatron_prune.errors import UserError
from megatron_prune.kernels.selection import select_nm
from megatron_prune.model.families import FAMILIES, ModelConfig

CONFIG: ModelConfig = FAMILIES["llama"].from_hf({
    "model_type": "llama", "vocab_size": 64, "hidden_size": 12, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
})  # fmt: skip
UP = "model.layers.1.mlp.up_proj.weight"


def arrays() -> dict[str, np.ndarray]:
    """A random 1:4 mask for every prunable weight, as plain bool arrays."""
    generator = torch.Generator().manual_seed(3)
    shapes = prunable_shapes(CONFIG)
    return {name: select_nm(torch.rand(shape, generator=generator), 1, 4).numpy() for name, shape in shapes.items()}


@pytest.fixture
def masks(tmp_path: Path) -> Masks:
    info = MaskInfo("magnitude", "1:4", {}, "llama", CONFIG.fingerprint())
    layers = [
        (
            layer,
            {name: torch.from_numpy(mask) for name, mask in arrays().items() if f"layers.{layer}." in name},
        )
        for layer in range(2)
    ]
    return Masks.save(tmp_path / "decision", info, layers)


def assert_loads(path: Path) -> None:
    loaded = dict(load_mask_npz(path, CONFIG))
    assert list(loaded) == list(arrays())
    for name, mask in arrays().items():
        assert loaded[name].dtype == torch.bool and np.array_equal(loaded[name].numpy(), mask)


def test_round_trip(masks: Masks, tmp_path: Path) -> None:
    save_mask_npz(tmp_path / "new" / "mask.npz", masks)
    assert_loads(tmp_path / "new" / "mask.npz")
    assert mask_npz_pattern(tmp_path / "new" / "mask.npz") == "1:4"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mask.npz"]


def test_plain_numpy_reads_it_as_documented(masks: Masks, tmp_path: Path) -> None:
    save_mask_npz(tmp_path / "mask.npz", masks)
    with np.load(tmp_path / "mask.npz", allow_pickle=False) as archive:
        out, width = archive[UP + ".shape"]
        assert archive[UP].dtype == np.uint8 and archive[UP].nbytes == -(-out * width // 8)
        kept = np.unpackbits(archive[UP], count=out * width).reshape(out, width)
        assert str(archive["__pattern__"]) == "1:4"
    assert np.array_equal(kept == 1, arrays()[UP])


@pytest.mark.parametrize("form", ["bool", "uint8", "packed", "compressed"])
def test_plain_arrays_of_other_programs_are_read(tmp_path: Path, form: str) -> None:
    plain = arrays()
    if form == "uint8":
        plain = {name: mask.astype(np.uint8) for name, mask in plain.items()}
    if form == "packed":
        plain = {name: np.packbits(mask) for name, mask in plain.items()}
    (np.savez_compressed if form == "compressed" else np.savez)(tmp_path / "mask.npz", **plain)
    assert mask_npz_pattern(tmp_path / "mask.npz") is None
    assert_loads(tmp_path / "mask.npz")


def test_existing_file_is_not_overwritten(masks: Masks, tmp_path: Path) -> None:
    (tmp_path / "mask.npz").touch()
    with pytest.raises(UserError, match="already exists"):
        save_mask_npz(tmp_path / "mask.npz", masks)


def test_interrupted_write_leaves_nothing(masks: Masks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> torch.Tensor:
        raise OSError("disk full")

    monkeypatch.setattr(masks, "get", fail)
    with pytest.raises(OSError, match="disk full"):
        save_mask_npz(tmp_path / "mask.npz", masks)
    assert not list(tmp_path.glob("mask*"))


def write(path: Path, **changes: np.ndarray | None) -> Path:
    """The plain masks with some entries replaced or, by None, removed."""
    content = arrays() | {key.replace("__UP__", UP): value for key, value in changes.items()}
    np.savez(path / "mask.npz", **{key: value for key, value in content.items() if value is not None})
    return path / "mask.npz"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.layers.1.mlp.up_pro.weight": np.ones(3)},
            f"not a prunable weight of this model; nearest: {UP}",
        ),
        ({"lm_head.weight": np.ones((64, 12), bool)}, "'lm_head.weight', which is not a prunable weight"),
        ({"__UP__": None}, f"lacks the masks of 1 weights of this model, the first is {UP}"),
        ({"__UP__": np.ones((12, 20), bool)}, r"\[12, 20\]; expected \[20, 12\] or 30 packed bytes"),
        ({"__UP__": np.ones(29, np.uint8)}, r"\[29\]; expected"),
        ({"__UP__": np.ones((20, 12))}, "dtype float64"),
        ({"__UP__": np.full((20, 12), 2, np.uint8)}, "values other than 0 and 1"),
        ({"__UP__": np.full((20, 12), -1, np.int8)}, "values other than 0 and 1"),
        ({"__UP__": np.ones(30, np.uint8), "__UP__.shape": np.array([12, 20])}, r"mask of shape \[12, 20\]"),
        ({"__pattern__": np.array("2:4")}, "2:4 keeps exactly 2"),
        ({"__pattern__": np.array("two of four")}, "target 'two of four'"),
        ({"__UP__": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, np.ndarray | None], message: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        dict(load_mask_npz(path, CONFIG))


def test_missing_damaged_and_pickled_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_mask_npz(tmp_path / "none.npz", CONFIG)
    whole = write(tmp_path).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "single.npy", np.ones(3))
    (tmp_path / "empty.npz").touch()
    for name in ("cut.npz", "pickled.npy", "single.npy", "empty.npz"):
        with pytest.raises(UserError, match="is not a mask .npz"):
            load_mask_npz(tmp_path / name, CONFIG)


def test_flipped_bit_inside_the_archive_is_noticed(masks: Masks, tmp_path: Path) -> None:
    save_mask_npz(tmp_path / "mask.npz", masks)
    data = bytearray((tmp_path / "mask.npz").read_bytes())
    start = data.index(np.packbits(arrays()[UP]).tobytes())
    data[start] ^= 0x80
    (tmp_path / "mask.npz").write_bytes(data)
    with pytest.raises(UserError, match="up_proj.weight cannot be read"):
        dict(load_mask_npz(tmp_path / "mask.npz", CONFIG))
