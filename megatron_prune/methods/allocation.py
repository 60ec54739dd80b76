"""How much of each layer goes: OWL (Yin et al. 2023, arXiv:2310.05175), by which layers with more outliers keep more.

An outlier is a weight whose Wanda score, |W| ||X||, is above `OUTLIER` times the mean of its matrix (paper, section
3.2), by scores of the dense model. A layer's share of outliers, scaled linearly so that the least and the most sparse
layer lie `spread` apart (2 lambda in the paper), is taken off the target; all weights together meet it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_prune.decision.target import Target, Unstructured
from megatron_prune.methods.base import Linear, Workbench
from megatron_prune.methods.scores import wanda_scores
from megatron_prune.statistics.activations import InputNorm

OUTLIER = 5.0
"""M of the paper, which takes 5 for most models."""


def sparsity_of(work: Workbench, target: Target) -> Callable[[Linear], float]:
    """Share of a linear's weights that goes, of unstructured targets. With a spread the calibration text goes through
    the dense model first. Collective.
    """
    if not isinstance(target, Unstructured) or not target.spread:
        share = target.sparsity if isinstance(target, Unstructured) else 0.0
        return lambda linear: share
    sizes, outliers = dict[int, int](), dict[int, int]()
    for linear in work.dense_linears(InputNorm):
        score = wanda_scores(linear)
        sums = linear.gather(score.double().sum(1, keepdim=True))
        for name, rows in linear.blocks.items():
            if not target.leaves(name):
                size = len(rows) * score.shape[1]
                mean = sums[rows.to(sums.device)].sum() / size
                found = linear.gather((score > OUTLIER * mean).sum(1, keepdim=True).double())
                sizes[linear.layer] = sizes.get(linear.layer, 0) + size
                outliers[linear.layer] = outliers.get(linear.layer, 0) + int(found[rows.to(found.device)].sum())
    shares = {layer: outliers[layer] / sizes[layer] for layer in sizes}
    by_layer = allocate(shares, sizes, target)
    return lambda linear: by_layer[linear.layer]


def allocate(shares: Mapping[int, float], sizes: Mapping[int, int], target: Unstructured) -> dict[int, float]:
    """Layer -> its sparsity, from the layers' shares of outliers and their numbers of weights."""
    found = torch.tensor([shares[layer] for layer in sizes], dtype=torch.float64)
    weights = torch.tensor([sizes[layer] for layer in sizes], dtype=torch.float64)
    width = found.max() - found.min()
    less = (found - found.min()) / width * target.spread if width > 0 else torch.zeros_like(found)
    sparsities: Tensor = target.sparsity - (less - (less * weights).sum() / weights.sum())
    return dict(zip(sizes, sparsities.tolist(), strict=True))
