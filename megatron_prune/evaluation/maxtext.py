"""A model for MaxText as an evaluation sees it: requests go to its own environment and answers come back in files.

Text, tasks, tokens and results are those of every other model; only the log-likelihoods are computed there, on what
that environment has: TPUs, or the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_prune.config import EvaluateConfig
from megatron_prune.data.requests import Request, Scores
from megatron_prune.errors import UserError
from megatron_prune.exporting.maxtext import call, maxtext_python
from megatron_prune.maxtext.folder import TOKENIZER, Folder
from megatron_prune.maxtext.score import read_answers, write_requests


def refuse_options(config: EvaluateConfig, model: str) -> None:
    """UserError for what only a model for MaxText has a use for."""
    for key, given in (("checkpoint", config.checkpoint), ("settings", config.settings)):
        if given:
            raise UserError(f"--{key} was given and {model} is no model for MaxText: leave it out")


class MaxTextScorer:
    """A model for MaxText, in any number of devices; one process asks."""

    def __init__(
        self,
        path: Path,
        checkpoint: Path | None,
        tokens_per_batch: int,
        dtype: str | None,
        settings: Sequence[str] = (),
    ) -> None:
        """`checkpoint`: the run that has trained it; `dtype`: of the computation, None: the model's own; `settings`:
        MaxText's.
        """
        self.path = path
        self.checkpoint = checkpoint
        self.settings = settings
        self.config = Folder.open(path).config
        self.longest = self.config.max_position_embeddings
        self.tokenizer = path / TOKENIZER
        self.tokens_per_batch = tokens_per_batch
        self.dtype = dtype or self.config.dtype
        self.python = maxtext_python()

    def score(self, requests: Sequence[Request]) -> Scores:
        """For each request its log-likelihood in nats, and whether every token of it is the most probable one."""
        if not requests:
            return np.zeros(0), np.ones(0, bool)
        with tempfile.TemporaryDirectory() as folder:
            asked, answered = Path(folder) / "requests.npz", Path(folder) / "answers.npz"
            write_requests(asked, requests)
            self.ask(asked, answered)
            return read_answers(answered)

    def ask(self, asked: Path, answered: Path) -> None:
        """Have the requests of one file answered in another."""
        words: list[object] = ["--input", self.path, "--requests", asked, "--output", answered]
        words += ["--tokens-per-batch", self.tokens_per_batch, "--dtype", self.dtype]
        words += ["--checkpoint", self.checkpoint] if self.checkpoint else []
        words += ["--settings", *self.settings] if self.settings else []
        call(self.python, "score", *words, on_cpu=False)

    def window_losses(self, windows: np.ndarray) -> tuple[float, int]:
        """Sum of the losses of all tokens but the first of each window [n, length], in nats, and their number."""
        if windows.shape[1] > self.longest + 1:
            raise UserError(f"windows of {windows.shape[1]} tokens were given; the model reads at most {self.longest}")
        requests = [Request(window[:1].tolist(), window[1:].tolist()) for window in windows]
        total, _ = self.score(requests)
        return -float(total.sum()), windows.shape[0] * (windows.shape[1] - 1)
