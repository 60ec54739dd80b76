"""The part of `zeroshot_speed.py` that runs in MaxText's environment: loads a model once and answers what it is asked.

    .venv-maxtext/bin/python benchmarks/zeroshot_maxtext.py FOLDER TOKENS_PER_BATCH DTYPE

Each line of the input names a file of requests and one for the answers; each line of the output gives the CPU seconds
of this process for them, the first for loading.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


def main() -> None:
    """Answer until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens_per_batch", type=int)
    parser.add_argument("dtype")
    given = parser.parse_args()
    from megatron_prune.maxtext.options import ScoreConfig
    from megatron_prune.maxtext.score import JaxScorer, read_requests, write_answers

    nowhere = Path("unused")
    config = ScoreConfig(
        input=given.folder,
        requests=nowhere,
        output=nowhere,
        tokens_per_batch=given.tokens_per_batch,
        dtype=given.dtype,
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
    main()
