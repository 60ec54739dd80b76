"""Targets that prune a share of every weight, in tiles: which tiles, what becomes of the others, and how they run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_prune.__main__ import main
from megatron_prune.decision.masks import Masks, check_mask
from megatron_prune.decision.target import NM, Tile, parse_any_target
from megatron_prune.decision.tiles import Grid, broken_groups, dense_groups, dense_tiles, removed
from megatron_prune.errors import UserError
from megatron_prune.evaluation import speed
from megatron_prune.evaluation.regions import runs, split
from megatron_prune.exporting.padding import kept_history
from megatron_prune.methods.fit import check_target
from megatron_prune.model.convert import HFReader
from tests.models import small_models
from tests.runs import prune_to, refused_to_prune

SHAPES = ["16x16", "8xall", "allx12"]


def target(share: float, tile: str, n: int = 2, m: int = 4) -> NM:
    return NM(n, m, (), share, Tile.parse(tile))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2:4@0.75", NM(2, 4, (), 0.75, Tile(128, 128))),
        ("2:4@0.5,tile=64xall,dense=q_proj", NM(2, 4, ("q_proj",), 0.5, Tile(64, 0))),
        ("4:8@0.25,tile=allx32", NM(4, 8, (), 0.25, Tile(0, 32))),
    ],
)
def test_they_are_written_as_they_are_read(text: str, found: NM) -> None:
    assert parse_any_target(text) == found and str(found) == text
    entries = {"n": found.n, "m": found.m, "share": found.share, "tile": str(found.tile), "dense": list(found.dense)}
    assert parse_any_target(entries) == found
    assert found.density == pytest.approx(1 - found.share / 2) and found != NM(found.n, found.m, found.dense)


def by_hand(cost: Tensor, wanted: NM) -> Tensor:
    """The groups of dense tiles, by loops: the tiles that cost most per group, as long as the share allows."""
    rows, groups = cost.shape[0], cost.shape[1] // wanted.m
    high, wide = wanted.tiles.rows or rows, wanted.tiles.columns // wanted.m or groups
    tiles = []
    for top in range(0, rows, high):
        for left in range(0, groups, wide):
            inside = [(r, g) for r in range(top, min(top + high, rows)) for g in range(left, min(left + wide, groups))]
            lost = sum(
                sum(sorted(cost[r, g * wanted.m : (g + 1) * wanted.m].tolist())[: wanted.m - wanted.n])
                for r, g in inside
            )
            tiles.append((lost / len(inside), inside))
    dense, left_over = torch.zeros(rows, groups, dtype=torch.bool), (1 - wanted.share) * rows * groups + 1e-6
    for _, inside in sorted(tiles, key=lambda tile: -tile[0]):
        if len(inside) <= left_over:
            left_over -= len(inside)
            for place in inside:
                dense[place] = True
    return dense


@pytest.mark.parametrize("tile", [*SHAPES, "128x128"])
@pytest.mark.parametrize(("shape", "share"), [((40, 48), 0.75), ((17, 24), 0.4), ((8, 16), 0.9)])
def test_the_tiles_that_lose_most_stay(shape: tuple[int, int], share: float, tile: str) -> None:
    wanted = target(share, tile)
    cost = torch.rand(shape, generator=torch.Generator().manual_seed(0)).square()
    dense = dense_tiles(removed(cost, wanted), wanted)
    assert torch.equal(dense, by_hand(cost, wanted))
    mask = dense.repeat_interleave(4, 1) | torch.tensor([True, False, False, True]).repeat(shape[0], shape[1] // 4)
    check_mask(mask, wanted, "w")
    assert torch.equal(dense_groups(mask, wanted), dense) and not broken_groups(mask, wanted).any()
    assert mask.float().mean() >= wanted.density - 1e-6 or dense.float().mean() < 1 - share


def test_a_share_is_the_decimal_that_was_written() -> None:
    """0.1 of 65,536,000 groups are 6,553,600; and something goes, however small the share."""
    assert Grid.of((16000, 16384), target(0.9, "64xall")).room(target(0.9, "64xall")) == 6_553_600
    least = target(1e-300, "8x8")
    dense = dense_tiles(removed(torch.rand(32, 32, generator=torch.Generator().manual_seed(3)), least), least)
    assert int((~dense).sum()) == 16


def test_padding_moves_tiles_and_claims_none() -> None:
    """Query heads are put into the middle of what `o_proj` takes; a pattern of single groups stays one."""
    weights = {"method": "wanda", "parameters": None}
    assert kept_history({**weights, "target": "2:4@0.75"})["target"] is None
    for stays in ("2:4", "0.5,spread=0.1"):
        assert kept_history({**weights, "target": stays})["target"] == stays


def test_rows_are_outputs_where_weights_are_stored_the_other_way(root: Path) -> None:
    """GPT-2's query, key and value are 96 outputs of 32 inputs, stored `[32, 96]`: a tile of 48 rows is half of it."""
    config = HFReader(root / "gpt2").model_config
    check_target(config, parse_any_target("2:4@0.5,tile=48xall,dense=mlp+attn.c_proj"))
    with pytest.raises(UserError, match="no weight of the model has a tile as small"):
        check_target(config, parse_any_target("2:4@0.6,tile=48xall,dense=mlp+attn.c_proj"))


