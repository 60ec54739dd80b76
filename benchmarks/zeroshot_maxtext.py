"""The part of `zeroshot_speed.py` that runs in MaxText's environment: loads a model once and answers what it is asked.

    .venv-maxtext/bin/python benchmarks/zeroshot_maxtext.py FOLDER TOKENS_PER_BATCH DTYPE

Each line of the input names a file of requests and one for the answers; each line of the output gives the CPU seconds
of this process for them, the first for loading.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from megatron_prune.maxtext.options import ScoreConfig
from megatron_prune.maxtext.score import JaxScorer, read_requests, write_answers


def main(folder: str, tokens_per_batch: str, dtype: str) -> None:
    """Answer until the input ends."""
    nowhere = Path("unused")
    config = ScoreConfig(
        input=Path(folder),
        requests=nowhere,
        output=nowhere,
        tokens_per_batch=int(tokens_per_batch),
        dtype=dtype,  # type: ignore[arg-type]
        settings=("jax_cache_dir=",),  # what it compiles is compiled here and now
    )
    scorer = JaxScorer(config)
    print("seconds", time.process_time(), flush=True)
    for line in sys.stdin:
        asked, answered = line.rstrip("\n").split("\t")
        began = time.process_time()
        total, greedy = scorer.score(read_requests(Path(asked)))
        write_answers(Path(answered), total, greedy)
        print("seconds", time.process_time() - began, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
