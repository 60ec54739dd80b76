"""Conversations as transformers' own tokenizer renders them, wherever text is read; and templates that are no good."""

from __future__ import annotations

import datetime
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_prune.__main__ import main
from megatron_prune.data import preprocess, rendering
from megatron_prune.data.calibration import windows
from megatron_prune.data.chat import Conversations, read_template
from megatron_prune.data.dataset import TokenWindows, _cache_key, evaluation_windows
from megatron_prune.data.encoder import load_encoder
from megatron_prune.data.text import BadDocument, read_documents
from megatron_prune.data.tokenizer import document_ids, form_of, load_tokenizer
from megatron_prune.errors import UserError
from tests.chats import TEMPLATE, VOCABULARY, chat_model, conversations, write_chats, write_rows
from tests.runs import refused_in_a_line


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat") / "hf")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats.jsonl")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def theirs(hf: Path, chats: list[list[dict[str, str]]] | None = None) -> list[list[int]]:
    """Token ids of conversations by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(hf)
    found: list[list[int]] = tokenizer.apply_chat_template(chats or conversations(), tokenize=True, return_dict=False)
    return found


def ours(hf: Path, file: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(hf, VOCABULARY, chat=True)
    return document_ids(tokenizer, read_documents([file], form=form_of(tokenizer)))


def prepared(hf: Path, file: Path, prefix: Path) -> None:
    """Preprocess conversations."""
    asked = ["preprocess", "--input", str(file), "--output", str(prefix), "--tokenizer", str(hf), "--workers", "1"]
    assert main([*asked, "--apply-chat-template"]) == 0


def shared_gpt(messages: list[dict[str, str]]) -> dict[str, Any]:
    """A conversation in the older form."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[each["role"]], "value": each["content"]} for each in messages]}


def in_parts(messages: list[dict[str, str]]) -> dict[str, Any]:
    """A conversation whose contents are lists of parts, with keys that say nothing."""
    parts = [[{"type": "text", "text": each["content"][:3]}, {"text": each["content"][3:]}] for each in messages]
    return {"messages": [{**each, "content": part, "name": None} for each, part in zip(messages, parts, strict=True)]}


def in_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(
        pyarrow.table({"id": list(range(len(rows))), "messages": [row["messages"] for row in rows]}), path
    )
    return path


@pytest.mark.parametrize(
    ("name", "row", "write"),
    [
        ("a.jsonl", lambda messages: {"messages": messages, "text": "none of it"}, write_rows),
        ("b.jsonl", shared_gpt, write_rows),
        ("c.jsonl", in_parts, write_rows),
        ("d.parquet", lambda messages: {"messages": messages}, in_parquet),
    ],
)
def test_rows_become_what_transformers_makes_of_them(
    hf: Path, tmp_path: Path, name: str, row: Callable[..., Any], write: Callable[..., Path]
) -> None:
    file = write(tmp_path / name, [row(messages) for messages in conversations()])
    expected, found = theirs(hf), ours(hf, file)
    assert found == expected
    start = AutoTokenizer.from_pretrained(hf).bos_token_id
    assert all(ids.count(start) == 1 and ids[0] == start for ids in found), "a beginning each, and no second one"


def test_templates_are_found_where_transformers_finds_them(hf: Path, tmp_path: Path, chats: Path) -> None:
    about = json.loads((hf / "tokenizer_config.json").read_text())
    named = TEMPLATE.replace("im_start", "s")
    forms = [
        {"tokenizer_config.json": {"chat_template": named}},
        {
            "tokenizer_config.json": {
                "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": named}]
            }
        },
        {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": {"chat_template": "not this one"}},
    ]
    for number, form in enumerate(forms):
        copy = chat_model(tmp_path / f"hf{number}", template=None)
        for name, content in form.items():
            text = content if isinstance(content, str) else json.dumps(about | content)
            (copy / name).write_text(text)
        assert ours(copy, chats) == theirs(copy) != [], form
    (copy / "chat_template.jinja").unlink()
    (copy / "tokenizer_config.json").write_text(json.dumps(about))
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))  # of older processors
    assert read_template(copy) == TEMPLATE


def test_windows_of_calibration_begin_with_conversations(hf: Path, chats: Path) -> None:
    tokenizer, each, length = load_tokenizer(hf, VOCABULARY, chat=True), theirs(hf), 150
    drawn = windows([chats], tokenizer, 7, length, seed=3)
    generator, waiting, expected = random.Random(3), list[int](), []
    for _ in range(7):
        window: list[int] = []
        while len(window) < length:
            if not waiting:
                waiting = list(range(len(each)))
                generator.shuffle(waiting)
            window += each[waiting.pop()]
        expected.append(window[:length])
    assert drawn.tokens.tolist() == expected
    assert drawn.info()["chat_template_sha256"] == tokenizer.conversations.sha256
    assert windows([chats], tokenizer, 7, length, seed=4).sha256 != drawn.sha256
    with pytest.raises(UserError, match="a window has 9999 tokens and its 12 conversations have fewer"):
        windows([chats], tokenizer, 1, 9999, seed=0)


