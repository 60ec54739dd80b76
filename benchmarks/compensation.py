"""What closed-form compensation is worth inside and outside the domain it was fitted on. One command:

    PYTHONPATH=. python benchmarks/compensation.py --model HF_DIRECTORY --shared ../shared --calibration TRAIN.jsonl

Calibrated on Wikipedia (TRAIN.jsonl, as examples/quickstart/fetch_text.py makes it) and on C4, 64 windows of 512, seed
0; tested on WikiText-2 (P1's first 8 windows), on C4 that no calibration sees, and on code (modules of Python's own
library). Everything in one process: the units that `minitron` chooses are cut, refitted from the second moments of one
pass, and run. Writes benchmarks/results/compensation_DATE.json, of which a document's table is made.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from quality import C4_TRAINING, write_result
from torch import Tensor

from megatron_prune.data.calibration import windows
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import Shape
from megatron_prune.decision.units import Units
from megatron_prune.methods.minitron import HEADS, Minitron
from megatron_prune.methods.shape_search import SITES, Refit, refitted, settled
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.statistics.passes import Passes

LENGTH = 1024
DAMPING = Minitron().refit_damping
TARGETS = [
    Shape(ffn_hidden_size=1152),
    Shape(num_attention_heads=6),
    Shape(num_query_groups=2),
    Shape(hidden_size=504),
]
CODE = ("argparse", "asyncio.base_events", "difflib", "email.message", "http.client")


def texts(shared: Path) -> dict[str, str]:
    """The texts that are tested on."""
    c4 = (shared / "data" / "c4" / "c4_en_sample.jsonl").read_text(encoding="utf-8").splitlines()[C4_TRAINING:]
    found = [importlib.util.find_spec(name) for name in CODE]
    sources = [Path(str(spec.origin)).read_text(encoding="utf-8") for spec in found if spec]
    return {
        "WikiText-2": (shared / "data" / "wikitext2" / "wiki.test.joined_nn.txt").read_text(encoding="utf-8"),
        "C4": "\n\n".join(json.loads(line)["text"] for line in c4),
        "code": "\n\n".join(sources),
    }


def cut_into_windows(ids: Sequence[int], most: int) -> Tensor:
    """`[windows, LENGTH]` int64, from the beginning, not overlapping."""
    count = min(most, len(ids) // LENGTH)
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def rows(model: PrunableModel, calibration: Mapping[str, Tensor], tests: Mapping[str, Tensor]) -> Iterator[list[Any]]:
    """Perplexity of every target, for every calibration text, without and with compensation, on every test."""
    config = model.config

    def perplexities(units: Units, *change: Any) -> list[float]:
        return [math.exp(Passes(model, tokens).loss(units, *change)) for tokens in tests.values()]

    yield ["dense", "", "", *perplexities(Units.all(config))]
    for source, tokens in calibration.items():
        passes = Passes(model, tokens)
        found = [settled(layer) for layer in passes.observe_each(SITES)]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--calibration", type=Path, required=True, help="Wikipedia text, a document a line")
    given = parser.parse_args()
    with backend.running(backend.Layout()):
        model = open_model(given.model).load(backend.Layout())
        tokenizer = load_tokenizer(given.model, model.config.vocab_size)
        c4 = given.shared / "data" / "c4" / "c4_en_sample.jsonl"
        calibration = {
            "Wikipedia": windows([given.calibration], tokenizer, 64, 512, 0).tokens,
            "C4": windows([c4], tokenizer, 64, 512, 0, slice(0, C4_TRAINING)).tokens,
        }
        ids = {
            name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts(given.shared).items()
        }
        tests = {name: cut_into_windows(found, 8 if name == "WikiText-2" else 4) for name, found in ids.items()}
        found = list(rows(model, calibration, tests))
    result = {
        "columns": ["target", "calibrated on", "compensation", *tests],
        "rows": found,
        "protocol": "SmolLM2-135M, bf16, perplexity without recovery training; windows of 1024: WikiText-2 the first "
        f"8, C4 held out and code the first 4. Calibration 64 x 512 tokens, damping {DAMPING}.",
    }
    write_result("compensation", result)


if __name__ == "__main__":
    main()
