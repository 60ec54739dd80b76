"""All scores of a model on 1, 2 and 3 data-parallel processes: `scores.py MODEL FOLDER`, which gets WORLD.safetensors.

The processes are forked from this one, which has imported everything: that costs most here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import megatron_prune.backend as backend  # isort: skip
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import save_file

from megatron_prune.decision.source import open_model
from megatron_prune.statistics.passes import Passes

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.unit.structured.test_invariances import Scores, activation_scores, taylor_scores

WORLDS = (1, 2, 3)
LENGTH, WINDOWS = 700, (1, 2, 7)
"""Two windows of so many tokens make a unit of what is computed together; one is less than there are processes."""


def everything(path: Path) -> Scores:
    """All scores on several numbers of windows. Collective."""
    found: Scores = {}
    model = open_model(path).load(backend.Layout())
    for windows in WINDOWS:
        tokens = torch.randint(64, (windows, LENGTH), generator=torch.Generator().manual_seed(windows))
        scores = activation_scores(model, tokens) | taylor_scores(model, tokens[:, :12])
        scores["without"] = torch.tensor(Passes(model, tokens).losses_without([frozenset({0}), frozenset({1})]))
        found |= {f"{windows} {name}": x.double().contiguous() for name, x in scores.items()}
    return found


def process(rank: int, world: int, path: Path, folder: Path) -> None:
    """One of `world` processes; the first writes what all have found."""
    store = dist.FileStore(str(folder / f"{world}.store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    with backend.running(backend.Layout()):
        found = everything(path)
    if rank == 0:
        save_file(found, folder / f"{world}.safetensors")
    backend.shutdown()


if __name__ == "__main__":
    model_path, output = map(Path, sys.argv[1:])
    for count in WORLDS:
        multiprocessing.start_processes(process, (count, model_path, output), nprocs=count, start_method="fork")
