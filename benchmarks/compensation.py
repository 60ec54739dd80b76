"""What closed-form compensation is worth inside and outside the domain it was fitted on.

    python benchmarks/compensation.py --model HF_DIRECTORY --shared ../shared --calibration TRAIN.jsonl

Calibrated on Wikipedia (TRAIN.jsonl, as examples/quickstart/fetch_text.py makes it) and on C4, 64 windows of 512, seed
0; tested on WikiText-2 (P1's first 8 windows), on C4 that no calibration sees, and on code (modules of Python's own
library). Everything in one process: the units that `minitron` chooses are cut, refitted from the second moments of one
pass, and run.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.results import CALIBRATION, MODEL, SHARED, arguments, write_result
from bench.study import C4_TRAINING, LENGTH, SAMPLES, Texts

if __name__ == "__main__":
    GIVEN = arguments(__doc__, MODEL, SHARED, CALIBRATION)

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.data.calibration import windows
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import Shape
from megatron_prune.decision.units import Units
from megatron_prune.methods.minitron import HEADS, Minitron
from megatron_prune.methods.shape_search import Refit, refitted, settled, sites
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.statistics.passes import Passes

TESTED = 1024
"""Tokens of a window."""
DAMPING = Minitron().refit_damping
TARGETS = [
    Shape(ffn_hidden_size=1152),
    Shape(num_attention_heads=6),
    Shape(num_query_groups=2),
    Shape(hidden_size=504),
]
CODE = ("argparse", "asyncio.base_events", "difflib", "email.message", "http.client")


def tested(texts: Texts) -> dict[str, str]:
    """The texts that are tested on."""
    c4 = texts.c4.read_text(encoding="utf-8").splitlines()[C4_TRAINING:]
    found = [importlib.util.find_spec(name) for name in CODE]
    sources = [Path(str(spec.origin)).read_text(encoding="utf-8") for spec in found if spec]
    return {
        "WikiText-2": texts.wikitext.read_text(encoding="utf-8"),
        "C4": "\n\n".join(json.loads(line)["text"] for line in c4),
        "code": "\n\n".join(sources),
    }


def cut_into_windows(ids: Sequence[int], most: int) -> Tensor:
    """`[windows, TESTED]` int64, from the beginning, not overlapping."""
    count = min(most, len(ids) // TESTED)
    return torch.tensor(ids[: count * TESTED]).view(count, TESTED)


def rows(model: PrunableModel, calibration: Mapping[str, Tensor], tests: Mapping[str, Tensor]) -> Iterator[list[Any]]:
    """Perplexity of every target, for every calibration text, without and with compensation, on every test."""
    config = model.config

    def perplexities(units: Units, *change: Any) -> list[float]:
        return [math.exp(Passes(model, tokens).loss(units, *change)) for tokens in tests.values()]

    yield ["dense", "", "", *perplexities(Units.all(config))]
    for source, tokens in calibration.items():
        passes = Passes(model, tokens)
        found = [settled(layer) for layer in passes.observe_each(sites(config))]
        for target in TARGETS:
            attention = bool(target.num_attention_heads or target.num_query_groups)
            for heads in HEADS if attention else HEADS[:1]:
                units = Minitron(heads=heads).width(config, passes, found, target)
                chosen = f", heads by {heads}" if attention else ""
                yield [str(target), source, f"none{chosen}", *perplexities(units)]
                change = refitted(config, found, units, Refit(DAMPING))
                yield [str(target), source, f"refit{chosen}", *perplexities(units, change)]
                print(source, target, heads, flush=True)


@torch.no_grad()
def main() -> None:
    """Measure everything and write the result file."""
    texts = Texts(GIVEN.shared)
    with backend.running(backend.Layout()):
        model = open_model(GIVEN.model).load(backend.Layout())
        tokenizer = load_tokenizer(GIVEN.model, model.config.vocab_size)
        wikipedia = windows([GIVEN.calibration], tokenizer, SAMPLES, LENGTH, 0).tokens
        ids = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in tested(texts).items()}
        tests = {name: cut_into_windows(found, 8 if name == "WikiText-2" else 4) for name, found in ids.items()}
        found = list(rows(model, {"Wikipedia": wikipedia, "C4": texts.c1_windows(tokenizer)}, tests))
    protocol = (
        "SmolLM2-135M, bf16, perplexity without recovery training; windows of 1024: WikiText-2 the first 8, C4 held "
        f"out and code the first 4. Calibration 64 x 512 tokens, damping {DAMPING}."
    )
    write_result("compensation", GIVEN, ["target", "calibrated on", "compensation", *tests], found, protocol)


if __name__ == "__main__":
    main()
