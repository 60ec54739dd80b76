"""Throughput of `preprocess` against the tokenizer library alone, in one run.

    python benchmarks/preprocess.py --tokenizer HF_DIRECTORY --shared ../shared

The library alone: the same text, already in memory, through its batch encode in the same number of processes, forked
with the tokenizer loaded; nothing is written. Ours: the whole verb but for Python's imports: loading the tokenizer,
reading and parsing JSON lines, writing parts, joining them. Both start at the same moment and run side by side, several
times, so that other work on the machine slows both alike. The clock and the processor time of all processes of a side
are kept. Exit status 1 below the bar.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from bench.results import SHARED, arguments, option, rounds, write_result
from bench.running import Times, each, forked, ratios, side_by_side, spread
from bench.study import Texts

if __name__ == "__main__":
    GIVEN = arguments(
        __doc__,
        option("--tokenizer", type=Path, required=True),
        SHARED,
        option("--workers", type=int, default=os.cpu_count()),
        option("--copies", type=int, default=7, help="of the sample, one after the other"),
        rounds(5),
    )

from megatron_prune.config import PreprocessConfig
from megatron_prune.data.encoder import Encoder, load_encoder
from megatron_prune.data.preprocess import BATCH_DOCUMENTS
from megatron_prune.data.text import read_documents
from megatron_prune.verbs import preprocess

BAR = 0.8
ALONE, OURS = "tokenizer library alone", "preprocess"
COLUMNS = ["", "processes", "wall s", "CPU s", "tokens/s", "ratio", "ratio of CPU time"]


def library_alone(encoder: Encoder, texts: list[str], workers: int) -> None:
    """Encode each process's share of the texts in batches, and forget the ids."""

    def encode(share: list[str]) -> None:
        encoder.use_threads(1)
        for first in range(0, len(share), BATCH_DOCUMENTS):
            encoder.encode(share[first : first + BATCH_DOCUMENTS])

    forked([partial(encode, texts[number::workers]) for number in range(workers)])


def main() -> int:
    """Measure, write the result, compare with the bar."""
    runs: dict[str, list[Times]] = {ALONE: [], OURS: []}
    with tempfile.TemporaryDirectory() as temporary:
        text, output = Path(temporary) / "c4.jsonl", Path(temporary) / "out"
        text.write_bytes(Texts(GIVEN.shared).c4.read_bytes() * GIVEN.copies)
        texts, encoder = read_documents([text]), load_encoder(GIVEN.tokenizer)
        for number in range(GIVEN.rounds):
            config = PreprocessConfig(
                input=(str(text),),
                output=output.with_name(f"out{number}"),
                tokenizer=GIVEN.tokenizer,
                workers=GIVEN.workers,
                append_eod=True,
            )
            library = partial(library_alone, encoder, texts, GIVEN.workers)
            for name, times in side_by_side({ALONE: library, OURS: partial(preprocess.run, config)}).items():
                runs[name].append(times)
                print(name, times, flush=True)
        tokens = json.loads(output.with_name("out0.json").read_text())["tokens"]
    return write(runs, tokens, sum(map(len, texts)) / 1e6)


def write(runs: dict[str, list[Times]], tokens: int, megabytes: float) -> int:
    """The dated result file; 1 when the ratio by the clock is below the bar."""
    compared = {key: spread(ratios(runs[ALONE], runs[OURS], key)) for key in ("wall_s", "cpu_s")}
    rows: list[list[Any]] = []
    for name, times in runs.items():
        wall, cpu = each(statistics.median, times).values()
        shown = [found["median"] if name == OURS else None for found in compared.values()]
        rows.append([name, GIVEN.workers, wall, cpu, tokens / wall, *shown])
    protocol = (
        f"{megabytes:.0f} MB of C4 ({tokens} tokens, a sample repeated {GIVEN.copies} times) as JSONL, without imports;"
        f" both at once, medians of {GIVEN.rounds} runs; bar {BAR}. Other work on the machine too: load average "
        f"{os.getloadavg()[0]:.0f} at the end."
    )
    pairs = {name: [list(one.values()) for one in times] for name, times in runs.items()}
    write_result("preprocess", GIVEN, COLUMNS, rows, protocol, runs=pairs, ratios=compared)
    return int(compared["wall_s"]["median"] < BAR)


if __name__ == "__main__":
    sys.exit(main())
