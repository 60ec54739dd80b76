"""Tokenizers as they are published give the ids of transformers' own loading; damaged ones are one line each."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_prune.config import PreprocessConfig
from megatron_prune.data import preprocess
from megatron_prune.data.calibration import windows
from megatron_prune.data.dataset import TokenWindows, evaluation_windows
from megatron_prune.data.encoder import load_encoder
from megatron_prune.data.indexed import open_indexed
from megatron_prune.data.tokenizer import load_tokenizer, tokenize
from megatron_prune.data.tokenizer_files import copy_tokenizer
from megatron_prune.errors import UserError

WORDS = "the cat sat on a mat and then it ran off to see what the dog had done with all of its old bones".split()
TEXTS = ["the cat ran off", " what  the dog\nhad é 日 😀\t", "<|end|> of it </s>", "", "a\u0000b", "x" * 300]


def sentences(count: int = 200) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=20)) for _ in range(count)]


# --- forms as published ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE (`bytes/`), its slow files, and SentencePiece models of both kinds."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("trained")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(sentences(), trainer)
    (folder / "bytes").mkdir()
    core.save(str(folder / "bytes" / "tokenizer.json"))
    core.model.save(str(folder / "bytes"))
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences()),
            model_prefix=str(folder / kind),
            vocab_size=330,
            model_type=kind,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return folder


LLAMA3_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"},
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "auto_map": {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Slow", None]},
    "vocab_size": 128256,
}
LLAMA3_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|end|>",
    "model_max_length": 131072,
    "added_tokens_decoder": {"0": {"content": "<|end|>", "special": True, "normalized": False}},
    "chat_template": "{{ messages }}",
}
LLAMA2_TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "sp_model_kwargs": {},
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False},
    "unk_token": {"__type": "AddedToken", "content": "<unk>", "lstrip": False, "normalized": False, "rstrip": False},
}
NAMED_TEMPLATES = [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ b }}"}]
SPECIAL_MAP = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": "<unk>"}

Form = tuple[dict[str, str], dict[str, Any]]
"""Files taken from the trained ones (name -> source), and JSON files."""
FORMS: dict[str, Form] = {
    "llama-3.1": (
        {"tokenizer.json": "bytes/tokenizer.json"},
        {"config.json": LLAMA3_CONFIG, "tokenizer_config.json": LLAMA3_TOKENIZER},
    ),
    "tokenizer.json only": ({"tokenizer.json": "bytes/tokenizer.json"}, {}),
    "llama-2, slow": (
        {"tokenizer.model": "bpe.model"},
        {"config.json": {"model_type": "llama"}, "tokenizer_config.json": LLAMA2_TOKENIZER},
    ),
    "llama-1, special tokens in their own file": (
        {"tokenizer.model": "bpe.model"},
        {
            "config.json": {"model_type": "llama"},
            "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "model_max_length": 1e30},
            "special_tokens_map.json": SPECIAL_MAP,
            "added_tokens.json": {"<pad>": 330},
        },
    ),
    "SentencePiece only": ({"tokenizer.model": "bpe.model"}, {}),
    "SentencePiece only, unigram": ({"tokenizer.model": "unigram.model"}, {"config.json": {"model_type": "llama"}}),
    "T5": (
        {"spiece.model": "unigram.model"},
        {"config.json": {"model_type": "t5"}, "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}},
    ),
    "GPT-2, slow, as published": (
        {"vocab.json": "bytes/vocab.json", "merges.txt": "bytes/merges.txt"},
        {"config.json": {"model_type": "gpt2"}, "tokenizer_config.json": {"model_max_length": 1024}},
    ),
    "GPT-2, both, as published": (
        {
            "tokenizer.json": "bytes/tokenizer.json",
            "vocab.json": "bytes/vocab.json",
            "merges.txt": "bytes/merges.txt",
        },
        {"config.json": {"model_type": "gpt2"}},
    ),
    "Qwen2, slow": (
        {"vocab.json": "bytes/vocab.json", "merges.txt": "bytes/merges.txt"},
        {
            "config.json": {"model_type": "qwen2"},
            "tokenizer_config.json": {
                "tokenizer_class": "Qwen2Tokenizer",
                "eos_token": "<|end|>",
                "bos_token": None,
                "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
                "chat_template": NAMED_TEMPLATES,
                "added_tokens_decoder": {
                    "300": {"content": "<|im_start|>", "special": True, "normalized": False},
                    "301": {"content": "<|im_end|>", "special": True, "normalized": False},
                },
            },
        },
    ),
    "Nemotron, class of a newer library": (
        {"tokenizer.json": "bytes/tokenizer.json"},
        {
            "config.json": {"model_type": "nemotron"},
            "tokenizer_config.json": {"tokenizer_class": "FutureTokenizer", "eos_token": "<|end|>"},
        },
    ),
    "class in config.json": (
        {"tokenizer.model": "bpe.model"},
        {"config.json": {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}},
    ),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, trained: Path, tmp_path: Path) -> Path:
    files, written = FORMS[request.param]
    folder = tmp_path / "model"
    folder.mkdir()
    for name, source in files.items():
        shutil.copy(trained / source, folder / name)
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def own(folder: Path) -> Any:
    """transformers' loading, of a copy whose config.json it understands."""
    plain = folder.with_name("plain")
    shutil.copytree(folder, plain)
    about = json.loads((plain / "config.json").read_text()) if (plain / "config.json").exists() else {}
    about.pop("auto_map", None)
    about.pop("rope_scaling", None)
    if about:
        (plain / "config.json").write_text(json.dumps(about))
    return AutoTokenizer.from_pretrained(plain, local_files_only=True)


