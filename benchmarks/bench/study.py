"""One model through the verbs that a user would type, each command once, and the texts and protocols for it.

Protocol P1: WikiText-2 test, tokenised whole without BOS, non-overlapping windows of 1024 tokens, the first 32, bf16.
Calibration C1: the first 1,624 documents of the C4 sample, 64 windows of 512 tokens, seed 0.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .running import Times, kept, verb

if TYPE_CHECKING:
    from torch import Tensor

C4_TRAINING = 1624
"""Documents of the C4 sample that may be learned from; those after them are held out."""
SAMPLES, LENGTH = 64, 512
WINDOWS = {"calibration_samples": SAMPLES, "calibration_seq_length": LENGTH}
TASKS = "hellaswag piqa winogrande boolq arc_easy arc_challenge openbookqa rte".split()
BATCH = 4
"""Windows of LENGTH tokens in a step of training."""
TRAINING = {"seq_length": LENGTH, "micro_batch_size": BATCH, "global_batch_size": BATCH, "adam_eps": "1e-8"}
LINEAR = {"lr_decay_style": "linear", "min_lr": 0, "lr_warmup_iters": 5}
SMALL_LENGTH = 256
SMALL_STEPS: dict[str, Any] = {
    **{"seq_length": SMALL_LENGTH, "micro_batch_size": 1, "global_batch_size": 1, "adam_eps": "1e-8", "lr": 2e-4},
    **LINEAR,
}
"""Training of a 2:4 model: at equal tokens many small steps were better than few large ones."""


def folder_name(*words: str) -> str:
    """A run folder's name of method, target and options: no characters that paths or options are parted by."""
    return "_".join(word.strip("-").translate(str.maketrans(":=,/", "----")) for word in words)


@dataclass(frozen=True)
class Row:
    """One way to prune, a line of a table."""

    name: str
    method: str
    target: str
    options: tuple[str, ...] = ()
    peer: str = ""
    """The same row by the best other tool on this model, text and protocol."""

    @property
    def folder(self) -> str:
        """Name of the run folder."""
        return folder_name(self.method, self.target, *self.options)


class Texts:
    """Files below the folder of shared data."""

    def __init__(self, shared: Path) -> None:
        data = shared / "data"
        self.c4 = data / "c4" / "c4_en_sample.jsonl"
        self.wikitext = data / "wikitext2" / "wiki.test.joined_nn.txt"
        self.wikitext_validation = data / "wikitext2" / "wiki.valid.raw"
        self.mix = data / "train" / "train_mix.jsonl.gz"
        self.tasks = data / "zeroshot"

    def c1(self) -> dict[str, object]:
        """Options of a verb that calibrates on C1."""
        return {"calibration": self.c4, "calibration_documents": C4_TRAINING, **WINDOWS}

    def c1_windows(self, tokenizer: Any, samples: int = SAMPLES, length: int = LENGTH) -> Tensor:
        """The windows of C1, or fewer and shorter ones, `[samples, length]` int64."""
        from megatron_prune.data.calibration import windows

        return windows([self.c4], tokenizer, samples, length, 0, slice(0, C4_TRAINING)).tokens


class Study:
    """Runs verbs on one model, and remembers in the work folder what they made and took."""

    def __init__(self, work: Path, shared: Path) -> None:
        self.work, self.texts = work, Texts(shared)
        self.dense = self.work / "dense"

    def verb(self, name: str, *words: object, output: Path, **options: Any) -> Times:
        """Run a verb unless its output and its cost are there: wall and CPU seconds and peak memory."""
        record = output.with_name(output.name + ".cost.json")
        if not output.exists():
            record.unlink(missing_ok=True)
        return kept(record, lambda: self._run(name, *words, output=output, **options))

    def _run(self, name: str, *words: object, output: Path, **options: Any) -> Times:
        cost = verb(name, *words, output=output, **options)[0]
        print(f"{name} {output.name}: {cost['wall_s']:.0f} s", flush=True)
        return cost

    def imported(self, model: Path, **options: object) -> Times:
        """Import the Hugging Face directory as the dense model."""
        return self.verb("import", input=model, output=self.dense, **options)

    def ordered(self) -> tuple[Path, Times]:
        """The dense model with its channels in order."""
        path = self.work / "permuted"
        return path, self.verb("permute", input=self.dense, output=path, **self.texts.c1())

    def perplexity(self, checkpoint: Path, result: Path | None = None, text: Path | None = None) -> float:
        """P1 of a checkpoint, or the same windows of another text."""
        result = result or checkpoint.with_name(checkpoint.name + ".p1.json")
        self.verb("evaluate", input=checkpoint, text=text or self.texts.wikitext, output=result)
        return float(json.loads(result.read_text())["perplexity"])

    def on_held_out(self, model: Path) -> float:
        """Perplexity of a checkpoint on the documents of C4 that nothing sees before."""
        path = self.work / "c4_held_out.jsonl"
        if not path.exists():
            lines = self.texts.c4.read_text(encoding="utf-8").splitlines()[C4_TRAINING:]
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return self.perplexity(model, self.work / f"{model.name}.c4.json", path)

    def trimmed(self, run: Path, end: str = "_trimmed") -> Path:
        """The model of a run that decided what stays."""
        model = run.with_name(run.name + end)
        self.verb("trim", input=run, output=model)
        return model

    def parameters(self, run: Path) -> int:
        """Of the model of a run that decided which units stay."""
        return int(json.loads((run / "decision" / "trim.json").read_text())["parameters"])

    def trained(self, start: Path, run: Path, steps: int, **options: object) -> Times:
        """Train on the training text."""
        return self.verb("train", input=start, output=run, **self.training(steps), **LINEAR, **options)

    def training(self, steps: int) -> dict[str, object]:
        """Options of a verb that takes steps on the training text."""
        return {"data": self.training_text(), "train_iters": steps, **TRAINING}

    def training_text(self) -> Path:
        """The calibration documents of C4 and the Wikipedia articles of the training mix: none is evaluated on."""
        path = self.work / "training.jsonl"
        if not path.exists():
            c4 = self.texts.c4.read_text(encoding="utf-8").splitlines()[:C4_TRAINING]
            with gzip.open(self.texts.mix, "rt", encoding="utf-8") as mix:
                wiki = [line.rstrip("\n") for line in mix if "wiki" in json.loads(line)["source"]]
            path.write_text("".join(line + "\n" for line in [*c4, *wiki]), encoding="utf-8")
        return path
