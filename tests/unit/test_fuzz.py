"""Drawn input of every kind: it is read, or it is one short line; no other exception, ever.

The draws are the same each time. The longer version, over all verbs, is `tools/fuzz.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_prune.__main__ import VERBS, main
from megatron_prune.command_line import parse
from megatron_prune.data.indexed import open_indexed
from megatron_prune.data.text import parse_line
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.decision.latency import LatencyTable
from megatron_prune.decision.mask_file import load_mask_npz, mask_npz_pattern
from megatron_prune.decision.masks import Masks
from megatron_prune.decision.run_folder import read_run
from megatron_prune.decision.target import parse_any_target
from megatron_prune.errors import LONGEST, UserError
from megatron_prune.foreign import parse_json, read_yaml
from megatron_prune.log import read_metrics
from megatron_prune.model.checkpoint import check_manifest
from megatron_prune.model.convert import HFReader
from megatron_prune.model.description import read_description
from megatron_prune.model.packed import open_reader
from megatron_prune.model.untrusted import check_format, read_table
from megatron_prune.options import entries, flag
from megatron_prune.results import read_result
from tests.models import byte_tokenizer, packed_deepseek, packed_gpt_oss, packed_llama, tiny_llama, words

STEPS = "--seq-length 16 --global-batch-size 1 --train-iters 2 --save-interval 1"
CALIBRATION = "--calibration w.jsonl --calibration-samples 1 --calibration-seq-length 16"
COMMANDS = (
    "import --input hf --output ck",
    "preprocess --input w.jsonl --output tok --tokenizer hf",
    "prune --input ck --output run --method magnitude --target 2:4",
    f"prune --input ck --output learn --method maskllm --target 2:4 --data tok {STEPS}",
    f"prune --input ck --output narrow --method flap --target parameters=30000 {CALIBRATION}",
    "export --input run --output m.npz --format mask-npz",
    "trim --input run --output sparse",
    "evaluate --input ck --text w.jsonl --window 16 --windows 1 --output ppl.json",
    "verify --input sparse --output verified.json",
    "latency --input ck --output latency.json --prompt-length 8 --repeats 1 --levels 2",
)


def draws(count: int) -> Callable[[Any], Any]:
    """So many examples, the same every time, however slow this machine is."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=health)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One of everything that the verbs write, in a folder that is the current one."""
    folder = tmp_path_factory.mktemp("fuzz")
    with contextlib.chdir(folder):
        byte_tokenizer(tiny_llama(Path("hf"), vocab_size=257))
        packed_llama(Path("packed"), "int4_awq")
        packed_gpt_oss(Path("mxfp4"))
        packed_deepseek(Path("fp8"))
        words(Path("w.jsonl"), 4)
        for command in COMMANDS:
            assert main(command.split()) == 0, command
        yield folder


def read_or_refused(read: Callable[[], object]) -> None:
    """Any other exception than a short UserError fails the test."""
    try:
        read()
    except UserError as error:
        text = str(error)
        assert 0 < len(text) <= LONGEST and "\n" not in text and "Traceback" not in text, text


@contextlib.contextmanager
def replaced(file: Path, data: bytes) -> Iterator[None]:
    """While active, `file` holds `data`."""
    before = file.read_bytes()
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(before)


# --- JSON ---

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**63, 2**64, 10**12, 10**400]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "\0", "\ud800", "../x", "/etc/passwd", "a\nb", "x" * 5000, "\x1b[31m", "2:4", "float32"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
WHOLE = st.sampled_from([b"", b"[", b"nul", b"\xff", b"{}", b"[]", b"5", b"[" * 10**5, b'{"a":' * 10**5, b"9" * 5000])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value but that of itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


@st.composite
def changed(draw: st.DrawFn, content: Any) -> bytes:
    """A JSON document with one value replaced, taken away or added, or other bytes in its place."""
    copy = json.loads(json.dumps(content))
    path = draw(st.sampled_from(list(places(content)) or [()]))
    kind = draw(st.sampled_from(["value"] * 5 + ["gone", "more", "whole", "bytes"]))
    if kind == "whole" or not path:
        return draw(WHOLE) if draw(st.booleans()) else json.dumps(draw(VALUES)).encode()
    owner = copy
    for key in path[:-1]:
        owner = owner[key]
    if kind == "gone":
        del owner[path[-1]]
    elif kind == "more" and isinstance(owner, dict):
        owner[draw(st.text(max_size=9))] = draw(VALUES)
    else:
        owner[path[-1]] = draw(VALUES)
    data = json.dumps(copy).encode()
    cut = draw(st.integers(0, len(data)))
    return data[:cut] + draw(st.binary(max_size=3)) + data[cut + 1 :] if kind == "bytes" else data


