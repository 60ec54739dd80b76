"""Hugging Face <-> Megatron tensors: exact round trips in every layout, true row numbers, the reader."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_prune.data.tokenizer_files import tokenizer_files
from megatron_prune.errors import UserError
from megatron_prune.model import convert
from megatron_prune.model.convert import HFReader
from megatron_prune.model.families import FAMILIES, ModelConfig, WeightMap
from tests.models import STORIES_TEXT, edit_config, hf_loss, stories260k, tiny_llama

LLAMA = FAMILIES["llama"]
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


def make_config(
    groups: int = 2, heads_per_group: int = 2, head: int = 4, ffn: int = 24, vocab: int = 50
) -> ModelConfig:
    return LLAMA.from_hf({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": 20, "intermediate_size": ffn,
        "num_hidden_layers": 1, "num_attention_heads": groups * heads_per_group,
        "num_key_value_heads": groups, "head_dim": head,
    })  # fmt: skip


def weight(config: ModelConfig, megatron: str) -> WeightMap:
    return next(map for map in LLAMA.weights(config) if map.megatron == megatron)


def random_hf(map: WeightMap, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return [torch.rand(shape, generator=generator) < 0.5 for shape in map.shapes]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in map.shapes]


layouts = st.sampled_from([1, 2, 3, 4]).flatmap(
    lambda tp: st.tuples(
        st.just(tp),
        st.builds(
            make_config,
            groups=st.integers(1, 3).map(lambda n: n * tp),
            heads_per_group=st.integers(1, 4),
            head=st.sampled_from([2, 4, 6]),
            ffn=st.integers(1, 5).map(lambda n: n * tp),
            vocab=st.integers(1, 40),
        ),
    )
)


@settings(max_examples=60, deadline=None)
@given(layouts, st.sampled_from([torch.float32, torch.bfloat16, torch.bool]), st.integers(0, 2**31))
def test_round_trip_is_bit_equal(layout: tuple[int, ModelConfig], dtype: torch.dtype, seed: int) -> None:
    tp, config = layout
    for map in LLAMA.weights(config):
        tensors = random_hf(map, dtype, seed)
        merged = convert.merge(map, tensors, config)
        assert tuple(merged.shape) == map.shape
        shards = [convert.shard(map, merged, rank, tp) for rank in range(tp)]
        assert len({shard.shape for shard in shards}) == 1
        back = convert.split(map, convert.unshard(map, shards, config), config)
        for before, after in zip(tensors, back, strict=True):
            assert before.dtype == after.dtype and torch.equal(before, after)


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_row_numbers_match_where_the_rows_go(layout: tuple[int, ModelConfig]) -> None:
    """A tensor that holds its own row numbers arrives as row_ids and row_blocks promise."""
    tp, config = layout
    for map in LLAMA.weights(config):
        rows = torch.arange(map.shape[0])[:, None].expand(-1, map.shape[1] if len(map.shape) > 1 else 1)
        for rank in range(tp if map.shard_dim == 0 else 1):
            local = convert.shard(map, rows.contiguous(), rank, tp)[:, 0]
            ids = convert.row_ids(map, config, rank, tp)
            assert torch.equal(local[ids >= 0], ids[ids >= 0]) and not local[ids < 0].any()
        tensors = [rows[: shape[0]] + 1000 * place for place, shape in enumerate(map.shapes)]
        merged = convert.merge(map, tensors, config)
        for name, tensor in zip(map.hf, tensors, strict=True):
            assert torch.equal(merged[convert.row_blocks(map, config)[name]], tensor)


def test_row_ids_of_all_ranks_cover_every_row_once() -> None:
    config = make_config(groups=4, vocab=50)
    for map in LLAMA.weights(config):
        if map.shard_dim == 0:
            ids = torch.cat([convert.row_ids(map, config, rank, 4) for rank in range(4)])
            assert torch.equal(ids[ids >= 0].sort().values, torch.arange(map.shape[0]))
            assert int((ids < 0).sum()) == (2 if map.pad_rows else 0)  # 50 rows padded to 52


def test_qkv_is_interleaved_per_query_group() -> None:
    config = make_config(groups=2, heads_per_group=2, head=2)
    map = weight(config, QKV)
    names = [[f"{kind}{row}" for row in range(shape[0])] for kind, shape in zip("qkv", map.shapes, strict=True)]
    codes = {name: code for code, name in enumerate(name for part in names for name in part)}
    merged = convert.merge(map, [torch.tensor([codes[name] for name in part]) for part in names], config)
    back = {code: name for name, code in codes.items()}
    order = " ".join(back[int(code)] for code in merged)
    assert order == "q0 q1 q2 q3 k0 k1 v0 v1 q4 q5 q6 q7 k2 k3 v2 v3"


def test_gated_shard_holds_its_gate_and_its_up_rows() -> None:
    config = make_config(ffn=4)
    ids = [convert.row_ids(weight(config, FC1), config, rank, 2).tolist() for rank in range(2)]
    assert ids == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_vocabulary_is_padded_with_zeros() -> None:
    config = make_config(groups=3, vocab=4)
    map = weight(config, "embedding.word_embeddings.weight")
    table = torch.ones(4, 20)
    shards = [convert.shard(map, table, rank, 3) for rank in range(3)]
    assert [int(shard.sum()) for shard in shards] == [40, 40, 0]
    assert torch.equal(convert.unshard(map, shards, config), table)


@pytest.mark.parametrize(("name", "unit"), [(QKV, "3 query groups"), (FC1, "25 channels")])
def test_impossible_tensor_parallel_size_names_the_divisors(name: str, unit: str) -> None:
    config = make_config(groups=3, ffn=25)
    map = weight(config, name)
    with pytest.raises(UserError, match=f"tensor-model-parallel-size 2 .*{unit}"):
        convert.shard(map, torch.zeros(map.shape), 0, 2)


def test_replicated_tensors_that_differ_are_an_error() -> None:
    config = make_config()
    map = weight(config, "decoder.final_layernorm.weight")
    with pytest.raises(ValueError, match="differs"):
        convert.unshard(map, [torch.zeros(20), torch.ones(20)], config)


# --- the reader ---


@pytest.mark.parametrize("kind", [
    {}, {"tie_word_embeddings": True}, {"max_shard_size": "20KB"}, {"rope_llama3": True, "head_dim": 16},
    {"dtype": torch.bfloat16},
])  # fmt: skip
def test_reader_gives_every_tensor_bit_equal(tmp_path: Path, kind: dict[str, Any]) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf", **kind))
    stored = {k: v for file in (tmp_path / "hf").glob("*.safetensors") for k, v in load_file(file).items()}
    assert set(reader.names()) == set(stored)
    for name in reader.names():
        tensor = reader.read(name)
        assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name])
    assert LLAMA.to_hf(reader.model_config) == reader.config


def broken(tmp_path: Path, **kind: Any) -> tuple[Path, Path]:
    """A fresh checkpoint to damage, and its weights file."""
    return tiny_llama(tmp_path / "hf", **kind), tmp_path / "hf" / "model.safetensors"


def rewrite(file: Path, **changes: Tensor | None) -> None:
    tensors = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, file)


def test_missing_directory_and_file_given_as_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give a directory"):
        HFReader(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file and a Hugging Face directory .* is needed"):
        HFReader(tmp_path / "file")


def test_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="nobody/nothing is neither a local directory nor .*no network"):
        HFReader("nobody/nothing")


def test_hub_id_is_downloaded_without_pickle_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    local, asked = tiny_llama(tmp_path / "hf"), {}

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked[hub_id] = allow_patterns
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert HFReader("somebody/model").directory == local
    assert "*.safetensors" in asked["somebody/model"]
    assert not [pattern for pattern in asked["somebody/model"] if pattern.endswith((".bin", ".pt", ".py"))]


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an empty folder and a Hugging Face directory with config.json"):
        HFReader(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_damaged_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        HFReader(tmp_path)


def test_pickle_only_checkpoint_is_refused_with_the_remedy(tmp_path: Path) -> None:
    directory, file = broken(tmp_path)
    file.rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin.*can run code.*save_pretrained"):
        HFReader(directory)


def test_no_weights_at_all(tmp_path: Path) -> None:
    directory, file = broken(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="neither model.safetensors"):
        HFReader(directory)


@pytest.mark.parametrize("size", [0, 5, 40, 3000, -1])
def test_truncated_file_is_named(tmp_path: Path, size: int) -> None:
    directory, file = broken(tmp_path)
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(UserError, match="model.safetensors is truncated"):
        HFReader(directory)


@pytest.mark.parametrize("header", [b"not json", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}'])
def test_corrupt_header_is_named(tmp_path: Path, header: bytes) -> None:
    directory, file = broken(tmp_path)
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="model.safetensors"):
        HFReader(directory)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    directory, file = broken(tmp_path)
    rewrite(file, model__norm__weight=None)
    with pytest.raises(UserError, match="no tensor model.norm.weight"):
        HFReader(directory)


def test_untied_model_without_output_layer_is_refused(tmp_path: Path) -> None:
    directory, _ = broken(tmp_path, tie_word_embeddings=True)
    edit_config(directory, tie_word_embeddings=False)
    with pytest.raises(UserError, match="no tensor lm_head.weight"):
        HFReader(directory)


def test_tied_model_may_repeat_but_not_contradict_its_embedding(tmp_path: Path) -> None:
    directory, file = broken(tmp_path, tie_word_embeddings=True)
    embedding = load_file(file)["model.embed_tokens.weight"]
    rewrite(file, lm_head__weight=embedding.clone())
    assert "lm_head.weight" not in HFReader(directory).names()
    rewrite(file, lm_head__weight=embedding + 1)
    with pytest.raises(UserError, match="lm_head.weight differs"):
        HFReader(directory)


def test_wrong_shape_names_both(tmp_path: Path) -> None:
    directory, _ = broken(tmp_path)
    edit_config(directory, intermediate_size=96)
    with pytest.raises(UserError, match=r"mlp.gate_proj.weight in .*\[64, 32\]; config.json asks for \[96, 32\]"):
        HFReader(directory)


def test_more_layers_stored_than_configured(tmp_path: Path) -> None:
    directory, _ = broken(tmp_path)
    edit_config(directory, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"holds model.layers.1.*would be lost"):
        HFReader(directory)


def test_old_rotary_buffers_are_no_weights(tmp_path: Path) -> None:
    directory, file = broken(tmp_path)
    tensors = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, file)
    assert len(HFReader(directory).names()) == 2 * 9 + 3


def test_quantised_tensor_is_refused(tmp_path: Path) -> None:
    directory, file = broken(tmp_path)
    rewrite(file, model__norm__weight=torch.zeros(32, dtype=torch.int8))
    with pytest.raises(UserError, match="model.norm.weight in .* dtype I8"):
        HFReader(directory)


def test_dtype_comes_from_the_tensors_when_config_is_silent(tmp_path: Path) -> None:
    directory, file = broken(tmp_path, dtype=torch.bfloat16)
    edit_config(directory, dtype=None)
    assert HFReader(directory).model_config.dtype == "bfloat16"
    rewrite(file, model__norm__weight=torch.zeros(32))
    with pytest.raises(UserError, match="no dtype"):
        HFReader(directory)


def test_missing_shard_and_wrong_index(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path / "hf", max_shard_size="20KB")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, other = sorted(set(content["weight_map"].values()))[:2]
    moved = content["weight_map"] | {"model.norm.weight": first}
    index.write_text(json.dumps(content | {"weight_map": moved}))
    with pytest.raises(UserError, match="places model.norm.weight in"):
        HFReader(directory)
    index.write_text(json.dumps(content))
    (directory / other).unlink()
    with pytest.raises(UserError, match=f"{other} does not exist"):
        HFReader(directory)
    for damaged in ("{}", '{"weight_map": {"a": 1}}'):
        index.write_text(damaged)
        with pytest.raises(UserError, match="has no weight_map"):
            HFReader(directory)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path / "hf", max_shard_size="20KB")
    files = sorted(directory.glob("*.safetensors"))
    tensors = load_file(files[0])
    name = next(iter(tensors))
    save_file(load_file(files[1]) | {name: tensors[name] + 1}, files[1])
    with pytest.raises(UserError, match=f"has {name} twice, in {files[0].name} and {files[1].name}"):
        HFReader(directory)


def test_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf"))
    with pytest.raises(UserError, match="nearest: model.norm.weight"):
        reader.read("model.norms.weight")


def test_stories260k_talks(tmp_path: Path) -> None:
    """The converted model beats chance (log 512 = 6.24) by far; its tokenizer round-trips."""
    from transformers import AutoTokenizer

    directory = stories260k(tmp_path / "hf")
    assert hf_loss(directory, STORIES_TEXT) < 0.5
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for text in (STORIES_TEXT, "Two  spaces\nand a line", "Ä日😀"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    names = {path.name for path in tokenizer_files(directory)}
    assert names == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