def test_what_is_no_such_mask_is_seen() -> None:
    wanted = target(0.75, "16x16")
    pruned = torch.tensor([True, False, False, True]).repeat(32, 8)
    dense = pruned.clone()
    dense[:16, :16] = True
    check_mask(dense, wanted, "w")
    torn = dense.clone()
    torn[3, 2] = False
    with pytest.raises(UserError, match="tiles of 16x16 that are neither dense nor 2:4"):
        check_mask(torn, wanted, "w")
    dense[16:, 16:] = True
    assert broken_groups(dense, wanted).sum() == 128
    with pytest.raises(UserError, match=r"2:4@0.75,tile=16x16 keeps exactly 2 \(wrong groups: 128\)"):
        check_mask(dense, wanted, "w")


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_a_stray_group_excuses_no_tile(n: int, m: int) -> None:
    """Though no other tile be dense; and a dense one has zeros of its own, scattered, in rows or in columns."""
    wanted = target(0.75, f"16x{4 * m}", n, m)
    sparse = (torch.arange(m) < n).repeat(64, 16)
    stray = sparse.clone()
    stray[40, 5 * m : 6 * m] = True
    assert broken_groups(stray, wanted).nonzero().tolist() == [[40, 5]]
    some = sparse.clone()
    some[:16, :m] = True  # a quarter of a tile
    assert broken_groups(some, wanted).sum() == 16
    generator = torch.Generator().manual_seed(1)
    for natural in (0.01, 0.3, 0.5):
        dense = stray.clone()
        dense[:16, : 4 * m] = torch.rand(16, 4 * m, generator=generator) > natural
        dense[3 : 5 if natural > 0.1 else 14, : 4 * m] = False
        dense[:16, m : 2 * m] = False
        assert broken_groups(dense, wanted).nonzero().tolist() == [[40, 5]]
    dense[:16, : 4 * m] = True
    dense[16:48, 4 * m : 12 * m] = True
    assert broken_groups(dense, wanted).sum() == 5 * 64, "one tile more than the share leaves: none is excused"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiles")
    small_models(root)
    return root