JSON_FILES: dict[str, Callable[[], object]] = {
    "ck/megatron_prune.json": lambda: read_description(Path("ck")),
    "ck/manifest.json": lambda: check_manifest(Path("ck")),
    "ck/weights/metadata.json": lambda: check_format(Path("ck/weights")),
    "ck/weights/checksums.json": lambda: quietly(["export", "--input", "ck", "--output", "x"]),
    "run/run.json": lambda: read_run(Path("run")),
    "run/decision/decision.json": lambda: read_decision(Path("run/decision")),
    "narrow/decision/trim.json": lambda: quietly(["inspect", "--input", "narrow"]),
    "run/environment.json": lambda: quietly(["report", "run", "--output", "x"]),
    "learn/checkpoints/latest.json": lambda: quietly(["inspect", "--input", "learn"]),
    "ppl.json": lambda: read_result(Path("ppl.json")),
    "verified.json": lambda: quietly(["report", "verified.json", "--output", "x"]),
    "latency.json": lambda: LatencyTable.load(Path("latency.json")),
    "tok.json": lambda: open_indexed(Path("tok"), 257),
    "hf/config.json": lambda: HFReader("hf").model_config,
    "fp8/config.json": lambda: HFReader("fp8").model_config,
    "mxfp4/config.json": lambda: HFReader("mxfp4").model_config,
    "mxfp4/model.safetensors.index.json": lambda: HFReader("mxfp4").model_config,
    "packed/config.json": lambda: open_reader("packed").model_config,
    "hf/tokenizer.json": lambda: load_tokenizer(Path("hf"), 257),
    "hf/tokenizer_config.json": lambda: load_tokenizer(Path("hf"), 257),
}
"""File -> what reads it."""