def first_document(prefix: Path) -> list[int]:
    data = open_indexed(prefix, 400)  # whose arrays do not outlive it
    return list(map(int, data[0]))


def test_ids_are_those_of_transformers_wherever_text_is_read(form: Path, tmp_path: Path) -> None:
    theirs, ours = own(form), load_tokenizer(form)
    assert tokenize(ours, TEXTS) == [theirs(text).input_ids for text in TEXTS]
    assert type(ours) is type(theirs) and ours.eos_token_id == theirs.eos_token_id
    assert load_encoder(form).encode(TEXTS) == [theirs(text).input_ids for text in TEXTS]
    (tmp_path / "a.txt").write_text(" ".join(sentences(3)))
    text = (tmp_path / "a.txt").read_text()
    prefix = tmp_path / "a"
    preprocess.preprocess(PreprocessConfig(input=(str(tmp_path / "a.txt"),), output=prefix, tokenizer=form, workers=1))
    assert first_document(prefix) == theirs(text).input_ids
    plain = theirs(text, add_special_tokens=False).input_ids
    assert evaluation_windows(tmp_path / "a.txt", ours, 8, 2).tokens.flatten().tolist() == plain[:16]
    drawn = windows([tmp_path / "a.txt"], ours, 1, 8, 0).tokens[0].tolist()
    assert any(theirs(text).input_ids[start : start + 8] == drawn for start in range(len(plain)))


