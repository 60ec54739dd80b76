"""A checkpoint that would run code when it is read is refused, and nothing runs."""

from __future__ import annotations

import copyreg
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_prune.__main__ import main
from megatron_prune.errors import UserError
from megatron_prune.files import checksum, write_json
from megatron_prune.model.pickled import Made, Refused, check_plain, read_pickle
from megatron_prune.model.saved import read_saved
from megatron_prune.model.untrusted import COMMON, NAMES, TABLE, read_common, read_table
from tests.models import byte_tokenizer, tiny_llama

W = b"ctorch.distributed.checkpoint.planner\nWriteItemType\n"
M = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
GETATTR = b"cbuiltins\ngetattr\n"
P2, P4 = b"\x80\x02", b"\x80\x04"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def _named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _enum_swap(code: str) -> bytes:
    """Names of a table alone: a state set on an enumeration makes any attribute one of its members."""
    members = b"}(" + b"".join(_text(name) + b"h\x00" for name in ("__new__", "__globals__", "get")) + b"u"
    values = b"}(" + b"".join(_text(name) + b"h\x00" for name in ("__builtins__", "exec", code)) + b"u"
    build = b"N}(" + _text("_member_map_") + members + _text("_value2member_map_") + values + b"u\x86b0"

    def attribute(owner: bytes, name: str) -> bytes:
        return GETATTR + owner + _text(name) + b"\x86R"

    found = attribute(attribute(b"h\x00", "__new__"), "__globals__")
    builtins = attribute(found, "get") + _text("__builtins__") + b"\x85R"
    return P2 + W + b"q\x00" + build + attribute(builtins, "get") + _text("exec") + b"\x85R" + _text(code) + b"\x85R."


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path | str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class AttackByState(Attack):
    """The same in a function that sets the state (sixth part of what reduce gives)."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Metadata, ({},), {"a": 1}, None, None, os.mkdir


def _hostile(marker: str) -> Iterator[tuple[str, bytes]]:
    """Pickles each of which makes `marker` when Python reads it, or would with a laxer reader."""
    code = f"__import__('os').mkdir({marker!r})"
    path = _text(marker) + b"\x85"
    for protocol in range(6):
        yield f"reduce, protocol {protocol}", pickle.dumps({"a": Attack(marker)}, protocol)
        yield (
            f"reduce in a Metadata, protocol {protocol}",
            pickle.dumps(
                Metadata({"a": Attack(marker)}, storage_data={}),
                protocol,  # type: ignore[dict-item]
            ),
        )
        yield f"setter of a state, protocol {protocol}", pickle.dumps(AttackByState(marker), protocol)
    yield "members of an enumeration", _enum_swap(code)
    calls = ["os mkdir", "posix mkdir", "os system", "builtins eval", "builtins exec", "builtins __import__"]
    calls += ["builtins compile", "subprocess Popen", "runpy run_path", "importlib import_module", "builtins open"]
    calls += ["operator attrgetter", "operator methodcaller", "functools partial", "types FunctionType", "nt system"]
    calls += ["torch load", "torch.hub load", "torch.jit load", "torch._utils _rebuild_tensor_v2", "pickle loads"]
    calls += ["torch.serialization load", "torch.distributed.checkpoint.metadata os.mkdir", "numpy load", "torch ops"]
    calls += ["torch.storage _load_from_bytes", "torch.serialization os", "torch.distributed.checkpoint.planner pickle"]
    calls += ["megatron_prune.__main__ main", "torch Size.__new__", "torch float32.__class__", "copyreg add_extension"]
    for call in calls:
        module, name = call.split(" ")
        argument = code if name in ("eval", "exec") else marker
        yield f"GLOBAL {call}", P2 + _named(module, name) + _text(argument) + b"\x85R."
        yield f"STACK_GLOBAL {call}", P4 + _short(module) + _short(name) + b"\x93" + _text(argument) + b"\x85R."
    yield "NEWOBJ", P2 + _named("pathlib", "Path") + path + b"\x81."
    yield "NEWOBJ of a function", P2 + _named("os", "mkdir") + path + b"\x81."
    yield "NEWOBJ_EX", P4 + _named("subprocess", "Popen") + b")}" + _text("args") + _text(f"mkdir {marker}") + b"s\x92."
    yield "INST", b"(S'" + marker.encode() + b"'\nios\nmkdir\n."
    yield "OBJ", P2 + b"(" + _named("os", "mkdir") + _text(marker) + b"o."
    yield "INST of a name that is allowed", b"(itorch\nSize\n."
    yield "OBJ of a name that is allowed", P2 + b"(" + M + b"o."
    for number, width in ((b"\x82", 1), (b"\x83", 2), (b"\x84", 4)):
        yield f"EXT{width}", P2 + number + (240).to_bytes(width, "little") + path + b"R."
    yield "PERSID", b"Pmarker\n."
    yield "BINPERSID", P2 + _text(marker) + b"Q."
    yield "BUILD on a class", P2 + W + b"}" + _text("_member_map_") + b"}sb."
    yield "BUILD with slots on a class", P2 + W + b"N}" + _text("mro") + W + b"s\x86b."
    yield (
        "BUILD on a class of data",
        P2 + M + b"N}" + _text("__setstate__") + _named("builtins", "getattr") + b"s\x86b.",
    )
    yield "BUILD twice", P2 + M + b")\x81}" + _text("a") + b"NsbN}" + _text("__class__") + W + b"s\x86b."
    yield "BUILD on a dict", P2 + b"}}" + _text("__class__") + W + b"sb."
    yield "BUILD on text", P2 + _text("a") + b"}" + _text("__class__") + W + b"sb."
    yield "BUILD on a size", P2 + _named("torch", "Size") + b"]\x85R}" + _text("a") + W + b"sb."
    yield "call of what was made", P2 + M + b")\x81" + path + b"R."
    yield "call of a member", P2 + GETATTR + W + _text("__init__") + b"\x86R" + path + b"R."
    yield "call of text", P2 + _text("os.mkdir") + path + b"R."
    yield "call without a tuple", P2 + M + _text(marker) + b"R."
    for owner, name in (
        (M, "__init__"),
        (W, "mro"),
        (_text("text"), "format"),
        (W, "__class__"),
        (M, "__init_subclass__"),
    ):
        yield f"getattr {name}", P2 + GETATTR + owner + _text(name) + b"\x86R."
    yield "getattr with three arguments", P2 + GETATTR + W + _text("mro") + M + b"\x87R."
    yield "append to an object", P2 + M + b")\x81" + W + b"a."
    yield "extend of an object", P2 + M + b")\x81(" + W + W + b"e."
    yield "key of a class", P2 + W + _text("_member_map_") + b"}s."
    yield "keys of an object", P2 + M + b")\x81(" + _text("a") + b"Nu."
    yield "items of a set", P4 + b"\x8f(K\x01\x90."
    yield "a frozen set", P4 + b"(K\x01\x91."
    yield "bytearray of 2^62", b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"."
    yield "text of 2^62", P4 + b"\x8d" + struct.pack("<Q", 2**62) + b"."
    yield "text of 2^32", P2 + b"X\xff\xff\xff\xff."
    yield "bytes of 2^32", P4 + b"B\xff\xff\xff\xff."
    yield "number of 2^31 bytes", P2 + b"\x8b\xff\xff\xff\x7f."
    yield "number in letters", b"I" + b"9" * 100_000 + b"\n."
    yield "memo at 2^32", P2 + b"Nr\xff\xff\xff\xff0" + b"r\xff\xff\xff\xff."
    yield "memo in letters", b"Np4294967295000\n."
    yield "a frame of 2^62", P4 + b"\x95" + struct.pack("<Q", 2**62) + b"N."
    yield "next buffer", b"\x80\x05\x97."
    yield "marks without end", P2 + b"(" * 1_000_000 + b"."
    yield "tuples in tuples", P2 + b")" + b"\x85" * 1_000_000 + b"."
    yield "lists in lists", P2 + b"]" * 300_000 + b"a" * 299_999 + b"."
    yield "itself inside", P2 + b"]q\x00h\x00a."
    yield "doubled 60 times", P2 + b"]" + b"q\x002]h\x00ah\x00a".replace(b"2", b"") * 60 + b"."
    yield "nested pickle", P2 + _named("pickle", "loads") + b"C\x10" + b"cos\nmkdir\n(t R." + b"\x85R."
    yield "two pickles", pickle.dumps({}) + pickle.dumps(Attack(marker))
    yield "no end", P2 + b"}"
    yield "nothing", b""
    yield "pop of nothing", P2 + b"000."
    yield "get of nothing", P2 + b"h\x05."
    yield "another protocol", b"\x80\xffN."


def _assert_harmless(name: str, read: Callable[[], Any], marker: Path) -> None:
    with pytest.raises((UserError, Refused)) as raised:
        read()
    assert not marker.exists(), name
    assert len(str(raised.value)) < 500, name
    assert "\n" not in str(raised.value), name
    assert "Traceback" not in str(raised.value), name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model checkpoint of ours."""
    root = tmp_path_factory.mktemp("untrusted")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    assert main(["import", "--input", str(root / "hf"), "--output", str(root / "dense")]) == 0
    return root / "dense"