def test_training_text_is_conversations_end_to_end(hf: Path, chats: Path) -> None:
    tokenizer = load_tokenizer(hf, VOCABULARY, chat=True)
    data = TokenWindows([chats], tokenizer, 16, seed=0)
    assert np.array_equal(data.tokens, np.concatenate(theirs(hf)))
    assert data.info()["chat_template_sha256"] == tokenizer.conversations.sha256
    other = chat_model(chats.parent / "other", template=TEMPLATE.replace("|im_start|", "s"))
    changed = TokenWindows([chats], load_tokenizer(other, VOCABULARY, chat=True), 16, seed=0)
    assert changed.key != data.key, "tokens in the cache are those of a template"


def test_preprocess_writes_conversations_and_counts_what_is_none(hf: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": messages} for messages in conversations()]
    rows[3:3] = [{"text": "plain"}, {"messages": [{"role": "pirate", "content": "arr"}]}]
    file = write_rows(tmp_path / "a.jsonl", rows)
    prepared(hf, file, tmp_path / "p")
    found = IndexedDataset(str(tmp_path / "p"))
    assert [found[number].tolist() for number in range(len(found))] == theirs(hf)
    about = json.loads((tmp_path / "p.json").read_text())
    assert about["bad_lines"] == 2 and len(about["chat_template_sha256"]) == 64
    assert "no conversation under the key 'messages' or 'conversations'" in about["listed_bad_lines"][0]
    assert "a.jsonl:5:" in about["listed_bad_lines"][1] and "no pirate" in about["listed_bad_lines"][1]


def test_rows_of_parquet_that_hold_nothing_are_bad_lines(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A conversation may stand in the older column, as in lines of JSON, where the newer one holds nothing."""
    chats = conversations(5)
    newer = [chats[0], None, [], [None], [{"role": "user", "content": None}], None, chats[2]]
    older = [None] * 5 + [shared_gpt(chats[1])["conversations"], None]
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"messages": newer, "conversations": older}), file)
    prepared(hf, file, tmp_path / "p")
    found = IndexedDataset(str(tmp_path / "p"))
    assert [found[number].tolist() for number in range(len(found))] == theirs(hf, chats[:3])
    listed = json.loads((tmp_path / "p.json").read_text())["listed_bad_lines"]
    wanted = ("no conversation under", "no list of", "no message but None", "content is no text")
    for number, (line, message) in enumerate(zip(listed, wanted, strict=True), start=2):
        assert f"a.parquet:{number}: " in line and message in line
    told = capsys.readouterr()
    assert "4 bad lines left out" in told.out and "Traceback" not in told.err
    parquet.write_table(pyarrow.table({"messages": pyarrow.nulls(3)}), file)
    asked = f"preprocess --input {file} --output {tmp_path / 'q'} --tokenizer {hf} --apply-chat-template"
    refused_in_a_line(asked, "--input: no document found", capsys)


def test_a_perplexity_of_conversations(hf: Path, chats: Path, tmp_path: Path) -> None:
    result = tmp_path / "p.json"
    asked = ["evaluate", str(hf), "--text", str(chats), "--window", "64", "--windows", "0", "--output", str(result)]
    assert main([*asked, "--apply-chat-template"]) == 0
    found = json.loads(result.read_text())
    ids = torch.tensor(np.concatenate(theirs(hf)))
    cut = ids[: len(ids) // 64 * 64].view(-1, 64)
    model = AutoModelForCausalLM.from_pretrained(hf)
    with torch.no_grad():
        loss = sum(float(model(window[None], labels=window[None]).loss) for window in cut) / len(cut)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["text"]["chat_template_sha256"] and "conversations by the chat template" in found["protocol"]


def test_prune_says_by_which_template_it_has_read(hf: Path, chats: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = ["prune", str(hf), str(run), "--method", "wanda", "--target", "2:4", "--calibration", str(chats)]
    sizes = ["--calibration-samples", "3", "--calibration-seq-length", "40"]
    assert main([*asked, *sizes, "--apply-chat-template"]) == 0
    record = json.loads((run / "decision" / "decision.json").read_text())["calibration"]
    tokenizer = load_tokenizer(hf, VOCABULARY, chat=True)
    assert record == windows([chats], tokenizer, 3, 40, 0).info() and "chat_template_sha256" in record
    assert "apply_chat_template: true" in (run / "config.yaml").read_text()


def test_a_day_in_a_template_is_always_the_same(tmp_path: Path, chats: Path) -> None:
    hf = chat_model(tmp_path / "hf", template="{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    tokenizer = load_tokenizer(hf, VOCABULARY, chat=True)
    assert tokenizer.conversations.prompt([{"role": "user", "content": "Hi"}]) == "26 Jul 2024 Hi"


# --- what is no good ---

ROUNDS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)"),
        ("{% for x", "the chat template is no jinja"),
        ("{{ raise_exception('roles must alternate') }}", "the chat template of"),
        ("{{ messages[7].content.nothing }}", "does not take it"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not take it"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "does not take it"),
        (ROUNDS, "the chat template takes more than 0.5 seconds for a conversation"),
        ("{{ 7 ** (7 ** (7 ** 7)) }}", "the chat template takes more than 0.5 seconds"),
        ("{{ 'x' * 10 ** 10 }}", "the chat template takes more than 1073741824 bytes"),
        ("{{ 'ab' * 30000000 }}", "the chat template makes more than 50000000 characters"),
        ("{{ ' ' * 1000001 }}" + " " * 1_000_000, "its chat template has 1000019 characters; allowed: 1000000"),
    ],
)
def test_a_template_that_is_no_good_is_one_line(
    template: str | None,
    message: str,
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "takes more than 0.5 seconds" in message:
        monkeypatch.setattr(rendering, "MOST_SECONDS", 0.5)
    monkeypatch.chdir(tmp_path)
    chat_model(tmp_path / "hf", template)
    asked = "--method wanda --target 2:4 --calibration chats.jsonl --calibration-seq-length 32 --apply-chat-template"
    refused_in_a_line(f"prune hf x {asked}", message, capsys)


TOO_MUCH = {
    "time": (ROUNDS, "the chat template of HF takes more than 0.5 seconds for a conversation"),
    "memory": ("{{ 'x' * 10 ** 10 }}", "the chat template of HF takes more than 1073741824 bytes for a conversation"),
    "size": ("{{ 'ab' * 3000 }}", "the chat template of HF makes more than 5000 characters of a conversation"),
    "crash": ("{{ crash() }}", "the chat template of HF ended the process that renders it by SIGSEGV"),
    "room": ("{{ room() }}", "the chat template of HF takes more than 1073741824 bytes for a conversation"),
}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A renderer that waits half a second and takes short texts, whose process breaks where a template says so."""
    answer = rendering._answer

    def faulty(tokenizer: Any, template: str, messages: Any, *more: bool) -> dict[str, str]:
        if messages[0]["content"] == "too much" and "crash" in template:
            os.kill(os.getpid(), signal.SIGSEGV)
        if messages[0]["content"] == "too much" and "room" in template:
            raise MemoryError
        return answer(tokenizer, template, messages, *more)

    monkeypatch.setattr(rendering, "_answer", faulty)
    monkeypatch.setattr(rendering, "MOST_SECONDS", 0.5)
    monkeypatch.setattr(rendering, "MOST_TEXT", 5000)


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_a_conversation_over_a_limit_is_a_bad_line(
    kind: str, hasty: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    action, message = TOO_MUCH[kind]
    template = f"{{% if messages[0].content == 'too much' %}}{action}{{% endif %}}{{{{ messages[0].content }}}}"
    hf = chat_model(tmp_path / "hf", template)
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("one", "too much", "two", "too much")]
    file = write_rows(tmp_path / "a.jsonl", rows)
    prepared(hf, file, tmp_path / "p")
    about = json.loads((tmp_path / "p.json").read_text())
    told = message.replace("HF", str(hf))
    assert (about["documents"], about["bad_lines"]) == (2, 2)
    assert about["listed_bad_lines"] == [f"{file}:{number}: {told}" for number in (2, 4)]
    capsys.readouterr()
    asked = f"prune {hf} {tmp_path / 'x'} --method wanda --target 2:4 --calibration {file} --apply-chat-template"
    wanted = f"the conversation that begins 'too much': {told}; leave that row out"
    refused_in_a_line(f"{asked} --calibration-samples 1 --calibration-seq-length 8", wanted, capsys)
    asked = f"preprocess --input {file} --output {tmp_path / 'q'} --tokenizer {hf} --workers 1 --strict"
    refused_in_a_line(f"{asked} --apply-chat-template", f"{file}:2: {told}", capsys)


def test_a_template_to_which_every_conversation_is_too_much_is_blamed_soon(
    hasty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preprocess, "MOST_OVER", 3)
    template = f"{{% if messages[0].content == 'too much' %}}{ROUNDS}{{% endif %}}x"
    hf = chat_model(tmp_path / "hf", template)
    rows = [{"messages": [{"role": "user", "content": "too much"}]}] * 99
    file = write_rows(tmp_path / "a.jsonl", [{"text": "none"}, *rows])
    asked = f"preprocess --input {file} --output {tmp_path / 'p'} --tokenizer {hf} --workers 1 --apply-chat-template"
    refused_in_a_line(asked, "a.jsonl:4: the chat template of", capsys)
    file = write_rows(tmp_path / "a.jsonl", rows[:2])
    refused_in_a_line(asked, "--input: no document found", capsys)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Hi"}, "no conversation under the key 'messages' or 'conversations'"),
        ({"messages": []}, "no list of messages but []"),
        ({"messages": "Hi"}, "no list of messages but 'Hi'"),
        ({"messages": ["Hi"]}, "no message but 'Hi'"),
        ({"messages": [{"content": "Hi"}]}, "a message without a role"),
        ({"messages": [{"role": "user"}]}, "a message whose content is no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a message with more than text in it"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not Unicode text"),
        ({"conversations": [{"from": "pirate", "value": "Arr"}]}, "a message from 'pirate'"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, "a message from ['human']"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(hf: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"messages": conversations()[0]}, row])
    with pytest.raises(UserError, match="a.jsonl:2: ") as found:
        ours(hf, file)
    assert message in str(found.value)


def test_tokens_depend_on_the_special_tokens_that_a_template_writes(hf: Path, chats: Path, tmp_path: Path) -> None:
    """Of two folders that differ in the beginning of a text alone, neither takes the other's prepared tokens."""
    shutil.copytree(hf, tmp_path / "other")
    edit = tmp_path / "other" / "tokenizer_config.json"
    edit.write_text(json.dumps(json.loads(edit.read_text()) | {"bos_token": "<|im_start|>"}))
    keys, encoders = set(), set()
    for folder in (hf, tmp_path / "other", hf):
        keys.add(_cache_key([chats], load_tokenizer(folder, chat=True), False, slice(None)))
        encoders.add(load_encoder(folder, chat=True).sha256)
    assert len(keys) == len(encoders) == 2


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_no_json_is_a_bad_row(hf: Path, at_once: bool) -> None:
    """As in Parquet and on the hub, where messages may have times."""
    form = Conversations(load_tokenizer(hf), hf, at_once=at_once)
    row = {"messages": [{"role": "user", "content": "Hi", "timestamp": datetime.datetime(2024, 1, 1)}]}
    with pytest.raises(BadDocument, match="messages that are no JSON"):
        form.document(row)


def test_the_renderer_ends_with_a_program_that_minds_its_signals(hf: Path, chats: Path) -> None:
    code = f"""
import signal
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: None)
from megatron_prune.data.chat import Conversations
from megatron_prune.data.tokenizer import load_tokenizer
kept = Conversations(load_tokenizer(Path({str(hf)!r})), Path({str(hf)!r}))
print(kept.prompt([{{"role": "user", "content": "Hi"}}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Hi" in done.stdout, done.stderr


def test_what_a_template_cannot_be_applied_to(hf: Path, tmp_path: Path, chats: Path) -> None:
    tokenizer = load_tokenizer(hf, VOCABULARY, chat=True)
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(UserError, match="a.txt is one document; allowed: rows with messages"):
        evaluation_windows(tmp_path / "a.txt", tokenizer, 8)
    prepared(hf, chats, tmp_path / "p")
    with pytest.raises(UserError, match="--calibration is preprocessed; allowed: rows with messages"):
        windows([tmp_path / "p"], tokenizer, 1, 8, 0)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "prune hf x --method magnitude --target 2:4",
            "method magnitude has no use for it; for methods that read text",
        ),
        ("prune hf x --method wanda --target 2:4 --calibration c4", "c4 is plain text; allowed: files of rows"),
        ("train hf x --data p", "--data is preprocessed"),
        ("preprocess --input a.txt --output x --tokenizer hf", "a.txt is one document"),
        ("export hf x", "has no effect without --quantize"),
    ],
)
def test_where_it_has_no_use_it_is_refused(
    command: str,
    message: str,
    hf: Path,
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").symlink_to(hf)
    (tmp_path / "a.txt").write_text("plain")
    prepared(hf, chats, tmp_path / "p")
    refused_in_a_line(f"{command} --apply-chat-template", message, capsys)
