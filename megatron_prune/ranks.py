"""What one process does for all, and what a file system refuses one of them."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from safetensors import SafetensorError

from megatron_prune import foreign
from megatron_prune.errors import DiskFault, UserError

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG, errno.ESTALE)
"""What a file system may refuse while one writes, apart from what a name can have wrong."""
TORCH_WRITER = ("iostream error", "PytorchStreamWriter failed")
"""What PyTorch says, without a number, of a file that it could not write to the end."""
ROOM = "give a place that can be written and has room"
T = TypeVar("T")


def joined() -> Any:
    """torch.distributed where processes are joined; None where they are not, also in environments without PyTorch."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() and dist.get_world_size() > 1 else None


def acts_for_all() -> bool:
    """Whether this process does what one does for all: rank 0 of those that are joined, and each that is not.

    Who speaks for a launch, joined or not, is `log.is_leader`.
    """
    dist = joined()
    return dist is None or dist.get_rank() == 0


def barrier() -> None:
    """Wait for the joined processes, if any. Collective."""
    dist = joined()
    if dist is not None:
        dist.barrier()


def from_leader(value: T) -> T:
    """Rank 0's `value` on every rank: what files say may differ between nodes of a shared file system. Collective."""
    box = [value]
    dist = joined()
    if dist is not None:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def complaint_of(work: Callable[[], object]) -> UserError | None:
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
    complaint = from_leader(complaint_of(work) if acts_for_all() else None)
    if complaint is not None:
        raise complaint


def together(work: Callable[[], object]) -> None:
    """Let every rank do its own work; when one cannot, all raise its UserError. Collective."""
    complaints = [complaint_of(work)]
    dist = joined()
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
