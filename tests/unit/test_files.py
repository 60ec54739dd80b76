"""Outputs: whose they are, what is refused, and that nothing is left behind, on a full disk neither."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_prune import claims, files
from megatron_prune.__main__ import VERBS, main
from megatron_prune.claims import LOCK, claimed
from megatron_prune.errors import DiskFault, UserError
from megatron_prune.files import cached_folder, new_file, new_folder, own_file, write_json, write_result
from tests.models import byte_tokenizer, tiny_llama, words


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in each form, text, and a finished run."""
    root = tmp_path_factory.mktemp("outputs")
    words(root / "words.jsonl")
    (root / "text.txt").write_text(" ".join(f"word{number}" for number in range(400)))
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257, intermediate_size=64))
    assert main(["import", "--input", str(root / "hf"), "--output", str(root / "model")]) == 0
    one_shot = ["prune", "--method", "magnitude", "--target", "2:4", "--input", str(root / "model")]
    assert main([*one_shot, "--output", str(root / "run")]) == 0
    assert main(["trim", "--input", str(root / "run"), "--output", str(root / "sparse")]) == 0
    assert main(["export", "--input", str(root / "sparse"), "--output", str(root / "sparse_hf")]) == 0
    return root


STEPS = ["--seq-length", "16", "--global-batch-size", "2", "--train-iters", "3", "--save-interval", "1"]
CALIBRATION = ["--calibration", "ROOT/words.jsonl", "--calibration-samples", "2", "--calibration-seq-length", "16"]
LEARNED = ["prune", "--method", "maskllm", "--target", "2:4", "--input", "ROOT/model", "--data", "ROOT/words.jsonl"]
COMMANDS = {
    "preprocess": ["preprocess", "--input", "ROOT/words.jsonl", "--tokenizer", "ROOT/hf"],
    "import": ["import", "--input", "ROOT/hf"],
    "one_shot": ["prune", "--method", "magnitude", "--target", "2:4", "--input", "ROOT/model"],
    "compensated": ["prune", "--method", "sparsegpt", "--target", "2:4", "--input", "ROOT/model", *CALIBRATION],
    "structured": ["prune", "--method", "shortgpt", "--target", "num_layers=1", "--input", "ROOT/model", *CALIBRATION],
    "learned": [*LEARNED, *STEPS],
    "restartable": [*LEARNED, *STEPS, "--restartable"],
    "train": ["train", "--input", "ROOT/run", "--data", "ROOT/words.jsonl", *STEPS],
    "fsdp": ["train", "--engine", "fsdp", "--input", "ROOT/hf", "--data", "ROOT/words.jsonl", *STEPS],
    "permute": ["permute", "--input", "ROOT/model", "--calibration", "ROOT/words.jsonl", *CALIBRATION[2:]],
    "trim": ["trim", "--input", "ROOT/run"],
    "export": ["export", "--input", "ROOT/sparse"],
    "fms": ["export", "--format", "fms", "--input", "ROOT/sparse"],
    "mask": ["export", "--format", "mask-npz", "--input", "ROOT/run"],
    "plan": [*[word for word in LEARNED if word != "prune"], "--seq-length", "16", "--processes", "1"],
    "evaluate": ["evaluate", "--input", "ROOT/model", "--text", "ROOT/text.txt", "--window", "16"],
    "verify": ["verify", "--input", "ROOT/sparse"],
    "bench": ["bench", "--input", "ROOT/sparse_hf", "--prompt-length", "4", "--new-tokens", "1", "--batch-sizes", "1"],
    "latency": ["latency", "--input", "ROOT/hf", "--levels", "2", "--prompt-length", "4", "--repeats", "1"],
    "report": ["report", "ROOT/run"],
}
COMMANDS["plan"].insert(0, "plan")


def command(name: str, root: Path, output: Path) -> list[str]:
    return [*(word.replace("ROOT", str(root)) for word in COMMANDS[name]), "--output", str(output)]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line about a command that ends with status 2."""
    capsys.readouterr()
    status = main(words)
    err = capsys.readouterr().err
    lines = err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("megatron-prune: error: "), (status, err)
    assert len(lines[0]) < 500
    return lines[0]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- before any work ---


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any verb that begins to work is wrong."""

    for verb in VERBS.values():
        monkeypatch.setattr(verb.module, "run", lambda settings: pytest.fail(f"{settings} was begun"))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("restartable", "preprocess")])
