"""Files that come along with a model: carried under their names, in folders too, byte for byte."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_prune.data.tokenizer_files import DESCRIPTION, check_tokenizer_files, copy_tokenizer, tokenizer_files
from megatron_prune.errors import UserError
from megatron_prune.model.convert import HFReader
from megatron_prune.model.description import Description, read_description
from megatron_prune.verbs.import_hf import ImportConfig, run
from tests.models import byte_tokenizer, tiny_llama

CARRIED = {
    "tokenizer.json": b'{"model": {"vocab": {"\\u0000": 0, "a": 1, "a": 1}}}',
    "tokenizer_config.json": b'\xef\xbb\xbf{"model_max_length": 1000000000000000019884624838656}',
    "tokenizer.model": b"\x00\xff",
    "tokenizer.model.v3": b"3",
    "original/tokenizer.model": b"IQ== 0\n",
    "qwen.tiktoken": b"IQ== 0\n",
    "tekken.json": b"{}",
    "vocab.txt": b"[UNK]\n",
    "chat_template.jinja": b"{{ messages }}\r\n",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
    "generation_config.json": b'{"eos_token_id": [1, 2]}',
}
OTHERS = ("config.json", "model.safetensors", "additional_chat_templates/notes.txt", "original/params.json")


def fill(folder: Path) -> None:
    for name in (*CARRIED, *OTHERS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(CARRIED.get(name, b"other"))


def test_every_published_file_is_carried_byte_for_byte(tmp_path: Path) -> None:
    fill(tmp_path / "model")
    check_tokenizer_files(tmp_path / "model")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(tmp_path / "model", tmp_path / "copy")
    found = {str(file.relative_to(tmp_path / "copy")): file.read_bytes() for file in tokenizer_files(tmp_path / "copy")}
    assert found == CARRIED
    assert {str(f.relative_to(tmp_path / "copy")) for f in (tmp_path / "copy").rglob("*") if f.is_file()} == set(found)


def test_damaged_ones_are_named(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json", "added_tokens.json"):
        for content in (b"{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"[]", b"\xff\xfe{\0}\0"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=f"{name}.*copy it again"):
                check_tokenizer_files(tmp_path)
        (tmp_path / name).unlink()


def test_a_pipe_is_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    check_tokenizer_files(tmp_path)
    assert tokenizer_files(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "value"), [("tie_word_embeddings", True), ("rotary_base", 1e6), ("layernorm_epsilon", 0.1)]
)
def test_a_description_that_contradicts_its_own_config_is_refused(tmp_path: Path, name: str, value: object) -> None:
    """A tied output layer, say, would be dropped without a word."""
    config = HFReader(tiny_llama(tmp_path / "hf")).model_config
    Description(config).write(tmp_path)
    assert read_description(tmp_path).config == config
    about = json.loads((tmp_path / DESCRIPTION).read_text())
    about["model"][name] = value
    (tmp_path / DESCRIPTION).write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"{name} is .* and its config.json says"):
        read_description(tmp_path)
    about["model"] |= {name: getattr(config, name), "hf_config": {}}
    (tmp_path / DESCRIPTION).write_text(json.dumps(about))
    with pytest.raises(UserError, match="key 'model'"):
        read_description(tmp_path)


def test_import_says_that_no_tokenizer_comes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_llama(tmp_path / "hf", vocab_size=257)
    run(ImportConfig(input=str(source), output=tmp_path / "bare"))
    assert f"{source} has no tokenizer: none comes along" in capsys.readouterr().out
    run(ImportConfig(input=str(byte_tokenizer(source)), output=tmp_path / "whole"))
    assert "has no tokenizer" not in capsys.readouterr().out