def test_what_is_carried_gives_the_same_ids(form: Path, tmp_path: Path) -> None:
    """In the folder `tokenizer` of a checkpoint, which has no config.json beside it, and in an export."""
    about = json.loads((form / "config.json").read_text()) if (form / "config.json").exists() else {}
    (tmp_path / "megatron_prune.json").write_text(json.dumps({"model": {"family": about.get("model_type", "llama")}}))
    (tmp_path / "tokenizer").mkdir()
    copy_tokenizer(form, tmp_path / "tokenizer")
    if "tokenizer_class" not in about:
        assert tokenize(load_tokenizer(tmp_path / "tokenizer"), TEXTS) == tokenize(load_tokenizer(form), TEXTS)
    carried = {file.name for file in (tmp_path / "tokenizer").iterdir()}
    assert carried == {file.name for file in form.iterdir()} - {"config.json"}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_file_by_itself(trained: Path, tmp_path: Path, kind: str) -> None:
    """As Megatron-LM takes it: no special tokens but, where asked for, the end of text."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(trained / f"{kind}.model"))
    (tmp_path / "a.txt").write_text("the cat é 日")
    preprocess.preprocess(
        PreprocessConfig(
            input=(str(tmp_path / "a.txt"),),
            output=tmp_path / "a",
            tokenizer=trained / f"{kind}.model",
            workers=1,
            append_eod=True,
        )
    )
    ids = [*model.encode("the cat é 日"), model.eos_id()]
    assert first_document(tmp_path / "a") == ids
    about = json.loads((tmp_path / "a.json").read_text())
    assert about["largest_id"] == max(ids) and about["end_of_text"] == 2


def test_a_byte_order_mark_in_any_file(trained: Path, tmp_path: Path) -> None:
    files = {"tokenizer.json": (trained / "bytes" / "tokenizer.json").read_bytes()}
    files |= {name: json.dumps(content).encode() for name, content in FORMS["llama-3.1"][1].items()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    expected = load_encoder(trained / "bytes").encode(["the cat"])
    assert tokenize(load_tokenizer(tmp_path), ["the cat"]) == expected


@pytest.mark.parametrize("name", ["megatron_prune.json", "megatron_prune_maxtext.json"])
def test_the_model_of_a_checkpoint_decides_the_class(trained: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(trained / "bytes" / "tokenizer.json", tmp_path / "tokenizer" / "tokenizer.json")
    (tmp_path / name).write_text(json.dumps({"model": {"family": "gpt2"}}))
    assert load_tokenizer(tmp_path / "tokenizer").eos_token == "<|endoftext|>"


def test_code_that_comes_along_is_not_run(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "qwen.tiktoken").write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match=r"its tokenizer is 'evil.Evil', .*never run.*tokenizer.json"):
        load_tokenizer(tmp_path)
    shutil.copy(trained / "bytes" / "tokenizer.json", tmp_path)
    assert isinstance(load_tokenizer(tmp_path), PreTrainedTokenizerFast)
    for name in ("AutoModelForCausalLM", "pipeline", "Trainer", "os.system"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        assert isinstance(load_tokenizer(tmp_path), PreTrainedTokenizerFast)
    assert not (tmp_path / "ran").exists()


def test_what_is_saved_with_a_tokenizer_changes_no_text(trained: Path, tmp_path: Path) -> None:
    """Neither a longest text, nor padding, nor merges left out at random."""
    shutil.copy(trained / "bytes" / "tokenizer.json", tmp_path)
    expected = load_encoder(tmp_path).encode(TEXTS)
    padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>"}
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fast(truncation=cut, padding=padding, model__dropout=0.9)(tmp_path)
    assert load_encoder(tmp_path).encode(TEXTS) == expected == tokenize(load_tokenizer(tmp_path), TEXTS)


def test_expressions_that_take_for_ever_are_given_up(trained: Path, tmp_path: Path) -> None:
    """The library's own limit on steps back in one match; it panics then."""
    shutil.copy(trained / "bytes" / "tokenizer.json", tmp_path)
    fast(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"})(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for encode in (
        lambda: tokenize(tokenizer, ["a" * 60 + "!"]),
        lambda: load_encoder(tmp_path).encode(["a" * 60 + "!"]),
    ):
        with pytest.raises(UserError, match="the tokenizer fails on a text .*retry-limit"):
            encode()


def test_no_room_for_the_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        monkeypatch.context() as patched,
        pytest.raises(UserError, match="cannot be laid out .*make room where TMPDIR says"),
    ):
        patched.setattr("tempfile.tempdir", "/nothing/there")
        load_tokenizer(trained / "bytes")


# --- tokens beyond the model ---


@pytest.fixture
def padded(trained: Path, tmp_path: Path) -> Path:
    """Ids 0 to 299, and <pad> as 300."""
    folder = tmp_path / "padded"
    made = PreTrainedTokenizerFast(tokenizer_file=str(trained / "bytes" / "tokenizer.json"), eos_token="<|end|>")
    made.add_special_tokens({"pad_token": "<pad>"})
    made.save_pretrained(folder)
    return folder


