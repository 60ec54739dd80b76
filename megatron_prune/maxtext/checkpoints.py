"""Checkpoints of runs on TPUs, as Orbax writes them: which there are, whether the newest can be read.

A step is a folder with a number. Its arrays lie in a key-value store (OCDBT) of few large files, so that a lost piece
of a file shows when a value is read, and not before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_prune.errors import UserError, one_line
from megatron_prune.foreign import quiet, reason

CHECKPOINTS = "checkpoints"
ITEMS = "items"
"""Where MaxText keeps the arrays of a step."""
MANIFEST = "manifest.ocdbt"


def steps_of(folder: Path) -> list[int]:
    """The numbers of the steps in a folder of checkpoints, ascending."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in found if path.name.isdigit())


def last_step(run: Path) -> int:
    """The newest step saved in a run folder; -1 where there is none."""
    return max(steps_of(run / CHECKPOINTS), default=-1)


def fault(step: Path, items: str = ITEMS, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a step, None for nothing; of the values every `parts`-th is read, from number `part` on."""
    import tensorstore

    folder = (step / items).resolve()
    with quiet():
        try:
            json.loads((folder / "_METADATA").read_text(encoding="utf-8"))
            (folder / MANIFEST).stat()
            base = {"driver": "file", "path": f"{folder}/"}
            store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
            for key in sorted(store.list().result())[part::parts]:
                store.read(key).result()
        except (OSError, ValueError, KeyError) as error:
            return one_line(f"{type(error).__name__}: {reason(error)}", 200)
    return None


def refuse_damaged(step: Path) -> None:
    """UserError for a step that cannot be read; each host reads a share of it. Collective.

    Before Orbax does: what it has begun when it fails complains on its own, and later.
    """
    import jax

    wrong = fault(step, ITEMS, jax.process_index(), jax.process_count())
    if _any(wrong is not None):
        raise damaged(step, wrong or "another host says so")


def damaged(step: Path, wrong: str) -> UserError:
    """What to tell of a step that cannot be read."""
    return UserError(f"{step} is damaged ({wrong}); restore it, or give an older step: RUN/checkpoints/NUMBER")


def set_aside_damaged(run: Path, items: str = ITEMS) -> None:
    """Move newest steps that cannot be read out of the way, so that the run goes on from one that can.

    Every host reads a share of each. Collective.
    """
    import jax
    from jax.experimental import multihost_utils

    while steps := steps_of(run / CHECKPOINTS):
        step = run / CHECKPOINTS / str(steps[-1])
        wrong = fault(step, items, jax.process_index(), jax.process_count())
        if not _any(wrong is not None):
            return
        if jax.process_index() == 0:
            aside = _free(run / f"damaged_step_{steps[-1]}")
            step.rename(aside)
            print(f"{step} is damaged ({wrong or 'another host says so'}); it is set aside as {aside}", flush=True)
        multihost_utils.sync_global_devices("set aside")


def _any(mine: bool) -> bool:
    import numpy as np
    from jax.experimental import multihost_utils

    found: Any = multihost_utils.process_allgather(np.array([mine]))
    return bool(found.any())


def _free(path: Path) -> Path:
    """The same, with a number where there is something."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}_{number}")
    return free
