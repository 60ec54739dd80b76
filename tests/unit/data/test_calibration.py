"""Calibration windows: the published draw, re-implemented here the long way round."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_prune.config import PreprocessConfig
from megatron_prune.data import preprocess
from megatron_prune.data.calibration import windows
from megatron_prune.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a number, and a beginning-of-text token in front, as LLaMA's tokenizers do."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {str(number): number + 3 for number in range(1000)}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of 1 to 60 numbers."""
    numbers = random.Random(7)
    lines = []
    for _ in range(40):
        words = [str(numbers.randrange(1000)) for _ in range(numbers.randint(1, 60))]
        lines.append(json.dumps({"text": " ".join(words)}))
    file = tmp_path_factory.mktemp("text") / "numbers.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def published_draw(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, count: int, length: int, seed: int
) -> torch.Tensor:
    """An independent implementation of the draw, with the global generator."""
    state = random.getstate()
    random.seed(seed)
    drawn = []
    for _ in range(count):
        encoded = torch.empty(1, 0)
        while encoded.shape[1] <= length:
            document = documents[random.randint(0, len(documents) - 1)]
            encoded = tokenizer(document, return_tensors="pt").input_ids
        start = random.randint(0, encoded.shape[1] - length - 1)
        drawn.append(encoded[:, start : start + length])
    random.setstate(state)
    return torch.cat(drawn)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_equal_to_the_published_draw(text: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()][:30]
    drawn = windows([text], tokenizer, 25, 32, seed, slice(30))
    assert drawn.tokens.dtype == torch.int64 and drawn.tokens.shape == (25, 32)
    assert torch.equal(drawn.tokens, published_draw(documents, tokenizer, 25, 32, seed))


def test_deterministic_and_recorded(text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first, second, other = (windows([text], tokenizer, 4, 16, seed) for seed in (3, 3, 4))
    assert torch.equal(first.tokens, second.tokens) and first.sha256 == second.sha256 != other.sha256
    assert first.info() == {
        "source": ["numbers.jsonl"],
        "documents": 40,
        "seed": 3,
        "count": 4,
        "length": 16,
        "sha256": first.sha256,
    }


def test_leaves_the_global_generator_alone(text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    state = random.getstate()
    windows([text], tokenizer, 2, 8, 0)
    assert random.getstate() == state


def test_a_document_of_exactly_the_length_is_too_short(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "a.txt"
    file.write_text("1 2 3")  # four tokens with <s>
    assert windows([file], tokenizer, 2, 3, 0).tokens.tolist() == [[1, 4, 5], [1, 4, 5]]
    with pytest.raises(UserError, match="none of its 1 documents is longer than 4 tokens"):
        windows([file], tokenizer, 2, 4, 0)


def test_one_long_document_among_many_is_found(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "a.jsonl"
    documents = ["1"] * 50 + ["1 2 3 4 5 6 7 8"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    assert windows([file], tokenizer, 3, 6, 0).tokens.shape == (3, 6)


def test_preprocessed_documents_give_the_same_draw(
    text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    prefix = tmp_path / "numbers"
    preprocess.preprocess(
        PreprocessConfig(input=(str(text),), output=prefix, tokenizer=tmp_path / "tokenizer", workers=1)
    )
    one, other = (windows([source], tokenizer, 25, 32, 5, slice(30)) for source in (text, prefix))
    assert torch.equal(one.tokens, other.tokens) and other.source == ("numbers",) and other.documents == 30
    with pytest.raises(UserError, match="no document found"):
        windows([prefix], tokenizer, 2, 8, 0, slice(90, 99))
    with pytest.raises(UserError, match="nothing.bin does not exist; give text in"):
        windows([tmp_path / "nothing"], tokenizer, 2, 8, 0)