# --- the table of contents ---


def test_our_own_table_is_read_as_torch_reads_it(checkpoint: Path) -> None:
    folder = checkpoint / "weights"
    ours = read_table(folder)
    theirs = pickle.loads((folder / TABLE).read_bytes())
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for name, mine in ours.state_dict_metadata.items():
        other = theirs.state_dict_metadata[name]
        assert type(mine) is type(other), name
        if isinstance(other, TensorStorageMetadata):  # newer PyTorch notes strides, too, which nothing reads
            assert isinstance(mine, TensorStorageMetadata)
            assert (mine.size, mine.chunks, mine.properties.dtype) == (other.size, other.chunks, other.properties.dtype)
    assert ours.storage_data == theirs.storage_data


def test_no_hostile_table_runs(tmp_path: Path) -> None:
    copyreg.add_extension("os", "mkdir", 240)
    try:
        found = list(_hostile(str(tmp_path / "ran")))
        for name, content in found:
            (tmp_path / TABLE).write_bytes(content)
            _assert_harmless(name, lambda: read_table(tmp_path), tmp_path / "ran")
    finally:
        copyreg.remove_extension("os", "mkdir", 240)
    assert len(found) >= 120


@pytest.mark.parametrize("write", [lambda a: a, lambda a: ByGetattr(WriteItemType, "TENSOR")])
def test_members_of_enumerations_are_read_however_python_wrote_them(write: Callable[[Any], Any]) -> None:
    made = read_pickle(pickle.dumps(write(WriteItemType.TENSOR)), NAMES)
    assert isinstance(made, Made)


