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
import fcntl
import json
import os
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from megatron_prune import foreign
from megatron_prune.errors import DiskFault, UserError

PARTIAL = ".partial"
"""Suffix of what is still being written."""
LOCK = ".megatron_prune"
"""Suffix of the hidden file beside an output that is being written."""
MARK = "megatron_prune writes the output beside this file"
"""Begins that file; the number of the unfinished output in the file system follows."""
CHECKSUMS = "checksums.json"
"""In a folder of a cache: size and CRC-32 of every other file."""
LONGEST_NAME = 255
"""Bytes of a name in the file systems of Linux."""
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG, errno.ESTALE)
"""What a file system may refuse while one writes, apart from what a name can have wrong."""
TORCH_WRITER = ("iostream error", "PytorchStreamWriter failed")
"""What PyTorch says, without a number, of a file that it could not write to the end."""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
ROOM = "give a place that can be written and has room"
RENAME_NOREPLACE = 1
"""Of Linux's renameat2(2)."""
AT_FDCWD = -100
T = TypeVar("T")


# --- ranks ---


def _dist() -> Any:
    """torch.distributed where processes are joined; None where they are not, also in environments without PyTorch."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() and dist.get_world_size() > 1 else None


def _leader() -> bool:
    dist = _dist()
    return dist is None or dist.get_rank() == 0


def _barrier() -> None:
    dist = _dist()
    if dist is not None:
        dist.barrier()


def from_leader(value: T) -> T:
    """Rank 0's `value` on every rank: what files say may differ between nodes of a shared file system. Collective."""
    box = [value]
    dist = _dist()
    if dist is not None:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _complaint(work: Callable[[], object]) -> UserError | None:
    """Do the work; what to tell the user when it cannot be done."""
    try:
        work()
    except UserError as error:
        return error
    except (SafetensorError, OSError) as error:
        kind = DiskFault if disk_fault(error) else UserError
        return kind(f"{foreign.reason(error, 250)}: {ROOM}; what was there before is untouched")
    return None


def by_leader(work: Callable[[], None]) -> None:
    """Let rank 0 alone look at files or change them; when it cannot, every rank raises its UserError. Collective."""
    complaint = from_leader(_complaint(work) if _leader() else None)
    if complaint is not None:
        raise complaint


def together(work: Callable[[], object]) -> None:
    """Let every rank do its own work; when one cannot, all raise its UserError. Collective."""
    complaints = [_complaint(work)]
    dist = _dist()
    if dist is not None:
        own, complaints = complaints[0], [None] * dist.get_world_size()
        dist.all_gather_object(complaints, own)
    for complaint in complaints:
        if complaint is not None:
            raise complaint


def disk_fault(error: BaseException) -> bool:
    """Whether an exception, of whatever library, says that the file system could not take or give what it should."""
    seen: BaseException | None = error
    while seen is not None:
        if (isinstance(seen, OSError) and seen.errno in DISK_FAULTS) or _of_torchs_writer(seen):
            return True
        number = re.search(r"\(os error (\d+)\)", str(seen)) if isinstance(seen, SafetensorError) else None
        if number is not None and int(number[1]) in DISK_FAULTS:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _of_torchs_writer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH_WRITER)


def why(error: BaseException) -> str:
    """What the file system refused, in a few words."""
    return "the disk took no more: is it full?" if _of_torchs_writer(error) else foreign.reason(error, 250)


# --- whose an output is ---


def refuse_existing(path: Path, what: str = "output") -> None:
    """UserError when there is anything at `path`, be it a link to nothing: results are never overwritten silently."""
    if os.path.lexists(path):
        link = "" if path.exists() else " (a link to something that does not exist)"
        raise UserError(
            f"{what} {path} already exists{link}; give a folder that does not exist, or remove this one if it is not "
            "needed"
        )


