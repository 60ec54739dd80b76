"""Training checkpoints of sharded models through torch.distributed.checkpoint, in the folders of `Checkpoints`.

Tensors have their Hugging Face names and no trace of how many processes wrote them: any number reads them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from megatron_prune.files import checksum
from megatron_prune.model.checkpoint import ShardedSave, read_safely, refusal
from megatron_prune.model.untrusted import TableReader, ValuePlanner
from megatron_prune.ranks import from_leader


class FsdpSave(ShardedSave):
    """A state dict of sharded tensors and plain values on its way into an existing empty folder."""

    def _prepare(
        self, state: dict[str, Any], in_background: bool
    ) -> tuple[Callable[[], dict[str, str]], Callable[[], None]]:
        """As the base class: all ranks agree on who writes what; torch's own `save` would wait for the files."""
        planner = _Copying() if in_background else dcp.DefaultSavePlanner()
        writer = _Writer(self.folder, sync_files=True)
        leader = backend.rank() == 0
        planner.set_up_planner(state, writer.storage_meta(), leader)
        writer.set_up_storage_writer(leader)
        plans: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(plans, writer.prepare_local_plan(planner.create_local_plan()))
        metadata = None
        if leader:
            plans, metadata = planner.create_global_plan(plans)
            plans = writer.prepare_global_plan(plans)
        plan = planner.finish_plan(from_leader(plans)[backend.rank()])
        results: list[Any] = []

        def write() -> dict[str, str]:
            try:
                results.extend(writer.write_data(plan, planner).wait())
            except Exception as error:  # noqa: BLE001  (torch wraps what the file system refused in types of its own)
                raise refusal(error) or error from None
            names = {item.storage_data.relative_path for item in results}
            return {name: checksum(self.folder / name) for name in names}

        def finalize() -> None:
            everything: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everything, results)
            if metadata is not None:
                writer.finish(metadata, everything)

        return write, finalize


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta | None:
        """Nothing: torch would record the folder's path, which changes when it is published."""
        return None


class _Copying(dcp.DefaultSavePlanner):
    """Writes copies in the host's memory, made before training goes on."""

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As the base class."""
        plan = super().finish_plan(new_plan)
        self.copies: dict[Any, Tensor | io.BytesIO] = {}
        for item in plan.items:
            found = super().resolve_data(item)
            self.copies[item.index] = found.detach().to("cpu", copy=True) if isinstance(found, Tensor) else found
        return plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """As the base class."""
        return self.copies[write_item.index]


def load_fsdp(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill a state dict of sharded tensors, in place; UserError when the folder is damaged or does not fit.

    Nothing in the folder is executed.
    """

    def read(table: Metadata) -> dict[str, Any]:
        dcp.load(state, storage_reader=TableReader(folder, table), planner=ValuePlanner())
        return state

    return read_safely(folder, read)
