"""`python -m megatron_prune.maxtext VERB`: what runs in MaxText's environment (tools/setup_maxtext.sh)."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from megatron_prune.command_line import parse
from megatron_prune.errors import UserError, brief, one_line
from megatron_prune.foreign import reason
from megatron_prune.maxtext import options
from megatron_prune.options import Options
from megatron_prune.outputs import held

PROGRAM = "python -m megatron_prune.maxtext"
VERBS: dict[str, tuple[type[Options], str, str]] = {
    "convert": (options.ConvertConfig, "convert:convert", "Hugging Face directory -> model for MaxText"),
    "export": (options.ExportConfig, "convert:export", "model for MaxText, trained or not -> Hugging Face directory"),
    "train": (options.TrainConfig, "train:train", "MaxText's trainer with removed weights held at zero"),
    "learn": (options.LearnConfig, "learn:learn", "N:M masks learned on frozen weights"),
    "score": (options.ScoreConfig, "score:score", "log-likelihoods, for megatron-prune evaluate"),
    "verify": (options.VerifyConfig, "convert:verify", "count the zeros of a trained model against its masks"),
}


ENVIRONMENT = {"jax", "jaxlib", "maxtext", "flax", "optax", "orbax", "absl", "etils", "grain", "tensorboardX"}
"""Modules that MaxText's environment has and others may lack."""


def main(argv: Sequence[str]) -> int:
    """Runs one verb; exit status: 0 done, 1 a check failed, 2 the user's mistake."""
    try:
        return _run(list(argv))
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        told = one_line(f"{error}: give a place that can be read and written and has room")
        print(f"{PROGRAM}: error: {told}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        complaint = _refused(error)
        if complaint is None:
            raise
        print(f"{PROGRAM}: error: {one_line(complaint)}", file=sys.stderr, flush=True)
        return 2


def _refused(error: Exception) -> str | None:
    """What to tell of an error that is an answer to what was asked for; None for a defect of the program."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in ENVIRONMENT:
        return (
            f"{sys.executable} has no {error.name}: this needs MaxText's environment; make it with "
            "tools/setup_maxtext.sh and use .venv-maxtext/bin/python"
        )
    if type(error).__name__ == "IndivisibleError":
        return (
            f"an array does not divide over the devices ({reason(error)}); shard over fewer of them: --settings "
            "ici_fsdp_parallelism=N ici_data_parallelism=-1"
        )
    if "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"more memory was asked for than the devices have ({reason(error)}); give smaller batches, or more devices"
        )
    return None


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} VERB [--flag VALUE ...]\n\nverbs:")
        print("\n".join(f"  {name:<9} {help}" for name, (_config, _function, help) in VERBS.items()))
        return 0 if argv else 2
    if argv[0] not in VERBS:
        raise UserError(f"unknown verb {brief(argv[0])}; allowed: {', '.join(VERBS)}")
    buckets = [word for word in argv[1:] if re.match(r"[a-z0-9]+://", word)]
    if buckets:
        raise UserError(
            f"{brief(buckets[0])} was given; allowed: places on file systems. Mount the bucket (gcsfuse) and "
            "give where it is mounted"
        )
    config, function, _help = VERBS[argv[0]]
    settings = parse(config, argv[1:], prog=f"{PROGRAM} {argv[0]}")
    module, _, name = function.partition(":")
    with held(settings) if config.output_may_exist == "never" else nullcontext():
        return getattr(importlib.import_module(f"megatron_prune.maxtext.{module}"), name)(settings) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
