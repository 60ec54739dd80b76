"""Whose an output is: the one process that makes it, by a lock that a killed process leaves free."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_prune import foreign
from megatron_prune.errors import UserError
from megatron_prune.ranks import ROOM

PARTIAL = ".partial"
"""Suffix of what is still being written."""
LOCK = ".megatron_prune"
"""Suffix of the hidden file beside an output that is being written."""
MARK = "megatron_prune writes the output beside this file"
"""Begins that file; the number of the unfinished output in the file system follows."""
LONGEST_NAME = 255
"""Bytes of a name in the file systems of Linux."""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def refuse_existing(path: Path, what: str = "output") -> None:
    """UserError when there is anything at `path`, be it a link to nothing: results are never overwritten silently."""
    if os.path.lexists(path):
        link = "" if path.exists() else " (a link to something that does not exist)"
        raise UserError(
            f"{what} {path} already exists{link}; give a name that does not exist, or remove what is there if it is "
            "not needed"
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


def _place(path: Path) -> Path:
    return real(path.parent) / path.name


def claim_around(path: Path) -> Claim | None:
    """The claim that `path` is inside of: its owner may do there what it likes."""
    above = _place(path).parents
    return next((c for key, c in _claims.items() if key in above or partial_of(key) in above), None)


def own_claim(path: Path) -> Claim | None:
    """The claim of `path` itself, outside of any other."""
    return _claims.get(_place(path)) if claim_around(path) is None else None


def claim(path: Path, what: str = "output", may_exist: bool = False, wait: bool = False) -> Claim:
    """Make this process the one that makes `path`; `release` ends that. By one process.

    UserError when it cannot be made, another process makes it, something is there already, or `path.partial` is not
    ours. `wait`: for the other process to end.
    """
    check_place(path, what)
    key = _place(path)
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
        del _claims[_place(made.path)]
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