class ByGetattr:
    """Pickled as early Python 3.11 pickles a member of an enumeration."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def _change(change: Callable[[Metadata], None], folder: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint / "weights", folder)
    table = pickle.loads((folder / TABLE).read_bytes())
    change(table)
    (folder / TABLE).write_bytes(pickle.dumps(table))


def _first(table: Metadata) -> Any:
    return table.storage_data[next(iter(table.storage_data))]


CHANGES: dict[str, Callable[[Metadata], Any]] = {
    "is no file of this folder": lambda table: setattr(_first(table), "relative_path", "../../../../etc/passwd"),
    "no file of this folder; ": lambda table: setattr(_first(table), "relative_path", "/etc/passwd"),
    "without a place": lambda table: setattr(_first(table), "relative_path", 5),
    r"'a.x00' is no file": lambda table: setattr(_first(table), "relative_path", "a\0"),
    "beyond the end": lambda table: setattr(_first(table), "length", 10**12),
    "lies beyond the end": lambda table: setattr(_first(table), "offset", -1),
    "is transformed": lambda table: setattr(_first(table), "transform_descriptors", ["zstd"]),
    "too large": lambda table: setattr(next(iter(table.state_dict_metadata.values())), "size", torch.Size([2**60])),
    "do not make it up": lambda table: next(iter(table.state_dict_metadata.values())).chunks.clear(),
    "where str is expected": lambda table: table.state_dict_metadata.update({5: None}),
    "NoneType.* where TensorStorageMetadata": lambda table: table.state_dict_metadata.update(a=None),
    "where dict is expected": lambda table: setattr(table, "storage_data", []),
    "where MetadataIndex is expected": lambda table: table.storage_data.update(a=None),
    "dict is expected": lambda table: setattr(table, "state_dict_metadata", MetadataIndex("a")),
}


@pytest.mark.parametrize("message", list(CHANGES))
def test_a_table_that_says_the_impossible(message: str, tmp_path: Path, checkpoint: Path) -> None:
    _change(CHANGES[message], tmp_path / "weights", checkpoint)
    with pytest.raises(UserError, match=message.removesuffix("; ")):
        read_table(tmp_path / "weights")


def test_parts_shared_by_many_tensors_are_not_counted_without_end(tmp_path: Path, checkpoint: Path) -> None:
    def change(table: Metadata) -> None:
        any_tensor = next(iter(table.state_dict_metadata.values()))
        any_tensor.chunks *= 20_000
        for number in range(20_000):
            table.state_dict_metadata[f"a{number}"] = any_tensor

    _change(change, tmp_path / "weights", checkpoint)
    with pytest.raises(UserError, match="do not make it up"):
        read_table(tmp_path / "weights")


def test_random_damage_to_a_table_is_one_line_or_nothing(tmp_path: Path, checkpoint: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(checkpoint / "weights", folder)
    good, draw = (folder / TABLE).read_bytes(), random.Random(0)
    refused = 0
    for _ in range(1500):
        (folder / TABLE).write_bytes(_mutated(good, draw))
        try:
            read_table(folder)
        except UserError as error:
            refused += 1
            assert len(str(error)) < 500
    assert refused > 700


def _mutated(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled, or replaced by opcodes that matter."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(found))
        kind = draw.randrange(4)
        if kind == 0:
            found[at] = draw.randrange(256)
        elif kind == 1:
            del found[at : at + draw.randrange(1, 20)]
        elif kind == 2:
            found[at:at] = found[draw.randrange(len(found)) :][: draw.randrange(40)]
        else:
            found[at:at] = draw.choice([b"R", b"b", b"\x81", b"cos\nmkdir\n", b"0", b"2", b"(", b"t", b"u", b"s", b"Q"])
    return bytes(found)


# --- values and tensors ---


def _zip(content: bytes, *more: tuple[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, data in (("archive/data.pkl", content), ("archive/version", b"3\n"), *more):
            archive.writestr(name, data)
    return out.getvalue()


def _read(data: bytes) -> Any:
    return read_saved(io.BytesIO(b"before" + data + b"after"), 6, len(data))


def _saved(value: Any, **how: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **how)
    return out.getvalue()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_tensors_are_read_to_the_bit(dtype: torch.dtype) -> None:
    whole = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    for tensor in (whole, whole.t(), whole[1:, 2:5], whole[0, 0], whole[:0], torch.tensor(3).to(dtype)):
        found = _read(_saved(tensor))
        assert found.dtype == dtype
        assert found.stride() == tensor.stride()
        assert torch.equal(found, tensor)


def test_types_without_a_storage_class_of_their_own() -> None:
    tensor = torch.arange(6, dtype=torch.int32).to(torch.uint16).view(2, 3)
    found = _read(_saved(tensor))
    assert found.dtype == torch.uint16
    assert torch.equal(found.to(torch.int32), tensor.to(torch.int32))


def test_values_of_a_training_state_are_read() -> None:
    value = {"a": [1, 2.5, None, True, "text"], "b": {"c": torch.ones(2), 3: (1, (2,))}, "d": OrderedDict(x=-(2**40))}
    found = _read(_saved(value))
    assert torch.equal(found["b"].pop("c"), value["b"].pop("c"))  # type: ignore[attr-defined,call-overload]
    assert found == value


def test_no_hostile_object_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for name, content in _hostile(str(marker)):
        if name == "two pickles":  # torch.save writes nothing after the first, and nothing reads on
            assert _read(_zip(content)) == {}
            continue
        _assert_harmless(f"zip, {name}", lambda content=content: _read(_zip(content)), marker)  # type: ignore[misc]
        _assert_harmless(f"bare, {name}", lambda content=content: _read(content), marker)  # type: ignore[misc]


def _tar(marker: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Attack(marker), 2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


class Scripted(torch.nn.Module):
    """Something to compile."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As torch says."""
        return x


