"""A checkpoint that would run code when it is read is refused, and nothing runs."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_prune.__main__ import main
from megatron_prune.errors import UserError
from megatron_prune.model.untrusted import TABLE, check_table
from tests.models import byte_tokenizer, tiny_llama


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model checkpoint of ours."""
    root = tmp_path_factory.mktemp("untrusted")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    assert main(["import", "--input", str(root / "hf"), "--output", str(root / "dense")]) == 0
    return root / "dense"


def test_our_own_table_is_read(checkpoint: Path) -> None:
    check_table(checkpoint / "weights")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_table_that_runs_code_is_refused(tmp_path: Path, protocol: int) -> None:
    (tmp_path / TABLE).write_bytes(pickle.dumps({"a": Attack(tmp_path / "ran")}, protocol))
    with pytest.raises(UserError, match="would run code"):
        check_table(tmp_path)
    assert not (tmp_path / "ran").exists()


class ByGetattr:
    """Pickled as early Python 3.11 pickles a member of an enumeration."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def test_members_of_enumerations_are_read_however_python_wrote_them(tmp_path: Path) -> None:
    (tmp_path / TABLE).write_bytes(pickle.dumps(ByGetattr(WriteItemType, "TENSOR")))
    check_table(tmp_path)


@pytest.mark.parametrize(("owner", "name"), [(Metadata, "__init__"), (WriteItemType, "mro"), ("text", "format")])
def test_other_attributes_are_refused(tmp_path: Path, owner: Any, name: str) -> None:
    (tmp_path / TABLE).write_bytes(pickle.dumps(ByGetattr(owner, name)))
    with pytest.raises(UserError, match="would run code"):
        check_table(tmp_path)


def test_names_reached_through_an_allowed_module_are_refused(tmp_path: Path) -> None:
    name = b"ctorch.distributed.checkpoint.metadata\nos.mkdir\n"
    (tmp_path / TABLE).write_bytes(name + b"(S'" + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(UserError, match="would run code"):
        check_table(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_poisoned_checkpoint_ends_with_status_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Poisoned in the object file that megatron-core reads before all others, its size as recorded."""
    import shutil

    from megatron_prune.files import write_json

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    poisoned = io.BytesIO()
    torch.save({"a": Attack(tmp_path / "ran")}, poisoned)
    (copy / "weights" / "common.pt").write_bytes(poisoned.getvalue())
    sizes = {str(p.relative_to(copy)): p.stat().st_size for p in copy.rglob("*") if p.is_file()}
    del sizes["manifest.json"]
    write_json(copy / "manifest.json", sizes)
    assert main(["export", "--input", str(copy), "--output", str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
