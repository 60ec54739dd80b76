"""What defines a draw of learned masks, apart from arithmetic on tensors: its key, Philox's integers, the order of
patterns, the noise of a start, the schedules. PyTorch and JAX (`megatron_prune.maxtext`) take them from here, so that a
seed means the same masks in both; the C and the Triton kernel repeat Philox's integers. Needs numpy alone.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
MASK_32 = 0xFFFFFFFF
MASK_64 = 0xFFFFFFFFFFFFFFFF

MAX_M = 8
INITIAL_STEP = 2**32 - 1
"""Step number under which a random start is drawn: no training step has it."""
GUMBEL_MEAN = np.euler_gamma
GUMBEL_STD = math.pi / math.sqrt(6.0)


def splitmix64(value: int) -> int:
    """One output of SplitMix64 (Steele, Lea and Flood 2014) from state `value`: a bijection of 64 bits."""
    z = (value + 0x9E3779B97F4A7C15) & MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    return z ^ (z >> 31)


def hash_key(*values: int) -> tuple[int, int]:
    """Philox key (low, high 32-bit word) of a tuple of integers.

    h = 0, then h = splitmix64(h XOR value) for each value. Values count modulo 2^64. Their order matters.
    """
    state = 0
    for value in values:
        state = splitmix64(state ^ (value & MASK_64))
    return state & MASK_32, state >> 32


@dataclass(frozen=True)
class Draw:
    """Names one draw of noise: equal draws are equal noise, on any machine and under any sharding."""

    seed: int
    step: int
    """Optimiser step."""
    microbatch: int
    """Index within the step; counted over all data-parallel ranks, each rank draws its own noise."""
    tensor_id: int
    """Index of the unsharded weight in the model."""

    def key(self) -> tuple[int, int]:
        """Philox key: two 32-bit words (see `hash_key`)."""
        return hash_key(self.seed, self.step, self.microbatch, self.tensor_id)


def pattern_table(n: int, m: int) -> np.ndarray:
    """All ways to keep n of m, bool [C(m, n), m], in lexicographic order of the kept indices. 2:4 gives

    0: 1 1 0 0    1: 1 0 1 0    2: 1 0 0 1    3: 0 1 1 0    4: 0 1 0 1    5: 0 0 1 1

    Raises ValueError unless 1 <= n <= m <= 8.
    """
    if not 1 <= n <= m <= MAX_M:
        raise ValueError(f"pattern {n}:{m} is not supported: allowed are 1 <= N <= M <= {MAX_M}")
    table = np.zeros((math.comb(m, n), m), bool)
    for index, kept in enumerate(itertools.combinations(range(m), n)):
        table[index, list(kept)] = True
    return table


def linear_schedule(start: float, end: float, step: int, steps: int) -> float:
    """Value at `step` (from 0) of a straight line from `start` to `end` over `steps` steps (MaskLLM, section 3.2)."""
    done = 0.0 if steps <= 1 else min(step, steps - 1) / (steps - 1)
    return (1.0 - done) * start + done * end


def geometric_schedule(start: float, end: float, step: int, steps: int) -> float:
    """As `linear_schedule`, on a logarithmic scale: equal factors in equal times."""
    return math.exp(linear_schedule(math.log(start), math.log(end), step, steps))


SCHEDULES = {"linear": linear_schedule, "geometric": geometric_schedule}
