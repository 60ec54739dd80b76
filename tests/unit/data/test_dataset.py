"""Training windows are a pure function of the index; evaluation windows follow the perplexity protocol."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_prune.data import dataset
from megatron_prune.data.dataset import TokenWindows, evaluation_windows
from megatron_prune.errors import UserError

END = 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": END} | {str(number): number + 3 for number in range(200)}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Ten documents of nine numbers: with <s> and </s> 110 tokens."""
    file = tmp_path / "numbers.jsonl"
    documents = [" ".join(str(9 * row + column) for column in range(9)) for row in range(10)]
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return file


def test_windows_cover_the_text_once_an_epoch(text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = TokenWindows([text], tokenizer, 10, seed=0, cache=tmp_path)
    assert len(data.tokens) == 110 and data.num_windows == 10
    flat = np.array(data.tokens)
    assert flat[:11].tolist() == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, END]
    for epoch in range(3):
        drawn = [data.sample(10 * epoch + index) for index in range(10)]
        assert all(window.dtype == torch.int64 and window.shape == (11,) for window in drawn)
        expected = [flat[start : start + 11].tolist() for start in range(0, 100, 10)]
        assert sorted(window.tolist() for window in drawn) == sorted(expected)


def test_sample_is_a_pure_function(text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    indices = [0, 37, 5, 12, 999, 5]
    first = TokenWindows([text], tokenizer, 10, seed=1, cache=tmp_path)
    second = TokenWindows([text], tokenizer, 10, seed=1, cache=tmp_path / "other")
    forwards = [first.sample(index).tolist() for index in indices]
    backwards = [second.sample(index).tolist() for index in reversed(indices)]
    assert forwards == backwards[::-1]
    assert first.batch(indices).tolist() == forwards


def test_order_depends_on_seed_and_epoch(text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    a, b = (TokenWindows([text], tokenizer, 5, seed=seed, cache=tmp_path) for seed in (1, 2))
    epochs = [[a.sample(index).tolist() for index in range(start, start + 21)] for start in (0, 21)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != [b.sample(index).tolist() for index in range(21)]


def test_order_never_changes(text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A resumed run must see the same data under another numpy: this order is written down."""
    data = TokenWindows([text], tokenizer, 10, seed=0, cache=tmp_path)
    drawn = [int(data.sample(index)[0]) for index in range(10)]
    assert drawn == [int(data.tokens[10 * window]) for window in (8, 2, 4, 3, 6, 0, 9, 1, 5, 7)]


def test_the_cache_is_used_and_keyed_by_everything(
    text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    made: list[int] = []
    original = dataset.flat_tokens
    monkeypatch.setattr(dataset, "flat_tokens", lambda *a: made.append(1) or original(*a))
    variants = [{}, {"append_eod": False}, {"documents": slice(5)}]
    for variant in variants * 2:
        TokenWindows([text], tokenizer, 10, seed=0, cache=cache, **variant)
    TokenWindows([text], tokenizer, 20, seed=9, cache=cache)
    assert len(made) == len(variants)
    text.write_text(text.read_text().replace("89", "88"))
    TokenWindows([text], tokenizer, 10, seed=0, cache=cache)
    assert len(made) == len(variants) + 1
    assert not list(cache.glob("*.partial"))


def test_documents_and_end_token(text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = TokenWindows([text], tokenizer, 4, seed=0, append_eod=False, documents=slice(2, 4), cache=tmp_path)
    assert data.tokens.tolist() == [1, *range(21, 30), 1, *range(30, 39)]
    assert data.info() == {
        "source": ["numbers.jsonl"],
        "tokens": 20,
        "windows": 4,
        "seq_length": 4,
        "seed": 0,
        "sha256": data.key,
    }


def test_too_little_text(text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert TokenWindows([text], tokenizer, 109, seed=0, cache=tmp_path).num_windows == 1
    with pytest.raises(UserError, match="110 tokens do not fill one window of 110"):
        TokenWindows([text], tokenizer, 110, seed=0, cache=tmp_path)


def test_no_end_token(text: Path, tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
    with pytest.raises(UserError, match="no end-of-text token"):
        TokenWindows([text], bare, 4, seed=0, cache=tmp_path)


def test_evaluation_windows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(map(str, range(23))))
    text = evaluation_windows(file, tokenizer, 5)
    assert text.tokens.tolist() == [list(range(start, start + 5)) for start in (3, 8, 13, 18)]  # no <s>
    assert text.num_tokens == 23 and text.window == 5 and len(text.sha256) == 64
    assert evaluation_windows(file, tokenizer, 5, 2).tokens.tolist() == text.tokens[:2].tolist()
    assert text.info()["stride"] == 5 and text.info()["windows"] == 4
    with pytest.raises(UserError, match="hold 4 windows of 5; 9 wanted"):
        evaluation_windows(file, tokenizer, 5, 9)
    with pytest.raises(UserError, match="hold 0 windows of 24; 1 wanted"):
        evaluation_windows(file, tokenizer, 24)