def check_place(path: Path, what: str = "output") -> None:
    """UserError where nothing can be made: no name, a name too long, below a file, in a folder closed to the user."""
    try:
        length = len(os.fsencode(foreign.check_name(str(path.name)))) + len(os.fsencode(LOCK)) + 1
        foreign.check_name(str(path))
    except ValueError as error:
        raise UserError(f"{what} {str(path)!r} is no name of a file ({error}); give another") from None
    if path.name in ("", ".."):
        raise UserError(f"{what} {path} names no new file or folder; give a name below it, such as {path / 'new'}")
    if length > LONGEST_NAME:
        raise UserError(f"{what} {path}: its name has {len(path.name)} characters; give a shorter one")
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise UserError(f"{what} {path}: {above} is no folder; give a place in a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{what} {path}: {above} cannot be written by this user; give a place that can")


def partial_of(path: Path) -> Path:
    """What an output is called while it is made."""
    return path.with_name(path.name + PARTIAL)


@dataclass
class Claim:
    """An output that this process is the one to make."""

    path: Path
    lock: Path
    handle: int | None
    """Of the lock; None in a forked process, whose parent has it."""
    parents: list[Path] = field(default_factory=list)
    """Folders above the output that were made for it, the innermost last."""
    uses: int = 1

    @property
    def partial(self) -> Path:
        """What the output is called until then."""
        return partial_of(self.path)

    def owns_partial(self) -> bool:
        """Whether `partial` is this program's: it is noted, or an empty folder made just before a kill."""
        try:
            about = os.lstat(self.partial)
        except FileNotFoundError:
            return False
        if stat.S_ISLNK(about.st_mode):
            return False
        noted = self._read()
        if noted == MARK:
            return stat.S_ISDIR(about.st_mode) and not any(self.partial.iterdir())
        return noted == f"{MARK}: {about.st_ino}"

    def check_partial(self) -> None:
        """UserError when what has the name of the unfinished output is not this program's."""
        if os.path.lexists(self.partial) and not self.owns_partial():
            raise UserError(
                f"output {self.path}: {self.partial} is in the way, and no run of this program has left it; rename or "
                "remove it"
            )

    def _read(self) -> str:
        assert self.handle is not None
        return os.pread(self.handle, 4096, 0).decode(errors="replace").strip()

    def note(self, text: str = "") -> None:
        """Write down whose the unfinished output is."""
        if self.handle is not None:
            data = f"{MARK}{text}\n".encode()
            os.pwrite(self.handle, data, 0)
            os.ftruncate(self.handle, len(data))

    def note_partial(self) -> None:
        """Write down that `partial`, just made, is ours."""
        self.note(f": {os.lstat(self.partial).st_ino}")


_claims: dict[Path, Claim] = {}
"""Outputs that this process makes, by the place where they will be."""


def _in_child() -> None:
    """In a forked process: the parent's locks are not to live as long as this process."""
    for claim in _claims.values():
        if claim.handle is not None:
            os.close(claim.handle)
            claim.handle = None


os.register_at_fork(after_in_child=_in_child)


def real(path: Path) -> Path:
    """`path` without links, also where one leads to itself, which `Path.resolve` does not take."""
    return Path(os.path.realpath(path))


def _key(path: Path) -> Path:
    return real(path.parent) / path.name


def _claim_around(path: Path) -> Claim | None:
    """The claim that `path` is inside of: its owner may do there what it likes."""
    above = _key(path).parents
    return next((c for key, c in _claims.items() if key in above or partial_of(key) in above), None)


def claim(path: Path, what: str = "output", may_exist: bool = False, wait: bool = False) -> Claim:
    """Make this process the one that makes `path`; `release` ends that. By one process.

    UserError when it cannot be made, another process makes it, something is there already, or `path.partial` is not
    ours. `wait`: for the other process to end.
    """
    check_place(path, what)
    key = _key(path)
    known = _claims.get(key)
    if known is not None:
        known.uses += 1
        return known
    if not may_exist:
        _forget_mark(path)
        refuse_existing(path, what)
    try:
        made = _claim(path, what, may_exist, wait)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be written ({foreign.reason(error)}): {ROOM}") from None
    _claims[key] = made
    return made