@pytest.mark.parametrize(
    ("method", "family", "tile"),
    [
        ("magnitude", "llama", "16x16"),
        ("wanda", "qwen3_moe", "8xall"),
        ("sparsegpt", "gpt2", "allx8"),
        ("sparsegpt", "llama", "16x16"),
    ],
)
def test_the_whole_road(
    root: Path, tmp_path: Path, method: str, family: str, tile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each Hugging Face matrix loses its share, whichever Megatron weight it is a part of; all forms are verified."""
    wanted = f"2:4@0.75,tile={tile}"
    assert prune_to(root, tmp_path / "run", method, wanted, family) == 0
    assert json.loads((tmp_path / "run_hf" / "pruning.json").read_text())["target"] == wanted
    nm, masks = parse_any_target(wanted), Masks.load(tmp_path / "run" / "decision")
    assert isinstance(nm, NM)
    shares = []
    for name in masks.names():
        mask = masks.get(name).t() if family == "gpt2" else masks.get(name)
        shares.append(float(dense_groups(mask, nm).float().mean()))
    assert max(shares) <= 0.25 and sum(shares) / len(shares) > 0.1
    assert main(["trim", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "ck")]) == 0
    for form in ("run", "ck", "run_hf"):
        capsys.readouterr()
        assert main(["verify", str(tmp_path / form)]) == 0
        assert f"pattern {wanted}: holds" in capsys.readouterr().out
        assert main(["verify", str(tmp_path / form), "--target", "2:4"]) == 1
    file = next((tmp_path / "run_hf").glob("*.safetensors"))
    tensors = load_file(file)
    for name in [name for name in tensors if "down_proj" in name or "c_fc.weight" in name]:
        tensors[name] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["verify", str(tmp_path / "run_hf")]) == 1


def test_verify_names_the_weight_of_a_stray_group(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune_to(root, tmp_path / "run", "magnitude", "2:4@0.75,tile=16x16") == 0
    file = next((tmp_path / "run_hf").glob("*.safetensors"))
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = tensors[name]
    groups = weight.unflatten(1, (-1, 4)).sort(2, descending=True)
    weight.unflatten(1, (-1, 4)).scatter_(2, groups.indices[:, :, 2:], 0.0)  # 2:4 all over, and then one group is not
    weight[3, 4:8] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run_hf")]) == 1
    assert f"BROKEN in 1 groups (1 of {name}), 0 weights are too dense\n" in capsys.readouterr().out


def test_descent_goes_on_inside_the_tiles(root: Path, tmp_path: Path) -> None:
    text = ["--calibration", str(root / "words.jsonl"), "--calibration-samples", "3", "--calibration-seq-length", "16"]
    command = ["prune", str(root / "llama"), str(tmp_path / "run"), "--method", "sparsegpt", *text]
    assert main([*command, "--target", "2:4@0.75,tile=16x16", "--descent-passes", "2"]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0


MISTAKES = {
    "all": ("2:4@1.5", "share 1.5 of 2:4 is not possible; give one above 0, below 1"),
    "no share": ("2:4,tile=16x16", "tile=16x16 is for a share of 2:4, such as 2:4@0.75"),
    "no tile": ("2:4@0.5,tile=16", "give rows x columns, such as 128x128, 64xall or allx64"),
    "nothing left": ("2:4@0.5,tile=allxall", "give rows x columns"),
    "too large": ("2:4@0.9", "no weight of the model has a tile as small as what may stay dense"),
    "torn groups": ("2:4@0.5,tile=16x6", "cuts groups of 4 inputs; give a multiple of 4 as its width"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(root: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    given, message = MISTAKES[case]
    refused_to_prune(root, tmp_path / "run", "wanda", given, message, capsys)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("tile", ["8xall", "allx12"])
def test_two_products_are_the_linear(tile: str, biased: bool) -> None:
    wanted = target(0.7, tile)
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(40, 48, generator=generator), torch.randn(3, 5, 48, generator=generator)
    bias = torch.randn(40, generator=generator) if biased else None
    dense = dense_tiles(removed(weight.square(), wanted), wanted).repeat_interleave(4, 1)
    weight *= dense | torch.tensor([True, False, False, True]).repeat(40, 12)
    seen = []

    def pack(part: Tensor) -> Tensor:
        assert part.is_contiguous() and (part.unflatten(1, (-1, 4)) != 0).sum(2).max() <= 2
        seen.append(part.numel())
        return part

    linear = split(weight, bias, wanted, pack)
    assert torch.allclose(linear(x), torch.nn.functional.linear(x, weight, bias), atol=1e-5)
    assert seen == [int((~dense).sum())]
    assert sum(p.numel() for p in linear.parameters()) == weight.numel() + 40 * biased


@pytest.mark.parametrize(("tile", "family"), [("8xall", "gpt2"), ("allx8", "llama")])
def test_bench_runs_the_regions(
    root: Path, tmp_path: Path, tile: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way through on a GPU, with a stand-in for its kernels that gives rows back."""
    monkeypatch.setattr(speed, "missing_kernels", lambda: None)
    monkeypatch.setattr(speed, "to_sparse_semi_structured", lambda rows: rows)
    some = "c_fc" if family == "gpt2" else "down_proj"
    assert prune_to(root, tmp_path / "run", "magnitude", f"2:4@0.75,tile={tile},dense={some}", family) == 0
    fast = "--prompt-length 8 --new-tokens 2 --repeats 1 --batch-sizes 1".split()
    assert main(["bench", str(tmp_path / "run_hf"), "--output", str(tmp_path / "b.json"), *fast]) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["largest_logit_difference"] < 1e-4 < result["largest_logit"] and result["sparse"]
    assert tile in result["benchmark"]


def test_bench_says_what_has_no_kernel(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "missing_kernels", lambda: None)
    assert not runs(target(0.5, "16x16")) and runs(target(0.5, "16xall")) and runs(NM(2, 4))
    assert prune_to(root, tmp_path / "run", "magnitude", "2:4@0.75,tile=16x16") == 0
    fast = "--prompt-length 8 --new-tokens 2 --repeats 1 --batch-sizes 1".split()
    capsys.readouterr()
    assert main(["bench", str(tmp_path / "run_hf"), "--output", str(tmp_path / "b.json"), *fast]) == 0
    assert "16x16 tiles take one of their own" in capsys.readouterr().out
    assert "sparse" not in json.loads((tmp_path / "b.json").read_text())
