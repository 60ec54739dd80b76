"""The verbs that convert: a Hugging Face directory to a model for MaxText, a trained one back, and a look at zeros."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_prune.claims import refuse_existing
from megatron_prune.errors import UserError
from megatron_prune.maxtext import layout
from megatron_prune.maxtext.folder import Folder, read_weights, write_folder
from megatron_prune.maxtext.hf import HFDirectory, write_directory
from megatron_prune.maxtext.masks import PackedMasks, stacked
from megatron_prune.maxtext.options import ConvertConfig, ExportConfig, VerifyConfig
from megatron_prune.model.pruning import read_pruning


def convert(config: ConvertConfig) -> None:
    """Write the model for MaxText `config.output` from the Hugging Face directory `config.input`."""
    refuse_existing(config.output)
    source = HFDirectory(config.input)
    layout.check(source.config)
    masks = PackedMasks(config.masks, source.config) if config.masks else None
    tree = layout.to_maxtext(source.read, source.config, {} if masks is None else masks, config.weights_dtype)
    history = read_pruning(config.input)
    if masks is not None and masks.pattern:
        history["target"] = masks.pattern
    write_folder(config.output, tree, source.config, masks, config.input, history)
    print(f"{config.output}: {source.config.num_layers} layers, {'masks' if masks else 'no masks'}, for MaxText 0.2.5")


def export(config: ExportConfig) -> None:
    """Write a Hugging Face directory from a model for MaxText, with the weights of `config.checkpoint` if given."""
    refuse_existing(config.output)
    folder = Folder.open(config.input)
    masks = folder.masks()
    tree = read_weights(folder.step(config.checkpoint), folder.config)
    if masks is not None:
        _, lost = count_zeros(tree, masks, folder)
        if lost:
            raise UserError(
                f"{lost} weights that must stay zero are not zero in {config.checkpoint or config.input}: it was "
                "trained without its masks; train with python -m megatron_prune.maxtext train"
            )
    weights = layout.from_maxtext(tree, folder.config, {} if masks is None else masks)
    history = read_pruning(config.input)
    written = write_directory(config.output, folder.config, weights, folder.tokenizer, history)
    tied = folder.config.tie_word_embeddings and not written.tie_word_embeddings
    print(f"{config.output}: {written.dtype}" + ("; the output layer is untied now, it was trained" if tied else ""))


def verify(config: VerifyConfig) -> int:
    """Compare every zero of a checkpoint with the masks of its model; exit status 1 when one is lost."""
    folder = Folder.open(config.input)
    masks = folder.masks()
    if masks is None:
        raise UserError(f"{config.input} has no masks: there is nothing to verify")
    tree = read_weights(folder.step(config.checkpoint), folder.config)
    zeros, lost = count_zeros(tree, masks, folder)
    print(f"zeros of the masks: {zeros}; of them not +0.0 in the checkpoint: {lost}")
    return int(lost > 0)


def count_zeros(tree: Mapping[str, np.ndarray], masks: PackedMasks, folder: Folder) -> tuple[int, int]:
    """Removed weights, and how many of them are not +0.0 in the tree."""
    zeros = lost = 0
    for leaf in layout.masked_leaves(folder.config):
        found = np.asarray(tree[leaf.path])[~stacked(leaf, masks, folder.config)]
        zeros += found.size
        lost += int(((found != 0) | np.signbit(found)).sum())
    return zeros, lost
