"""Throughput of `preprocess` against the tokenizer library alone, in one run.

    PYTHONPATH=. python benchmarks/preprocess.py --tokenizer HF_DIRECTORY --shared ../shared

The library alone: the same text, already in memory, through its batch encode in the same number of processes, forked
with the tokenizer loaded; nothing is written. Ours: the whole verb but for Python's imports: loading the tokenizer,
reading and parsing JSON lines, writing parts, joining them. Both start at the same moment and run side by side, several
times, so that other work on the machine slows both alike. The clock and the processor time of all processes of a side
are kept. Writes benchmarks/results/preprocess_DATE.json; exit status 1 below the bar.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from megatron_prune.config import PreprocessConfig
from megatron_prune.data import preprocess
from megatron_prune.data.encoder import Encoder, load_encoder
from megatron_prune.data.text import read_documents

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quality import HERE, hardware, versions

BAR = 0.8
ALONE, OURS = "tokenizer library alone", "preprocess"


def library_alone(encoder: Encoder, texts: list[str], workers: int) -> None:
    """Encode each process's share of the texts in batches, and forget the ids."""

    def encode(share: list[str]) -> None:
        gc.freeze()
        encoder.use_threads(1)
        for first in range(0, len(share), preprocess.BATCH_DOCUMENTS):
            encoder.encode(share[first : first + preprocess.BATCH_DOCUMENTS])

    context = get_context("fork")
    processes = [context.Process(target=encode, args=(texts[number::workers],)) for number in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process of the library alone failed")


def processor_s() -> float:
    """Processor seconds of this process and all that it has waited for."""
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in each)


def side_by_side(sides: Mapping[str, Callable[[], None]]) -> dict[str, tuple[float, float]]:
    """(wall, processor) seconds of each side, all started at once, each in a process of its own."""
    context = get_context("fork")
    gate = context.Barrier(len(sides))
    results = context.SimpleQueue()

    def measure(name: str, function: Callable[[], None]) -> None:
        gc.freeze()
        gate.wait()
        wall, processor = time.perf_counter(), processor_s()
        function()
        results.put((name, (time.perf_counter() - wall, processor_s() - processor)))

    processes = [context.Process(target=measure, args=side) for side in sides.items()]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a side failed; its traceback is above")
    return dict(results.get() for _ in sides)


def main() -> int:
    """Measure, write the result, compare with the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--copies", type=int, default=7, help="of the sample, one after the other")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    sample = given.shared / "data" / "c4" / "c4_en_sample.jsonl"
    runs: dict[str, list[tuple[float, float]]] = {ALONE: [], OURS: []}
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "c4.jsonl"
        text.write_bytes(sample.read_bytes() * given.copies)
        texts = read_documents([text])
        encoder = load_encoder(given.tokenizer)
        for repeat in range(given.repeats):
            output = Path(temporary) / f"out{repeat}"
            config = PreprocessConfig(
                input=(str(text),), output=output, tokenizer=given.tokenizer, workers=given.workers, append_eod=True
            )
            sides: dict[str, Callable[[], None]] = {
                ALONE: partial(library_alone, encoder, texts, given.workers),
                OURS: partial(preprocess.run, config),
            }
            for name, seconds in side_by_side(sides).items():
                runs[name].append(seconds)
                print(name, *seconds, flush=True)
        report = json.loads((Path(temporary) / "out0.json").read_text())
    return write(runs, report["tokens"], text_megabytes=sum(map(len, texts)) / 1e6, given=given)


def write(
    runs: dict[str, list[tuple[float, float]]], tokens: int, text_megabytes: float, given: argparse.Namespace
) -> int:
    """The dated result file; 1 when the ratio by the clock is below the bar."""
    pairs = list(zip(runs[ALONE], runs[OURS], strict=True))
    ratios = [statistics.median(alone[which] / ours[which] for alone, ours in pairs) for which in (0, 1)]
    rows = []
    for name, times in runs.items():
        wall, processor = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append([name, given.workers, wall, processor, tokens / wall, *(ratios if name == OURS else [None, None])])
    today = datetime.date.today().isoformat()
    result = {
        "columns": ["", "processes", "wall s", "CPU s", "tokens/s", "ratio", "ratio of CPU time"],
        "rows": rows,
        "protocol": (
            f"{text_megabytes:.0f} MB of C4 ({tokens} tokens, a sample repeated {given.copies} times) as JSONL, without"
            f" imports; both at once, medians of {given.repeats} runs; bar {BAR}. Other work on the machine too: load"
            f" average {os.getloadavg()[0]:.0f} at the end."
        ),
        "runs": {name: [list(run) for run in times] for name, times in runs.items()},
        "hardware": hardware(),
        "date": today,
        "versions": versions(),
    }
    path = HERE / "results" / f"preprocess_{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(ratios[0] < BAR)


if __name__ == "__main__":
    sys.exit(main())
