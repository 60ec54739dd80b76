"""Masks that learning starts from, as a user names them: a run, a decision folder or a mask .npz."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from megatron_prune.claims import real
from megatron_prune.decision.masks import Masks, check_mask, prunable_shapes
from megatron_prune.decision.run_folder import decision_of
from megatron_prune.decision.source import packed_masks
from megatron_prune.decision.target import Target
from megatron_prune.errors import UserError
from megatron_prune.log import say
from megatron_prune.model.families import ModelConfig, get_family

MaskSource = Callable[[str], Tensor]
"""Hugging Face weight name -> bool mask `[out, in]`."""


def given_prior(named: str, source: Path, model: ModelConfig, target: Target, methods: Sequence[str]) -> MaskSource:
    """The masks at `named`; any will do, one off the target is told. UserError for what holds none.

    `source`: where the weights come from; `methods`: what else could have been named.
    """
    path = Path(named)
    if path.suffix == ".npz":
        masks: MaskSource = packed_masks(path, model)
    elif path.is_dir():
        found = Masks.load(decision_of(path))
        found.check_model(model)
        masks = found.get
        _tell_weights(path, source)
    else:
        raise UserError(
            f"--prior {named} is neither a run, a decision folder, a mask .npz nor a method ({', '.join(methods)})"
        )
    name = next(name for name in prunable_shapes(model) if not target.leaves(name))
    try:
        check_mask(get_family(model.family).as_rows(masks(name)), target, name)
    except UserError as error:
        say(f"--prior {named} is no {target.title} mask: {error}; each group starts from the pattern closest to it")
    return masks


def _tell_weights(run: Path, source: Path) -> None:
    """Say that the weights which a run has corrected are not taken with its masks, unless they are the input."""
    weights = run / "weights"
    if weights.is_dir() and real(weights) != real(source):
        say(
            f"--prior {run}: its masks are taken, and the weights of --input {source}; the run has changed weights, "
            f"which are taken with --input {weights}"
        )