def _forget_mark(path: Path) -> None:
    """Remove the lock file beside a whole output: a process that was killed behind giving it its name has left that."""
    lock = path.with_name(f".{path.name}{LOCK}")
    if not (os.path.lexists(path) and os.path.lexists(lock)):
        return
    with contextlib.suppress(OSError, UserError):  # another process holds it, or it is not ours
        _let_go(Claim(path, lock, _lock(lock, path, wait=False), []))


def _claim(path: Path, what: str, may_exist: bool, wait: bool) -> Claim:
    made = Claim(path, path.with_name(f".{path.name}{LOCK}"), None, _make_parents(path))
    try:
        made.handle = _lock(made.lock, path, wait)
        if not may_exist:
            refuse_existing(path, what)
        made.check_partial()
        if not os.path.lexists(made.partial):
            made.note()
    except BaseException:
        _let_go(made)
        raise
    return made


def release(made: Claim) -> None:
    """End a claim; with the last use of it goes its lock, unless an unfinished output of ours stays."""
    made.uses -= 1
    if made.uses == 0:
        del _claims[_key(made.path)]
        _let_go(made)


def _let_go(made: Claim) -> None:
    """Remove the lock file, unless it says of an unfinished output whose it is; free the lock."""
    if made.handle is not None:
        with contextlib.suppress(OSError):
            if not made.owns_partial():
                made.lock.unlink(missing_ok=True)
        os.close(made.handle)
    _remove_empty(made.parents)


def _make_parents(path: Path) -> list[Path]:
    """Make the folders above `path` that are missing; those, the innermost last."""
    missing = [folder for folder in path.parents if not folder.exists()][::-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()


def _lock(file: Path, path: Path, wait: bool) -> int:
    """The lock on `file`, which is made for it."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            _flock(handle, path, wait)
            if not _is_ours(handle):
                raise UserError(f"{path} cannot be written: {file} is in the way, and not ours; rename or remove it")
            if _same(handle, file):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # whoever had the lock has removed the file


def _flock(handle: int, path: Path, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise UserError(f"another process is writing {path}; wait for it or end it, or give another --output") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{path}: its file system has no locks: see that no other run writes there", file=sys.stderr)


def _is_ours(handle: int) -> bool:
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode):
        return False
    return about.st_size == 0 or os.pread(handle, len(MARK), 0) == MARK.encode()


def _same(handle: int, file: Path) -> bool:
    """Whether the locked file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(file))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def claimed(path: Path, what: str = "output", may_exist: bool = False, wait: bool = False) -> Iterator[Claim]:
    """`claim` for the duration of the block. By one process."""
    made = claim(path, what, may_exist, wait)
    try:
        yield made
    finally:
        release(made)


# --- folders ---


def begin_folder(path: Path, alone: bool = False) -> Path:
    """The folder that everything meant for `path` is written into, empty. Collective, or one process `alone`.

    `path` must not exist. `publish_folder` or `abandon_folder` follows.
    """
    partial = partial_of(path)

    def begin() -> None:
        made = claim(path) if _claim_around(path) is None else None
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
    complaint = _complaint(work)
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
    if not (alone or _leader()):
        return
    shutil.rmtree(partial_of(path), ignore_errors=True)
    _release_folder(path)


def _release_folder(path: Path) -> None:
    made = _claims.get(_key(path)) if _claim_around(path) is None else None
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
        _barrier()
    try:
        _run(publish, alone)
    except BaseException:
        abandon_folder(path, alone)
        raise
    if alone or _leader():
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
    around = _claim_around(path)
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
        mine = _unchanged(path) and sound(path) if alone or _leader() else False
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