def quietly(command: list[str]) -> None:
    """Run a verb whose output is `x`; raises what it has told as a UserError. Nothing may stay of a refusal."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        status = main(command)
    left = [path for path in Path().glob("x*") if status]
    for path in Path().glob("x*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert status in (0, 2) and not left, (status, left)
    if status:
        lines = [line for line in told.getvalue().splitlines() if line.startswith("megatron-prune: error: ")]
        assert len(lines) == 1, told.getvalue()
        raise UserError(lines[0].removeprefix("megatron-prune: error: "))


@pytest.mark.parametrize("file", JSON_FILES)
def test_json_files(good: Path, file: str) -> None:
    content = json.loads((good / file).read_text())

    @draws(20 if "tokenizer" in file or "environment" in file or "verified" in file else 60)
    @given(changed(content))
    def check(data: bytes) -> None:
        with replaced(good / file, data):
            read_or_refused(JSON_FILES[file])

    check()


def test_metrics(good: Path) -> None:
    lines = (good / "learn/metrics.jsonl").read_bytes().splitlines()

    @draws(60)
    @given(changed(json.loads(lines[0])))
    def check(data: bytes) -> None:
        with replaced(good / "learn/metrics.jsonl", data + b"\n" + lines[1] + b"\n"):
            read_or_refused(lambda: read_metrics(Path("learn")))

    check()


@draws(150)
@given(st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()) | WHOLE)
def test_any_json(data: bytes) -> None:
    read_or_refused(lambda: parse_json(data, "some.json"))
    with contextlib.suppress(ValueError):  # a bad line is counted, or told with --strict
        parse_line(data)


# --- bytes ---


def spoilt(data: bytes) -> st.SearchStrategy[bytes]:
    """`data` with a few bytes changed, taken away or put in; or any bytes."""
    edits = st.lists(
        st.tuples(st.integers(0, len(data)), st.binary(max_size=9), st.integers(0, 9)), min_size=1, max_size=4
    )

    def apply(changes: list[tuple[int, bytes, int]]) -> bytes:
        made = data
        for at, new, gone in changes:
            made = made[:at] + new + made[at + gone :]
        return made

    cut = st.integers(0, max(len(data) - 1, 0)).map(lambda end: data[:end])
    return st.one_of(edits.map(apply), edits.map(apply), cut, st.binary(max_size=200))


def read_masks(path: Path) -> None:
    """Unpack all of a mask file."""
    mask_npz_pattern(path)
    for _ in load_mask_npz(path, read_description(Path("ck")).config):
        pass


def read_decision(folder: Path) -> None:
    """Unpack all masks of a decision."""
    masks = Masks.load(folder)
    for name in masks.names():
        masks.get(name)


BINARY_FILES: dict[str, Callable[[], object]] = {
    "hf/model.safetensors": lambda: [HFReader("hf").read(name) for name in HFReader("hf").names()],
    "mxfp4/model-00002-of-00002.safetensors": lambda: [HFReader("mxfp4").read(n) for n in HFReader("mxfp4").names()],
    "fp8/model.safetensors": lambda: [HFReader("fp8").read(name) for name in HFReader("fp8").names()],
    "run/decision/layer_00000.safetensors": lambda: read_decision(Path("run/decision")),
    "narrow/decision/units.safetensors": lambda: quietly(["inspect", "--input", "narrow"]),
    "tok.idx": lambda: open_indexed(Path("tok"), 257),
    "tok.bin": lambda: open_indexed(Path("tok"), 257),
    "m.npz": lambda: read_masks(Path("m.npz")),
    "ck/weights/.metadata": lambda: read_table(Path("ck/weights")),
    "hf/config.json": lambda: HFReader("hf").model_config,
}


@pytest.mark.parametrize("file", BINARY_FILES)
def test_bytes_of_files(good: Path, file: str) -> None:
    @draws(120)
    @given(spoilt((good / file).read_bytes()))
    def check(data: bytes) -> None:
        with replaced(good / file, data):
            read_or_refused(BINARY_FILES[file])

    check()


def test_safetensors_headers(good: Path) -> None:
    path = good / "hf/model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])

    @draws(100)
    @given(changed(json.loads(data[8 : 8 + length])), st.sampled_from([0, 0, 0, 1, -1, 2**40]))
    def check(header: bytes, more: int) -> None:
        with replaced(path, struct.pack("<Q", max(0, len(header) + more)) + header + data[8 + length :]):
            read_or_refused(BINARY_FILES["hf/model.safetensors"])

    check()


@pytest.mark.parametrize("name", ["lengths", "pointers", "documents"])
def test_numbers_of_an_index(good: Path, name: str) -> None:
    """Whatever is put in the place of a length, a pointer or the end of a document is found."""
    data = (good / "tok.idx").read_bytes()
    count, ends = struct.unpack_from("<QQ", data, 18)
    kind, start, size = {
        "lengths": (np.int32, 34, count),
        "pointers": (np.int64, 34 + 4 * count, count),
        "documents": (np.int64, 34 + 12 * count, ends),
    }[name]
    limits = np.iinfo(kind)
    before = np.frombuffer(data, kind, size, start)

    @draws(60)
    @given(st.integers(0, size - 1), st.integers(int(limits.min), int(limits.max)))
    def check(at: int, value: int) -> None:
        numbers = before.copy()
        numbers[at] = value
        ends = numbers if name == "documents" else np.array([1, 0])
        if np.array_equal(numbers, before) or (ends[[0, -1]] == before[[0, -1]]).all() and (np.diff(ends) >= 0).all():
            return  # as it was, or with a document of nothing
        whole = data[:start] + numbers.tobytes() + data[start + numbers.nbytes :]
        with replaced(good / "tok.idx", whole), pytest.raises(UserError):
            open_indexed(Path("tok"), 257)

    check()


# --- the command line ---

WORDS = st.one_of(st.text(max_size=8), st.integers().map(str), st.floats().map(str), st.just("9" * 5000))


@pytest.mark.parametrize("verb", VERBS)
def test_words_on_the_command_line(verb: str) -> None:
    """Drawn values of the verb's own flags, and drawn words."""
    config = VERBS[verb].config
    flags = st.sampled_from([*(flag(entry.key) for entry in entries(config)), "--nowhere", "--", "-x"])
    usual = {"--input": "hf", "--output": "x", "--method": "wanda", "--target": "2:4", "--tokenizer": "hf"}
    needed = [
        word
        for entry in entries(config)
        if entry.required
        for word in (flag(entry.key), usual.get(flag(entry.key), "1"))
    ]

    @draws(12)
    @given(st.lists(st.tuples(flags, st.lists(WORDS, max_size=2)), max_size=3))
    def check(given_: list[tuple[str, list[str]]]) -> None:
        drawn = [word for name, values in given_ for word in (name, *values)]
        with contextlib.suppress(SystemExit):  # of --help, which may be drawn
            read_or_refused(lambda: parse(config, [*needed, *drawn], verb))

    check()


@draws(150)
@given(st.text(alphabet="0123456789:.,=-_eE naifxKMGumlayersprt\n", max_size=30) | st.text(max_size=20))
def test_targets(text: str) -> None:
    read_or_refused(lambda: parse_any_target(text))


YAML_TEXT = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="ab:-[]{}&*!|>'\"?#%@ \n\t", max_size=40),
    st.dictionaries(st.text(max_size=5), VALUES, max_size=3).map(
        lambda value: yaml.safe_dump(value, allow_unicode=True)
    ),
)


@draws(100)
@given(text=YAML_TEXT)
def test_yaml(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    read_or_refused(lambda: read_yaml(file, "options"))
    with contextlib.suppress(SystemExit):
        read_or_refused(
            lambda: parse(VERBS["import"].config, ["--config", str(file), "--input", "a", "--output", "b"], "p")
        )
