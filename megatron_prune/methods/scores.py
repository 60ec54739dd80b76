"""The score of Wanda (Sun et al. 2023, arXiv:2306.11695), by which OWL tells outliers, too."""

from __future__ import annotations

from torch import Tensor

from megatron_prune.methods.base import Linear, finite


def wanda_score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2 (paper, equation 1): weight `[rows, in]`, norm over all tokens `[in]`."""
    return weight.abs() * input_norm


def wanda_scores(linear: Linear) -> Tensor:
    """Of this rank's rows of a linear whose statistic is `InputNorm`; UserError where one is no number."""
    norm = finite(linear.name, linear.statistic.value(), "inputs")
    return wanda_score(finite(linear.name, linear.weight(), "weights"), norm)
