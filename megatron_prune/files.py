"""Outputs: folders and files that appear whole or not at all, and never over one that is already there.

Every output of every verb is made here. While it is made it is called `NAME.partial`, and `.NAME.megatron_prune`
beside it is locked (flock: the lock of a process that was killed is free at once). That file also says by its number
in the file system which `NAME.partial` is ours, so that after a kill the next run takes over what the killed one left,
and never removes anything of the user's. Both are gone when a run ends, well or not, unless it is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_prune import foreign
from megatron_prune.claims import (
    Claim,
    claim,
    claim_around,
    own_claim,
    partial_of,
    refuse_existing,
    release,
)
from megatron_prune.errors import DiskFault, UserError
from megatron_prune.ranks import ROOM, acts_for_all, barrier, by_leader, complaint_of, disk_fault, from_leader, why

CHECKSUMS = "checksums.json"
"""In a folder of a cache: size and CRC-32 of every other file."""
RENAME_NOREPLACE = 1
"""Of Linux's renameat2(2)."""
AT_FDCWD = -100


# --- folders ---


def begin_folder(path: Path, alone: bool = False) -> Path:
    """The folder that everything meant for `path` is written into, empty. Collective, or one process `alone`.

    `path` must not exist. `publish_folder` or `abandon_folder` follows.
    """
    partial = partial_of(path)

    def begin() -> None:
        made = claim(path) if claim_around(path) is None else None
        try:
            refuse_existing(path)
            if made is not None:
                made.check_partial()
            _remove(partial)
            partial.mkdir(parents=True)
            if made is not None:
                made.note_partial()
        except BaseException:
            if made is not None:
                release(made)
            raise

    _run(begin, alone)
    return partial


def _run(work: Callable[[], None], alone: bool) -> None:
    """By the leader for all, or by this process for itself."""
    if not alone:
        return by_leader(work)
    complaint = complaint_of(work)
    if complaint is not None:
        raise complaint
    return None