def readers(padded: Path, text: Path, cache: Path) -> dict[str, Callable[[], Any]]:
    """Everything that turns text into ids for a model of 300 rows."""

    def preprocessed() -> Any:
        prefix = text.with_name("prefix")
        preprocess.preprocess(PreprocessConfig(input=(str(text),), output=prefix, tokenizer=padded, workers=1))
        return open_indexed(prefix, 300)

    def tokenizer() -> Any:
        return load_tokenizer(padded, 300)

    return {
        "calibration": lambda: windows([text], tokenizer(), 1, 8, 0),
        "evaluation": lambda: evaluation_windows(text, tokenizer(), 8),
        "training": lambda: TokenWindows([text], tokenizer(), 8, 0, cache=cache),
        "preprocess": preprocessed,
    }


def test_a_padding_token_beyond_the_model(padded: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(" ".join(sentences(3)))
    for read in readers(padded, text, tmp_path / "cache").values():
        read()
    text.write_text("<pad> ".join(sentences(3)))
    for name in ("prefix.bin", "prefix.idx", "prefix.json"):
        (tmp_path / name).unlink()
    for name, read in readers(padded, text, tmp_path / "cache").items():
        message = "it holds the id 300" if name == "preprocess" else "the text holds the token '<pad>', id 300"
        with pytest.raises(UserError, match=message):
            read()


def test_tasks_refuse_a_token_beyond_the_model(padded: Path) -> None:
    from megatron_prune.evaluation.harness import Harness

    scorer: Any = None  # nothing is scored
    harness = Harness(scorer, load_tokenizer(padded, 300))
    assert harness.tok_encode("the cat")
    with pytest.raises(UserError, match="the text holds the token '<pad>', id 300"):
        harness.tok_encode("the <pad>")
    beyond = load_tokenizer(padded, 300)
    beyond.bos_token = "<pad>"
    with pytest.raises(UserError, match="'<pad>', id 300"):
        Harness(scorer, beyond)


def test_tokens_cached_for_another_model_are_looked_at(padded: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("<pad> ".join(sentences(3)))
    TokenWindows([text], load_tokenizer(padded, 301), 8, 0, cache=tmp_path)
    with pytest.raises(UserError, match="'<pad>', id 300"):
        TokenWindows([text], load_tokenizer(padded, 300), 8, 0, cache=tmp_path)


def test_a_prefix_of_an_older_version_is_judged_by_its_vocabulary(padded: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(" ".join(sentences(3)))
    readers(padded, text, tmp_path)["preprocess"]()
    about = json.loads((tmp_path / "prefix.json").read_text())
    assert about["vocab_size"] == 301 and about.pop("largest_id") < 300
    (tmp_path / "prefix.json").write_text(json.dumps(about))
    open_indexed(tmp_path / "prefix", 301)
    with pytest.raises(UserError, match="preprocessed with a vocabulary of 301"):
        open_indexed(tmp_path / "prefix", 300)


def test_the_tokenizer_of_another_model(padded: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not fit the model: its ids reach 300, the model's vocabulary has 299"):
        load_tokenizer(padded, 299)
    many = load_tokenizer(padded)
    many.add_special_tokens({"additional_special_tokens": [f"<{number}>" for number in range(64)]})
    many.save_pretrained(tmp_path / "many")
    with pytest.raises(UserError, match="its ids reach 364"):
        load_tokenizer(tmp_path / "many", 300)
    load_tokenizer(tmp_path / "many", 301)


# --- damage ---

Damage = Callable[[Path], None]


def written(name: str, content: Any) -> Damage:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return damage


def fast(**changes: Any) -> Damage:
    """tokenizer.json with keys changed; those of its model as `model__KEY`."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        for key, value in changes.items():
            place, _, inner = key.partition("__")
            if inner:
                content[place][inner] = value(content[place][inner]) if callable(value) else value
            else:
                content[place] = value
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return damage


def config(**changes: Any) -> Damage:
    return written("tokenizer_config.json", changes)


def only(name: str, content: Any, **about: Any) -> Damage:
    """Another form of tokenizer than tokenizer.json."""

    def damage(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        written(name, content)(folder)
        written("tokenizer_config.json", about)(folder)

    return damage


def replaced(make: Callable[[Path], Any]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        make(folder / "tokenizer.json")

    return damage


DEEP, LONG = b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"
TEN = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
REFUSED: dict[str, tuple[Damage, str]] = {
    "model null": (fast(model=None), "does not load"),
    "model a list": (fast(model=[]), "does not load"),
    "model text": (fast(model="BPE"), "does not load"),
    "model of no kind": (fast(model={}), "does not load"),
    "tokenizer.json a list": (written("tokenizer.json", []), "tokenizer.json"),
    "tokenizer.json null": (written("tokenizer.json", None), "tokenizer.json"),
    "tokenizer.json a number": (written("tokenizer.json", 5), "tokenizer.json"),
    "tokenizer.json text": (written("tokenizer.json", "a"), "tokenizer.json"),
    "tokenizer.json of nothing": (written("tokenizer.json", {}), "does not load"),
    "tokenizer.json empty": (written("tokenizer.json", b""), "damaged"),
    "tokenizer.json cut off": (written("tokenizer.json", b'{"model": {"typ'), "damaged"),
    "tokenizer.json deep": (written("tokenizer.json", DEEP), "damaged"),
    "tokenizer.json of long numbers": (written("tokenizer.json", LONG), "5000 digits"),
    "tokenizer.json not UTF-8": (written("tokenizer.json", b'{"a": "\xff"}'), "damaged"),
    "tokenizer.json UTF-16": (written("tokenizer.json", '{"a": 1}'.encode("utf-16")), "damaged"),
    "newer model": (fast(model__type="BPE2"), "written by a newer tokenizers library: model 'BPE2' .*upgrade"),
    "newer version": (fast(version="2.0"), "newer tokenizers library: version '2.0'"),
    "newer normalizer": (fast(normalizer={"type": "NFX"}), "newer tokenizers library: normalizer 'NFX'"),
    "newer part of a sequence": (
        fast(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Cut"}]}),
        "newer tokenizers library: pre_tokenizer 'Cut'",
    ),
    "newer decoder": (fast(decoder={"type": "ByteLevel2"}), "newer tokenizers library: decoder"),
    "normalizer of the wrong form": (fast(normalizer={"type": "Replace"}), "does not load"),
    "pre_tokenizer a number": (fast(pre_tokenizer=5), "does not load"),
    "decoder text": (fast(decoder="x"), "does not load"),
    "ids negative": (fast(model__vocab=lambda vocab: vocab | {"the": -1}), "does not load"),
    "ids beyond 32 bits": (fast(model__vocab=lambda vocab: vocab | {"the": 2**32}), "does not load"),
    "ids beyond int32": (fast(model__vocab=lambda vocab: vocab | {"zz": 2**31}), "allowed: 0 to 2147483646"),
    "ids text": (fast(model__vocab={"a": "0"}), "does not load"),
    "ids fractions": (fast(model__vocab={"a": 0.5}), "does not load"),
    "vocab null": (fast(model__vocab=None), "does not load"),
    "vocab a number": (fast(model__vocab=3), "does not load"),
    "merges without pieces": (fast(model__merges=[["nothing", "there"]]), "does not load"),
    "merges numbers": (fast(model__merges=[1, 2]), "does not load"),
    "merges of one": (fast(model__merges=["a"]), "does not load"),
    "no pieces": (fast(model__vocab={}, model__merges=[], added_tokens=[]), "has no pieces"),
    "bad regular expression": (
        fast(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}),
        "does not load",
    ),
    "bad regular expression in the normalizer": (
        fast(normalizer={"type": "Replace", "pattern": {"Regex": "[z-a]"}, "content": ""}),
        "does not load",
    ),
    "texts that grow": (fast(normalizer={"type": "Sequence", "normalizers": [TEN] * 9}), "longer; allowed: 1000"),
    "texts buried in tokens": (
        fast(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}] * 2000,
                "pair": [],
                "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
            }
        ),
        "adds 2000 tokens to each text",
    ),
    "template of unknown tokens": (
        fast(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "tokenizer is damaged",
    ),
    "added tokens a number": (fast(added_tokens=5), "does not load"),
    "added tokens of no form": (fast(added_tokens=[5]), "does not load"),
    "added id negative": (fast(added_tokens=[{"id": -1, "content": "x", "special": True}]), "does not load"),
    "added id huge": (fast(added_tokens=[{"id": 2**40, "content": "x", "special": True}]), "does not load"),
    "configuration a list": (written("tokenizer_config.json", []), "tokenizer_config.json"),
    "configuration null": (written("tokenizer_config.json", None), "tokenizer_config.json"),
    "configuration no JSON": (written("tokenizer_config.json", b"{'a': 1}"), "damaged"),
    "configuration deep": (written("tokenizer_config.json", DEEP), "damaged"),
    "class a number": (config(tokenizer_class=5), "key 'tokenizer_class': 5 given"),
    "class a list": (config(tokenizer_class=["LlamaTokenizer"]), "key 'tokenizer_class"),
    "end of text a number": (config(eos_token=5), "key 'eos_token"),
    "end of text a list": (config(eos_token=["</s>"]), "key 'eos_token"),
    "end of text without content": (config(eos_token={"special": True}), "key 'eos_token"),
    "end of text with a number as content": (config(eos_token={"content": 3}), "key 'eos_token"),
    "chat template a number": (config(chat_template=5), "key 'chat_template"),
    "named chat template without a name": (config(chat_template=[{"template": "x"}]), "key 'chat_template"),
    "added tokens a list": (config(added_tokens_decoder=[]), "key 'added_tokens_decoder"),
    "added tokens by name": (config(added_tokens_decoder={"x": {"content": "x"}}), "key 'added_tokens_decoder"),
    "added tokens below zero": (config(added_tokens_decoder={"-1": {"content": "x"}}), "key 'added_tokens_decoder"),
    "added tokens numbers": (config(added_tokens_decoder={"0": 3}), "key 'added_tokens_decoder"),
    "extra special tokens a number": (config(extra_special_tokens=5), "does not load"),
    "special tokens a list": (written("special_tokens_map.json", []), "special_tokens_map.json"),
    "added file a list": (written("added_tokens.json", []), "added_tokens.json"),
    "added file below zero": (written("added_tokens.json", {"x": -1}), "added_tokens.json: key 'x'"),
    "added file beyond 32 bits": (written("added_tokens.json", {"x": 2**33}), "added_tokens.json: key 'x'"),
    "added file text": (written("added_tokens.json", {"x": "y"}), "added_tokens.json: key 'x'"),
    "config a list": (written("config.json", []), "config.json"),
    "config no JSON": (written("config.json", b"{"), "config.json is damaged"),
    "config deep": (written("config.json", DEEP), "config.json is damaged"),
    "SentencePiece garbage": (only("tokenizer.model", b"garbage"), "tokenizer.model: not a SentencePiece model"),
    "SentencePiece empty": (only("tokenizer.model", b""), "tokenizer.model: not a SentencePiece model"),
    "SentencePiece zeros": (
        only("tokenizer.model", bytes(1000), tokenizer_class="LlamaTokenizer"),
        "tokenizer.model: not a SentencePiece model",
    ),
    "tiktoken": (only("tokenizer.model", b"IQ== 0\nIg== 1\n"), "is a tiktoken file.*tokenizer.json"),
    "tekken": (only("tekken.json", {"config": {}, "vocab": []}), "does not load"),
    "vocab.json a list": (only("vocab.json", [], tokenizer_class="GPT2Tokenizer"), "vocab.json"),
    "vocab.json below zero": (only("vocab.json", {"a": -1}, tokenizer_class="GPT2Tokenizer"), "vocab.json: key 'a'"),
    "merges without vocabulary": (only("merges.txt", b"a b\n", tokenizer_class="GPT2Tokenizer"), "GPT2Tokenizer|load"),
    "a pipe": (replaced(os.mkfifo), "no tokenizer found"),
    "a device": (replaced(lambda path: path.symlink_to("/dev/zero")), "no tokenizer found"),
    "a folder": (replaced(Path.mkdir), "no tokenizer found"),
    "a link to nothing": (replaced(lambda path: path.symlink_to("nothing")), "no tokenizer found"),
    "nothing": (replaced(lambda path: None), "no tokenizer found"),
}
EITHER: dict[str, Damage] = {
    "added token of tokenizer.json with unknown keys": fast(added_tokens=[{"id": 0, "content": "x", "y": 1}]),
    "added tokens with unknown keys": config(added_tokens_decoder={"0": {"content": "x", "y": 1}}),
    "special token of no form": written("special_tokens_map.json", {"eos_token": {"x": 1}}),
    "no merges": fast(model__merges=None),
    "T5 over bytes": config(tokenizer_class="T5Tokenizer"),
    "BERT over bytes": config(tokenizer_class="BertTokenizer"),
    "Llama over bytes": config(tokenizer_class="LlamaTokenizer"),
    "Mistral's own": config(tokenizer_class="MistralCommonBackend"),
    "XLNet": config(tokenizer_class="XLNetTokenizer"),
    "kind of model a number": written("config.json", {"model_type": 5}),
    "kind of model unknown": written("config.json", {"model_type": "future"}),
    "paths elsewhere": config(vocab_file="/etc/passwd", tokenizer_file="/etc/passwd", gguf_file="x", name_or_path="y"),
    "a longest text of any length": config(model_max_length="long"),
    "end of text unknown": config(eos_token="<nothing>"),
    "special token numbers": written("special_tokens_map.json", {"eos_token": 5}),
    "pieces with NUL": fast(model__vocab=lambda vocab: vocab | {"\0": 300}),
    "empty added token": fast(added_tokens=[{"id": 0, "content": "", "special": True}]),
    "vocab.txt": only("vocab.txt", b"[UNK]\n[CLS]\n[SEP]\nthe\n", tokenizer_class="BertTokenizer"),
    "gaps": fast(model__vocab=lambda vocab: vocab | {"zz": 70000}),
    "truncation": fast(truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}),
}


@pytest.fixture
def damaged(trained: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(trained / "bytes" / "tokenizer.json", folder)
    written("tokenizer_config.json", LLAMA3_TOKENIZER)(folder)
    written("config.json", LLAMA3_CONFIG)(folder)
    return folder


@pytest.fixture(autouse=True)
def silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No library may say a word, not even its compiled code."""
    capfd.readouterr()
    yield
    said = capfd.readouterr()
    assert said.err == "" and "rror" not in said.out and "gnored" not in said.out


@pytest.mark.parametrize("case", REFUSED)
def test_damage_is_one_line(damaged: Path, tmp_path: Path, case: str) -> None:
    damage, part = REFUSED[case]
    damage(damaged)
    with pytest.raises(UserError, match=part) as caught:
        tokenize(load_tokenizer(damaged), TEXTS)
    assert str(damaged) in str(caught.value) and len(str(caught.value)) < 450
    output = tmp_path / "out"
    (tmp_path / "a.txt").write_text("the cat")
    with pytest.raises(UserError):
        preprocess.preprocess(PreprocessConfig(input=(str(tmp_path / "a.txt"),), output=output, tokenizer=damaged))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("case", EITHER)
def test_odd_ones_work_or_are_one_line(damaged: Path, case: str) -> None:
    EITHER[case](damaged)
    try:
        tokenizer = load_tokenizer(damaged, 300)
        assert len(tokenize(tokenizer, TEXTS)) == len(TEXTS) == len(load_encoder(damaged).encode(TEXTS))
    except UserError as error:
        assert str(damaged) in str(error) and len(str(error)) < 450


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(5000), b"IQ== 0\nIg== 1\n", b"\x0a\xff\xff\xff\xff\x0f"])
def test_a_damaged_sentencepiece_file_by_itself(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.model"):
        load_encoder(tmp_path / "a.model")


def test_a_program_without_standard_error(trained: Path) -> None:
    kept = os.dup(2)
    os.close(2)
    try:
        assert load_tokenizer(trained / "bytes")
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_installed_libraries_are_named(damaged: Path) -> None:
    fast(model=None)(damaged)
    with pytest.raises(UserError, match=f"transformers {transformers.__version__}"):
        load_tokenizer(damaged)