def _scripted() -> bytes:
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(Scripted()), out)  # type: ignore[no-untyped-call]
    return out.getvalue()


def _containers(marker: str) -> Iterator[tuple[str, bytes]]:
    evil, good = pickle.dumps(Attack(marker), 2), _saved(torch.ones(3))
    yield "tar", _tar(marker)
    yield "legacy", _saved(Attack(marker), _use_new_zipfile_serialization=False)
    yield "legacy tensor", _saved(torch.ones(3), _use_new_zipfile_serialization=False)
    yield "script", _scripted()
    yield "two data.pkl", _zip(pickle.dumps({}, 2), ("other/data.pkl", evil))
    yield "one name twice", _zip(pickle.dumps({}, 2), ("archive/data.pkl", evil))
    yield "compressed", _zip(pickle.dumps({"a": "b" * 10_000_000}, 2), kind=zipfile.ZIP_DEFLATED)
    yield "no zip", b"PK\x03\x04" + b"\0" * 100
    yield "other bytes", _zip(pickle.dumps({}, 2), ("archive/byteorder", b"big"))
    yield "cut", good[: len(good) // 2]
    yield "another end", good[:-30]
    yield "a parameter", _saved(torch.nn.Parameter(torch.ones(2)))
    yield "numpy", _saved(torch.ones(2).numpy())
    yield "sparse", _saved(torch.eye(3).to_sparse())


def test_no_other_container_is_opened(tmp_path: Path) -> None:
    for name, content in _containers(str(tmp_path / "ran")):
        _assert_harmless(name, lambda content=content: _read(content), tmp_path / "ran")  # type: ignore[misc]


def _tensor_pickle(storage: bytes, offset: bytes, size: bytes, stride: bytes) -> bytes:
    place = b"(" + _text("storage") + storage + _text("0") + _text("cpu")
    return (
        P2
        + _named("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + place
        + b"J\x04\0\0\0tQ"
        + offset
        + size
        + stride
        + b"\x89"
        + _named("collections", "OrderedDict")
        + b")RtR."
    )


FLOAT = _named("torch", "FloatStorage")
TENSORS = {
    "is larger than its storage": (FLOAT, b"K\x00", b"K\x05\x85", b"K\x01\x85"),
    "larger than its storage": (FLOAT, b"K\x03", b"K\x02\x85", b"K\x01\x85"),
    "a tensor that is larger": (FLOAT, b"K\x00", b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"),
    "without size": (FLOAT, b"J\xff\xff\xff\xff", b"K\x02\x85", b"K\x01\x85"),
    "tensor without size": (FLOAT, b"K\x00", b"K\x02\x85", b"J\xff\xff\xff\xff\x85"),
    "a tensor without size": (FLOAT, b"K\x00", b"K\x02\x85", b")"),
    "of another size": (_named("torch", "DoubleStorage"), b"K\x00", b"K\x02\x85", b"K\x01\x85"),
    "of unknown type": (_named("torch", "float32"), b"K\x00", b"K\x02\x85", b"K\x01\x85"),
    "storage of unknown type": (_text("FloatStorage"), b"K\x00", b"K\x02\x85", b"K\x01\x85"),
}


@pytest.mark.parametrize("message", list(TENSORS))
def test_tensors_beyond_their_storage(message: str) -> None:
    content = _tensor_pickle(*TENSORS[message])
    with pytest.raises(Refused, match=message):
        _read(_zip(content, ("archive/data/0", b"\0" * 16)))


def test_a_tensor_written_by_hand_is_read() -> None:
    content = _tensor_pickle(FLOAT, b"K\x00", b"K\x04\x85", b"K\x01\x85")
    assert torch.equal(_read(_zip(content, ("archive/data/0", b"\0" * 16))), torch.zeros(4))


def test_random_damage_to_a_file_of_tensors_is_refused_or_read() -> None:
    good, draw = _saved({"a": torch.ones(3), "b": [1, 2]}), random.Random(1)
    refused = 0
    for _ in range(1500):
        try:
            _read(_mutated(good, draw))
        except Refused:
            refused += 1
    assert refused > 700


def test_values_that_contain_themselves_or_too_many() -> None:
    inside: list[Any] = []
    inside.append(inside)
    doubled: list[Any] = []
    for _ in range(60):
        doubled = [doubled, doubled]
    for value in (inside, doubled):
        with pytest.raises(Refused, match="more than 1000 values, or deeper"):
            check_plain(value, 1000)


# --- whole checkpoints ---


def _poison(checkpoint: Path, copy: Path, file: str, content: bytes) -> Path:
    """A copy with one file of `weights` replaced, its size and checksum written anew."""
    shutil.copytree(checkpoint, copy)
    (copy / "weights" / file).write_bytes(content)
    sums = json.loads((copy / "weights" / "checksums.json").read_text())
    write_json(copy / "weights" / "checksums.json", sums | {file: checksum(copy / "weights" / file)})
    sizes = {str(p.relative_to(copy)): p.stat().st_size for p in copy.rglob("*") if p.is_file()}
    del sizes["manifest.json"]
    write_json(copy / "manifest.json", sizes)
    return copy


FILES = {
    ".metadata": lambda marker: _enum_swap(f"__import__('os').mkdir({marker!r})"),
    "common.pt": lambda marker: _saved({"a": Attack(marker)}),
    "__0_0.distcp": lambda marker: _saved({"a": Attack(marker)}) * 100,
    "metadata.json": lambda _: b"[" * 100_000,
}


@pytest.mark.parametrize("file", list(FILES))
def test_a_poisoned_checkpoint_ends_with_status_2_and_one_line(
    file: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = _poison(checkpoint, tmp_path / "copy", file, FILES[file](str(tmp_path / "ran")))
    assert main(["export", "--input", str(copy), "--output", str(tmp_path / "out")]) == 2
    told = capfd.readouterr().err.strip()
    assert told.count("\n") == 0, told
    assert "megatron-prune: error: " in told
    assert len(told) < 500
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_nothing_unpickles_while_a_checkpoint_is_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle would be run")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, never)
    assert main(["export", "--input", str(checkpoint), "--output", str(tmp_path / "out")]) == 0


def test_an_object_where_a_tensor_is_expected(checkpoint: Path, tmp_path: Path) -> None:
    """torch would unpickle what its table calls an object."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    table = pickle.loads((checkpoint / "weights" / TABLE).read_bytes())
    name = next(iter(table.state_dict_metadata))
    table.state_dict_metadata[name] = BytesStorageMetadata()
    copy = _poison(checkpoint, tmp_path / "copy", TABLE, pickle.dumps(table))
    assert main(["export", "--input", str(copy), "--output", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("rows", [0, 128, 256, 10_000])
def test_a_vocabulary_with_other_rows_than_padding_explains_is_refused(
    rows: int, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """megatron-core would leave the rows that are not there as they were made."""
    table = pickle.loads((checkpoint / "weights" / TABLE).read_bytes())
    name = next(name for name in table.state_dict_metadata if name.endswith("word_embeddings.weight"))
    entry = table.state_dict_metadata[name]
    width = entry.size[1]
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    entry.size = torch.Size([rows, width])
    entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([rows, width]))]
    copy = _poison(checkpoint, tmp_path / "copy", TABLE, pickle.dumps(table))
    assert main(["export", "--input", str(copy), "--output", str(tmp_path / "out")]) == 2
    assert "padding apart" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_format_is_what_we_write(checkpoint: Path) -> None:
    assert json.loads((checkpoint / "weights" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


def _with_common(folder: Path, data: bytes) -> Metadata:
    """A folder in which what is not sharded is an object among the tensors, as megatron-core 0.19 writes it."""
    (folder / "__0_0.distcp").write_bytes(b"tensors" + data + b"tensors")
    return Metadata({}, storage_data={COMMON: _StorageInfo("__0_0.distcp", 7, len(data))})


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_not_sharded_is_read_from_either_place(tmp_path: Path, legacy: bool) -> None:
    value = {"step": 3, "masks": {"ffn": torch.arange(4)}}
    table = _with_common(tmp_path, _saved([value]))
    if legacy:
        torch.save(value, tmp_path / "common.pt")
        table = Metadata({}, storage_data={})
    found = read_common(tmp_path, table)
    assert found["step"] == 3 and torch.equal(found["masks"]["ffn"], torch.arange(4))


def test_code_in_what_is_not_sharded_is_not_run(tmp_path: Path) -> None:
    table = _with_common(tmp_path, _saved([{"a": Attack(str(tmp_path / "ran"))}]))
    with pytest.raises(Refused):
        read_common(tmp_path, table)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(Refused, match="expected a dict"):
        read_common(tmp_path, _with_common(tmp_path, _saved([3])))