def _remove(path: Path) -> None:
    """Remove whatever is there, of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def abandon_folder(path: Path, alone: bool = False) -> None:
    """Remove what `begin_folder` began for `path`. Not collective: every rank may call it, the leader acts."""
    if not (alone or acts_for_all()):
        return
    shutil.rmtree(partial_of(path), ignore_errors=True)
    _release_folder(path)


def _release_folder(path: Path) -> None:
    made = own_claim(path)
    if made is not None:
        release(made)


def publish_folder(path: Path, alone: bool = False) -> None:
    """Give a folder from `begin_folder` its name, once it is on the disk whole. Collective: rank 0 renames.

    When that cannot be, what was begun is removed.
    """
    partial = partial_of(path)

    def publish() -> None:
        sync(partial)
        give_name(partial, path)

    if not alone:
        barrier()
    try:
        _run(publish, alone)
    except BaseException:
        abandon_folder(path, alone)
        raise
    if alone or acts_for_all():
        _release_folder(path)


def give_name(partial: Path, path: Path) -> None:
    """Rename, never over anything, and push the name to the disk; UserError when something is there."""
    try:
        _rename_to_nothing(partial, path)
    except FileExistsError:
        raise UserError(
            f"{path} has appeared while it was being made here, and is left as it is; give another --output"
        ) from None
    try:
        _fsync(path.parent)
    except OSError:
        os.rename(path, partial)
        raise


def _rename_to_nothing(source: Path, target: Path) -> None:
    """Rename; FileExistsError where there is anything, which file systems without renameat2 see a moment before."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        names = (AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target))
        if rename(*names, RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(number, os.strerror(number), str(target))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


@contextlib.contextmanager
def new_folder(path: Path, alone: bool = False) -> Iterator[Path]:
    """A folder to write into that gets its name `path` when everything is in it. All ranks take part, or one `alone`.

    On an error the half-written folder is removed and `path` does not appear. Rank 0 looks and renames; the others
    wait for it. What the file system refuses is a UserError.
    """
    partial = begin_folder(path, alone)
    try:
        yield partial
    except BaseException as error:
        abandon_folder(path, alone)
        _mistake(path, error)
        raise
    publish_folder(path, alone)


def _mistake(path: Path, error: BaseException) -> None:
    """Raise a UserError in place of what a full or broken disk makes of a writer of `path`."""
    if isinstance(error, UserError) or not isinstance(error, Exception) or not disk_fault(error):
        return
    text = f"{path} could not be written ({why(error)}); {ROOM}; what was begun is removed"
    raise DiskFault(text) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """While active, what a full or broken disk makes of a writer of `path` is a UserError."""
    try:
        yield
    except Exception as error:
        _mistake(path, error)
        raise


# --- files ---


@contextlib.contextmanager
def new_file(path: Path, what: str = "output") -> Iterator[Path]:
    """A file to write that gets its name `path` when it is complete, never over another. By one process.

    On an error it is removed. What the file system refuses is a UserError.
    """
    around = claim_around(path)
    made = claim(path, what) if around is None else None
    partial = partial_of(path)
    try:
        refuse_existing(path, what)
        if made is not None:
            made.check_partial()
        partial.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        if made is not None:
            made.note_partial()
        yield partial
        _fsync(partial)
        give_name(partial, path)
    except BaseException as error:
        if around is not None or (made is not None and made.owns_partial()):
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        _mistake(path, error)
        raise
    finally:
        if made is not None:
            release(made)


@contextlib.contextmanager
def own_file(path: Path) -> Iterator[Path]:
    """A file to write, in a folder of ours, that takes the place of `path` when it is complete: readers see the old one
    or the new one, never a part. On an error the old one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        yield partial
        _fsync(partial)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        _mistake(path, error)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file of a folder of ours, or write it anew."""
    with own_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """As `write_text`, of JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_result(path: Path, content: Any) -> None:
    """Write JSON as a new file that somebody asked for."""
    text = json.dumps(content, indent=2) + "\n"
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(folder: Path) -> None:
    """Push every file below `folder`, and the folder itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot be asked to
            raise
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """CRC-32 of a file, as eight hexadecimal digits."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


# --- caches ---


def cached_folder(
    path: Path, make: Callable[[Path], object], sound: Callable[[Path], bool] = lambda _: True, alone: bool = False
) -> Path:
    """The folder `path` of a cache as `make` fills one, made anew where it is missing, damaged or not `sound`.

    Of several processes that want it one makes it and the others wait. Collective (so `make` may be), or one process
    `alone`.
    """
    taken: list[Claim] = []

    def good() -> bool:
        mine = _unchanged(path) and sound(path) if alone or acts_for_all() else False
        return mine if alone else from_leader(mine)

    if good():
        return path
    _run(lambda: taken.append(claim(path, "cache", may_exist=True, wait=True)), alone)
    try:
        if good():  # by now
            return path
        _run(lambda: _remove(path), alone)
        with new_folder(path, alone) as partial:
            make(partial)
            _run(lambda: _write_checksums(partial), alone)
        return path
    finally:
        for each in taken:
            release(each)


def _write_checksums(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    write_json(folder / CHECKSUMS, {str(f.relative_to(folder)): [f.stat().st_size, checksum(f)] for f in sorted(files)})


def _unchanged(folder: Path) -> bool:
    """Whether a folder of a cache holds what was written into it."""
    if folder.is_symlink() or not (folder / CHECKSUMS).is_file():
        return False
    try:
        stated = foreign.read_json(folder / CHECKSUMS, "a cache", dict[str, tuple[int, str]])
        files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if not f.is_dir() and f.name != CHECKSUMS}
        return set(files) == set(stated) and all(
            file.is_file() and file.stat().st_size == stated[name][0] and checksum(file) == stated[name][1]
            for name, file in files.items()
        )
    except (UserError, OSError):
        return False
