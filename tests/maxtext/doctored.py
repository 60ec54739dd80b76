"""Runs in MaxText's environment: a model whose description lies, and a checkpoint as plain arrays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from megatron_prune.errors import UserError
from megatron_prune.maxtext.convert import export
from megatron_prune.maxtext.folder import DESCRIPTION, newest_step
from megatron_prune.maxtext.options import ExportConfig


def change_model(source: str, target: str) -> str:
    """The way back of a model that says that it is wider than its weights are."""
    shutil.copytree(source, target)
    file = Path(target) / DESCRIPTION
    about = json.loads(file.read_text())
    about["model"]["ffn_hidden_size"] = 96
    file.write_text(json.dumps(about))
    try:
        export(ExportConfig(input=Path(target), output=Path(target) / "hf"))
    except UserError as error:
        return str(error)
    return "accepted"


def dump(run: str, output: str) -> None:
    """Every array of a run's newest checkpoint, weights and optimizer's state, as .npz."""
    import jax
    import orbax.checkpoint as ocp

    items = newest_step(Path(run)).resolve() / "items"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(items).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = reader.restore(items, args=ocp.args.PyTreeRestore(item=tree, restore_args=as_numpy))
    leaves = jax.tree_util.tree_leaves_with_path(found)
    np.savez(output, **{jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves})


def copy_step(run: str, target: str, step: str) -> None:
    """A run of which one checkpoint is left."""
    shutil.copytree(Path(run) / "checkpoints" / step, Path(target) / "checkpoints" / step)
