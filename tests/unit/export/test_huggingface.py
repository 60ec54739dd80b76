"""Exported directories: transformers opens them and computes the same; true zeros; whole or absent."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.exporting.huggingface import positive_zeros, write_hf
from megatron_prune.model.convert import HFReader
from megatron_prune.model.families import get_family
from tests.models import STORIES_TEXT, stories260k, tiny_llama


def tensors(reader: HFReader) -> Iterator[tuple[str, Tensor]]:
    return ((name, reader.read(name)) for name in reader.names())


def logits(directory: Path) -> Tensor:
    """Logits of fixed tokens, in the dtype of the files; fails when a key is missing or left over."""
    from transformers import AutoModelForCausalLM

    model, about = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), about
    tokens = torch.arange(24).reshape(2, 12) % model.config.vocab_size
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize("kind", [
    {}, {"tie_word_embeddings": True, "dtype": torch.bfloat16}, {"rope_llama3": True, "head_dim": 16},
    {"dtype": torch.float16, "vocab_size": 131},
])  # fmt: skip
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 20_000])
def test_transformers_computes_the_same(tmp_path: Path, kind: dict[str, Any], max_shard_bytes: int) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf", **kind))
    write_hf(tmp_path / "new", reader.model_config, tensors(reader), reader.directory, max_shard_bytes)
    assert torch.equal(logits(tmp_path / "new"), logits(tmp_path / "hf"))
    again = HFReader(tmp_path / "new")
    assert again.config == reader.config
    for name, tensor in tensors(reader):
        assert again.read(name).dtype == tensor.dtype and torch.equal(again.read(name), tensor)
    assert not (tmp_path / "new.partial").exists()


def test_shards_stay_under_the_limit_and_the_index_is_true(tmp_path: Path) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf"))
    write_hf(tmp_path / "new", reader.model_config, tensors(reader), max_shard_bytes=20_000)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert max(sizes) <= 20_000 and sum(sizes) == index["metadata"]["total_size"]
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}


def test_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf"))
    write_hf(tmp_path / "new", reader.model_config, tensors(reader), max_shard_bytes=1)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) == len(reader.names())
    assert torch.equal(logits(tmp_path / "new"), logits(tmp_path / "hf"))


def test_file_header_is_what_other_readers_expect(tmp_path: Path) -> None:
    from safetensors import safe_open

    reader = HFReader(tiny_llama(tmp_path / "hf"))
    write_hf(tmp_path / "new", reader.model_config, tensors(reader))
    file = tmp_path / "new" / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0 and data[8:9] == b"{" and data[8 : 8 + length].rstrip(b" ")[-1:] == b"}"


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    """An odd number of 2-byte values before a 4-byte tensor must not leave it misaligned."""
    reader = HFReader(
        tiny_llama(tmp_path / "hf", hidden_size=33, num_attention_heads=3, num_key_value_heads=1, head_dim=8)
    )
    mixed = {name: tensor if name.endswith("proj.weight") else tensor.bfloat16() for name, tensor in tensors(reader)}
    write_hf(tmp_path / "new", reader.model_config, iter(mixed.items()))
    again = HFReader(tmp_path / "new")
    for name, tensor in mixed.items():
        assert again.read(name).dtype == tensor.dtype and torch.equal(again.read(name), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_are_positive_and_nothing_else_changes(tmp_path: Path, dtype: torch.dtype) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf", dtype=dtype))
    name = "model.layers.0.mlp.up_proj.weight"
    mask = torch.rand(64, 32) < 0.5
    pruned = {key: tensor * mask if key == name else tensor for key, tensor in tensors(reader)}
    assert torch.signbit(pruned[name][~mask]).any(), "the test needs a -0.0 to start from"
    write_hf(tmp_path / "new", reader.model_config, iter(pruned.items()))
    written = HFReader(tmp_path / "new").read(name)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert not written.view(bits)[~mask].any()
    assert torch.equal(written.view(bits)[mask], pruned[name].view(bits)[mask])


def test_positive_zeros_keeps_the_bits_of_every_other_value() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # all bfloat16 values
    after = positive_zeros(every.view(torch.bfloat16)).view(torch.int16)
    changed = (after != every).nonzero().flatten()
    assert every[changed].tolist() == [-(2**15)] and after[changed].tolist() == [0]


def test_tied_output_layer_is_left_out(tmp_path: Path) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf", tie_word_embeddings=True))
    both = [*tensors(reader), ("lm_head.weight", reader.read("model.embed_tokens.weight"))]
    write_hf(tmp_path / "new", reader.model_config, iter(both))
    assert "lm_head.weight" not in load_file(tmp_path / "new" / "model.safetensors")
    assert torch.equal(logits(tmp_path / "new"), logits(tmp_path / "hf"))


def test_smaller_model_gets_its_config(tmp_path: Path) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf"))
    small = replace(reader.model_config, num_layers=1, ffn_hidden_size=40)
    shapes = {n: s for m in get_family("llama").weights(small) for n, s in zip(m.hf, m.shapes, strict=True)}
    cut = {name: reader.read(name)[tuple(slice(n) for n in shape)] for name, shape in shapes.items()}
    write_hf(tmp_path / "new", small, iter(cut.items()))
    assert logits(tmp_path / "new").shape == (2, 12, 128)
    assert replace(HFReader(tmp_path / "new").model_config, hf_config={}) == replace(small, hf_config={})


def test_exported_story_model_generates_as_before(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = HFReader(stories260k(tmp_path / "hf"))
    write_hf(tmp_path / "new", reader.model_config, tensors(reader), reader.directory)
    said = []
    for directory in (tmp_path / "hf", tmp_path / "new"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        start = tokenizer(STORIES_TEXT, return_tensors="pt").input_ids
        model = AutoModelForCausalLM.from_pretrained(directory)
        output = model.generate(start, max_new_tokens=12, do_sample=False)
        said.append(tokenizer.decode(output[0], skip_special_tokens=True))
    assert said[0] == said[1] and len(said[1]) > len(STORIES_TEXT)


def test_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf"))

    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield from list(tensors(reader))[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hf(tmp_path / "new", reader.model_config, interrupted())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_leftover_of_a_killed_export_is_replaced(tmp_path: Path) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf"))

    def dies() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(tensors(reader))
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(
        target=lambda: write_hf(tmp_path / "new", reader.model_config, dies())
    )
    process.start()
    process.join()
    assert process.exitcode == 9 and list((tmp_path / "new.partial").iterdir())
    write_hf(tmp_path / "new", reader.model_config, tensors(reader))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "new"}


def test_a_folder_of_the_users_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf"))
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine").touch()
    with pytest.raises(UserError, match="new.partial is in the way"):
        write_hf(tmp_path / "new", reader.model_config, tensors(reader))
    assert (tmp_path / "new.partial" / "mine").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "new.partial"}


def test_existing_directory_and_missing_tokenizer_are_refused(tmp_path: Path) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf"))
    with pytest.raises(UserError, match="already exists"):
        write_hf(tmp_path / "hf", reader.model_config, tensors(reader))
    with pytest.raises(UserError, match="tokenizer directory .* does not exist"):
        write_hf(tmp_path / "new", reader.model_config, tensors(reader), tmp_path / "none")


@pytest.mark.parametrize("fault", ["missing", "twice", "unknown", "shape", "dtype"])
def test_incomplete_or_wrong_weights_are_an_error(tmp_path: Path, fault: str) -> None:
    reader = HFReader(tiny_llama(tmp_path / "hf"))
    given = list(tensors(reader))
    name, tensor = given[-1]
    changed = {
        "missing": given[:-1],
        "twice": [*given, (name, tensor)],
        "unknown": [*given, ("model.extra.weight", tensor)],
        "shape": [*given[:-1], (name, tensor.t())],
        "dtype": [*given[:-1], (name, tensor.double())],
    }[fault]
    with pytest.raises(ValueError, match="model.extra.weight" if fault == "unknown" else name):
        write_hf(tmp_path / "new", reader.model_config, iter(changed))
    assert not list(tmp_path.glob("new*"))