def test_an_output_in_the_way_is_refused_before_any_work(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, no_work: None
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    before = left(tmp_path)
    for there in sorted(before):
        assert "already exists" in refused(command(name, root, tmp_path / there), capsys), there
        assert left(tmp_path) == before and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_without_a_place_is_refused_before_any_work(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, no_work: None
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to("loop")
    places = {
        ".": "names no new file or folder",
        "/": "names no new file or folder",
        "..": "names no new file or folder",
        str(tmp_path / "file" / "x"): "is no folder",
        str(tmp_path / "dangling" / "x"): "is no folder",
        str(tmp_path / "loop" / "x"): "is no folder",
        str(tmp_path / ("x" * 250)): "give a shorter one",
        str(tmp_path / "a\0b"): "can name a file",
        str(tmp_path / "a\udcffb"): "surrogates not allowed",
    }
    for place, message in places.items():
        words = [*command(name, root, Path("x"))[:-1], place]
        assert message in refused(words, capsys), place
    assert left(tmp_path) == {"file", "dangling", "loop"}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_not_ours_is_never_taken_for_a_leftover(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    partial = tmp_path / "x.partial"

    def folder() -> None:
        partial.mkdir()
        (partial / "mine").touch()

    forms: list[Callable[[], object]] = [
        folder,
        partial.mkdir,
        lambda: partial.write_text("mine"),
        lambda: partial.symlink_to(root / "hf"),
        lambda: partial.symlink_to(root / "nothing"),
        lambda: os.mkfifo(partial),
    ]
    for make in forms:
        make()
        about = partial.lstat()
        assert "x.partial is in the way" in refused(command(name, root, tmp_path / "x"), capsys)
        assert left(tmp_path) == {"x.partial"} and partial.lstat() == about
        files._remove(partial)
    assert (root / "hf" / "config.json").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_run_with_the_same_output_is_refused_at_once(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with locked_elsewhere(tmp_path / "x"):
        began = time.monotonic()
        assert "another process is writing" in refused(command(name, root, tmp_path / "x"), capsys)
        assert time.monotonic() - began < 10
        assert left(tmp_path) == {f".x{LOCK}"}
    assert left(tmp_path) == {f".x{LOCK}"}  # whoever had it was killed
    with claimed(tmp_path / "x"):
        pass
    assert not left(tmp_path)


@contextlib.contextmanager
def locked_elsewhere(path: Path) -> Iterator[None]:
    """Another process makes `path`, until it is killed at the end of the block."""
    here, there = socket.socketpair()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(path, there))
    process.start()
    assert here.recv(1) == b"x"
    try:
        yield
    finally:
        process.kill()
        process.join()


def _hold(path: Path, told: socket.socket) -> None:
    with claimed(path, may_exist=True):
        told.send(b"x")
        signal.pause()


@pytest.mark.parametrize("more", [["--resume"], ["--restartable"]])
def test_a_living_run_is_not_gone_on_with(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    words = command("learned", root, tmp_path / "x")
    assert main(words) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")}
    with locked_elsewhere(tmp_path / "x"):
        assert "another process is writing" in refused([*words, *more], capsys)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")}


def test_statistics_are_filled_by_one_run_at_a_time(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], disk: Callable[[int], Path]
) -> None:
    words = [*command("structured", root, tmp_path / "x"), "--statistics", str(tmp_path / "statistics")]
    with locked_elsewhere(tmp_path / "statistics"):
        assert "another process is writing" in refused(words, capsys)
    place = disk(8)
    full = [*words[:-1], str(place / "statistics")]
    assert "No space left" in refused(full, capsys)
    assert not left(place) and not (tmp_path / "x").exists()
    assert main(words) == 0 and left(tmp_path) == {"x", "statistics", "disk"}


def test_two_outputs_of_one_verb_are_two_places(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--input", str(root / "model"), "--tasks", "piqa", "--output", str(tmp_path / "x")]
    assert "give two places" in refused([*words, "--samples", str(tmp_path / "x")], capsys)
    (tmp_path / "y").symlink_to(tmp_path / "nothing")
    assert "--samples" in refused([*words, "--samples", str(tmp_path / "y")], capsys)
    assert left(tmp_path) == {"y"}


def test_an_output_does_not_change_its_input(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has a meaning" in refused(command("trim", root, root / "run" / "weights"), capsys)
    caches = ["--data-cache", str(root / "new" / "cache")]
    assert "beside it" in refused([*command("learned", root, root / "new"), *caches], capsys)
    assert not (root / "run" / "weights").exists() and not (root / "new").exists()


# --- taking over, appearing ---


def die_in(work: Callable[[], object]) -> None:
    """Do something in a process that is killed at its end, without cleaning up."""

    def dies() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            work()
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=dies)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def begin(path: Path) -> None:
    (files.begin_folder(path) / "half").touch()


def begin_file(path: Path) -> None:
    made = new_file(path)
    made.__enter__().write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_left_is_taken_over(tmp_path: Path) -> None:
    die_in(lambda: begin(tmp_path / "x"))
    die_in(lambda: begin_file(tmp_path / "y"))
    assert left(tmp_path) == {"x.partial", f".x{LOCK}", "y.partial", f".y{LOCK}"}
    with new_folder(tmp_path / "x") as folder:
        (folder / "whole").touch()
    write_result(tmp_path / "y", {})
    assert left(tmp_path) == {"x", "y"} and left(tmp_path / "x") == {"whole"}


def test_a_refused_run_leaves_a_killed_ones_to_the_next(tmp_path: Path) -> None:
    die_in(lambda: begin(tmp_path / "x"))
    with pytest.raises(UserError, match="mistake"), claimed(tmp_path / "x"):
        raise UserError("mistake")
    with new_folder(tmp_path / "x"):
        pass
    assert left(tmp_path) == {"x"}


def test_the_lock_beside_a_whole_output_goes_when_that_is_refused(tmp_path: Path) -> None:
    """Of a run that was killed behind giving its output its name; that of a living one stays."""

    def finish() -> None:
        claims.claim(tmp_path / "x")
        (tmp_path / "x").mkdir()

    die_in(finish)
    assert left(tmp_path) == {"x", f".x{LOCK}"}
    with pytest.raises(UserError, match="already exists"), claimed(tmp_path / "x"):
        pass
    assert left(tmp_path) == {"x"}
    with locked_elsewhere(tmp_path / "y"):
        (tmp_path / "y").mkdir()
        with pytest.raises(UserError, match="already exists"), claimed(tmp_path / "y"):
            pass
        assert f".y{LOCK}" in left(tmp_path)


def test_another_folder_in_the_place_of_a_leftover_is_not_ours(tmp_path: Path) -> None:
    die_in(lambda: begin(tmp_path / "x"))
    (tmp_path / "x.partial").rename(tmp_path / "kept")  # so that its number is not given again
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "mine").touch()
    with pytest.raises(UserError, match="in the way"), new_folder(tmp_path / "x"):
        pass
    assert (tmp_path / "x.partial" / "mine").exists()


def test_a_lock_that_is_not_ours_stays(tmp_path: Path) -> None:
    lock = tmp_path / f".x{LOCK}"
    lock.write_text("mine")
    with pytest.raises(UserError, match="not ours"), claimed(tmp_path / "x"):
        pass
    assert lock.read_text() == "mine"
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be written"), claimed(tmp_path / "x"):
        pass
    assert left(tmp_path) == {lock.name}
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(UserError, match="not ours"), claimed(tmp_path / "x"):
        pass


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"

    def appear() -> None:
        {"file": path.touch, "folder": path.mkdir, "dangling": lambda: path.symlink_to("nothing")}[kind]()

    with pytest.raises(UserError, match="has appeared"), new_folder(path):
        appear()
    about = path.lstat()
    assert left(tmp_path) == {"x"} and path.lstat().st_mode == about.st_mode
    files._remove(path)
    with pytest.raises(UserError, match="has appeared"), new_file(path) as partial:
        partial.write_text("ours")
        appear()
    assert left(tmp_path) == {"x"}


@pytest.mark.parametrize("number", ["EINVAL", "ENOSYS"])
def test_a_file_system_without_exclusive_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    import errno

    class Library:
        def __init__(self, *_: object, **__: object) -> None: ...
        @staticmethod
        def renameat2(*_: object) -> int:
            return -1

    monkeypatch.setattr(files.ctypes, "CDLL", Library)
    monkeypatch.setattr(files.ctypes, "get_errno", lambda: getattr(errno, number))
    with pytest.raises(UserError, match="has appeared"), new_folder(tmp_path / "x"):
        (tmp_path / "x").mkdir()
    (tmp_path / "x").rmdir()
    with new_folder(tmp_path / "x"):
        pass
    assert left(tmp_path) == {"x"}


def test_folders_made_for_a_refused_output_go_again(tmp_path: Path) -> None:
    for make in (new_folder, new_file):
        with pytest.raises(UserError, match="mistake"), make(tmp_path / "a" / "b" / "x"):
            raise UserError("mistake")
        assert not left(tmp_path)
    with new_folder(tmp_path / "a" / "b" / "x"):
        pass
    assert left(tmp_path / "a" / "b") == {"x"}


def test_a_failure_while_the_name_is_given_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        raise OSError(28, "No space left on device")

    real = files._fsync
    with monkeypatch.context() as patched:  # the name is given already
        patched.setattr(files, "_fsync", lambda path: fails(path) if path == tmp_path else real(path))
        for make in (new_folder, new_file):
            with pytest.raises(DiskFault, match="No space"), make(tmp_path / "x"):
                pass
            assert not left(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(files, "_fsync", fails)
        for make in (new_folder, new_file):
            with pytest.raises(DiskFault, match="No space"), make(tmp_path / "x"):
                pass
            assert not left(tmp_path)


def test_permissions_are_the_users(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "folder") as folder:
            write_json(folder / "a.json", {})
        write_result(tmp_path / "file", {})
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "folder", tmp_path / "folder" / "a.json")]
    assert modes == [0o750, 0o640] and stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_an_output_behind_a_link_to_a_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert main(command("verify", root, tmp_path / "link" / "x")) == 0
    assert left(tmp_path / "real") == {"x"}


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    child = context.Process(target=time.sleep, args=(60,))
    with claimed(tmp_path / "x"):
        child.start()
    try:
        with claimed(tmp_path / "x"):
            pass
    finally:
        child.kill()
        child.join()


def test_an_old_record_stays_when_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(DiskFault), own_file(tmp_path / "a.json") as partial:
        partial.write_text("{")
        raise OSError(122, "Disk quota exceeded")
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1} and left(tmp_path) == {"a.json"}


# --- caches ---


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "data").write_text("right")

    folder = cached_folder(tmp_path / "x", make, alone=True)
    cached_folder(tmp_path / "x", make, alone=True)
    assert len(made) == 1
    damages: list[Callable[[], object]] = [
        lambda: (folder / "data").write_text("wrong"),
        lambda: (folder / "data").unlink(),
        lambda: (folder / "more").touch(),
        lambda: (folder / "checksums.json").write_text("[]"),
        lambda: (folder / "checksums.json").unlink(),
        lambda: (shutil.rmtree(folder), folder.symlink_to(tmp_path)),
        lambda: (shutil.rmtree(folder), folder.write_text("a file")),
    ]
    for count, damage in enumerate(damages, start=2):
        damage()
        cached_folder(tmp_path / "x", make, alone=True)
        assert len(made) == count and (folder / "data").read_text() == "right"
    assert left(tmp_path) == {"x"}
    cached_folder(tmp_path / "x", make, sound=lambda folder: len(made) > 8, alone=True)
    assert len(made) == 9


def test_two_that_want_a_cache_make_it_once(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / str(os.getpid())).touch()
        time.sleep(0.2)

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=lambda: cached_folder(tmp_path / "x", make, alone=True)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4 and len(left(tmp_path / "x")) == 2
    assert left(tmp_path) == {"x"}


# --- full disks ---


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many KiB, an empty one each time."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(kib: int) -> Path:
        if mounted:
            subprocess.run(["umount", "-l", str(mounted.pop())], check=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("a small tmpfs can be mounted by root only")
        mounted.append(place)
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(root: Path, disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str], name: str) -> None:
    """One line, nothing left, and the same command works where there is room."""
    for size in (4, 24) if name not in SMALL else (4,):
        place = disk(size)
        message = refused(command(name, root, place / "x"), capsys)
        assert "No space left" in message or "is it full" in message, message
        assert "give a place" in message
        assert not left(place), (size, message)
    place = disk(20000)
    assert main(command(name, root, place / "x")) == 0
    assert not [name for name in left(place) if name not in ("x", "x.bin", "x.idx", "x.json")]


SMALL = ("evaluate", "verify", "plan", "latency", "bench", "report", "preprocess", "mask", "structured")
"""Verbs whose result fits on the larger of the small disks."""
