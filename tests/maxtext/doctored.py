"""Runs in MaxText's environment: a model whose description lies, and a checkpoint as plain arrays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from megatron_prune.errors import UserError
from megatron_prune.maxtext import layout
from megatron_prune.maxtext.convert import export
from megatron_prune.maxtext.folder import DESCRIPTION, newest_step
from megatron_prune.maxtext.masks import prunable_shapes
from megatron_prune.maxtext.options import ExportConfig, ScoreConfig
from megatron_prune.maxtext.score import score
from megatron_prune.model.families import FAMILIES, ModelConfig


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


def as_the_second_host(model: str, requests: str, output: str) -> str:
    """What `score` says where JAX counts two hosts and this is the second, started as any other process."""
    import jax

    jax.process_count, jax.process_index = lambda: 2, lambda: 1
    try:
        score(ScoreConfig(input=Path(model), requests=Path(requests), output=Path(output)))
    except UserError as error:
        return str(error)
    return "answered"


def damage(run: str, copy: str, how: str) -> str:
    """A copy of a run or of a model, with a damaged newest step: a short data file, no manifest, broken metadata."""
    shutil.copytree(run, copy)
    steps = [path for path in Path(copy).glob("*/*") if path.name.isdigit()]
    items = max(steps, key=lambda path: int(path.name)) / "items"
    if how == "truncate":
        largest = max((path for path in items.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif how == "manifest":
        (items / "manifest.ocdbt").unlink()
    else:
        (items / "_METADATA").write_text("{")
    return how


def load(path: str) -> str:
    """What loading a model says."""
    from megatron_prune.maxtext import model

    try:
        model.load(Path(path), None, 32, 1)
    except UserError as error:
        return str(error)
    return "loaded"


def sixteen_bits(width: int) -> str:
    """Types of a masked model's arrays stored in bfloat16, lost zeros, and whether the way back is equal."""
    model = config(head_dim=int(width))
    given = {name: value.astype(ml_dtypes.bfloat16) for name, value in weights(model).items()}
    masks = {name: np.random.default_rng(1).random(shape) < 0.5 for name, shape in prunable_shapes(model).items()}
    for name, mask in masks.items():
        given[name] = np.where(mask, given[name], 0).astype(ml_dtypes.bfloat16)
        given[name][:, ::3] = 0
    tree = layout.to_maxtext(given.__getitem__, model, masks, "bfloat16")
    types = {str(array.dtype) for path, array in tree.items() if "query" not in path}
    query = str(tree["decoder/layers/self_attention/query/kernel"].dtype)
    zeros = sum(int((tree[leaf.path] == 0).sum()) for leaf in layout.LEAVES if leaf.prunable)
    back = dict(layout.from_maxtext(tree, model, masks))
    equal = all(np.array_equal(back[key].astype(ml_dtypes.bfloat16), given[key]) for key in given)
    return f"{types} {query} {zeros - sum(int((~mask).sum()) for mask in masks.values())} {equal}"


def config(**changes: object) -> ModelConfig:
    """A small LLaMA, which is not as wide as its heads are together."""
    hf = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": 51}
    hf |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    return FAMILIES["llama"].from_hf(hf | {"tie_word_embeddings": False} | changes)


def weights(model: ModelConfig) -> dict[str, np.ndarray]:
    """Random weights by Hugging Face name."""
    random = np.random.default_rng(0)
    maps = FAMILIES[model.family].weights(model)
    shapes = {name: shape for map in maps for name, shape in zip(map.hf, map.shapes, strict=True)}
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
