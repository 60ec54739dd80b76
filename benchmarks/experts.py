"""Fewer and smaller experts, and sparse ones, on a real mixture of experts: trained here, from nothing.

    python benchmarks/experts.py --shared ../shared

A Qwen3-MoE of 16 experts a layer, of which a token meets 4, and beside it a dense Qwen3 as large as what a token meets,
learn from the same windows of the training mix (books, RFCs, PEPs, questions and answers). Then the first is pruned in
every way there is, trimmed, and evaluated before and after the same recovery. What is kept in `--work` is not done
again.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.results import SHARED, arguments, option, work, write_result
from bench.running import verb
from bench.study import Study, folder_name

LENGTH = 256
VOCABULARY = 2048
HELD_OUT = 40
"""Every so manieth document is evaluated on and not learned from."""
LONGEST = 6000
"""Characters of a document that are used: many short ones rather than a few books."""
WINDOWS = 300
"""Of the held-out documents."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}
EXPERTS: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("qwen3_moe", SIZES | EXPERTS | {"intermediate_size": 256, "norm_topk_prob": True}),
    "dense": ("qwen3", SIZES | {"intermediate_size": 256}),
}
CHOICES = (0, 1)
"""Of experts at random; the row is their mean."""


@dataclass(frozen=True)
class Row:
    """One way to prune; several of them are one row of means."""

    name: str
    method: str
    target: str
    options: tuple[tuple[str, ...], ...] = ((),)

    def folders(self) -> list[str]:
        """Names of the run folders."""
        return [folder_name(self.method, self.target, *options) for options in self.options]


def scores(experts: int) -> list[Row]:
    """Every score of an expert at one number of them."""
    target = f"num_moe_experts={experts}"
    chance = tuple(("--score=random", f"--random-seed={seed}") for seed in CHOICES)
    named = [
        Row(f"{experts} experts, {score}", "reap", target, ((f"--score={score}",),)) for score in ("frequency", "ean")
    ]
    return [
        Row(f"{experts} experts, REAP", "reap", target),
        *named,
        Row(f"{experts} experts, merged (REAM)", "ream", target),
        Row(f"{experts} experts, merged in pairs (REAM)", "ream", target, (("--group-size=2",),)),
        Row(f"{experts} experts, random", "reap", target, chance),
    ]


ROWS = [
    *scores(12),
    *scores(8),
    Row("experts 3/4 as wide, Minitron without a fit", "minitron", "moe_ffn_hidden_size=48", (("--refit=none",),)),
    Row("experts 3/4 as wide, Minitron", "minitron", "moe_ffn_hidden_size=48"),
    Row("experts half as wide, Minitron without a fit", "minitron", "moe_ffn_hidden_size=32", (("--refit=none",),)),
    Row("experts half as wide, Minitron", "minitron", "moe_ffn_hidden_size=32"),
    Row("2:4, magnitude", "magnitude", "2:4"),
    Row("2:4, Wanda", "wanda", "2:4"),
    Row("2:4, SparseGPT", "sparsegpt", "2:4"),
]
COLUMNS = ["", "parameters", "a token meets", "perplexity", "after recovery", "lowest", "highest"]


class Mixture(Study):
    """The two models, and what becomes of the first."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(given.work, given.shared)
        self.steps, self.more, self.seeds = given.steps, given.more, given.seeds
        self.dense = self.work / "experts_trained" / "weights"
        self.held_out = self.work / "held_out.txt"

    def write_texts(self) -> None:
        """Training and held-out documents, and a tokenizer of the first."""
        from tokenizers import ByteLevelBPETokenizer
        from transformers import PreTrainedTokenizerFast

        if not self.held_out.exists():
            with gzip.open(self.texts.mix, "rt", encoding="utf-8") as mix:
                documents = [json.loads(line)["text"] for line in mix]
            learned = [text[:LONGEST] for number, text in enumerate(documents) if number % HELD_OUT]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in learned)
            (self.work / "training.jsonl").write_text(lines, encoding="utf-8")
            pieces = [text[:LONGEST] for text in itertools.islice(documents, 0, None, HELD_OUT)]
            tokenizer = ByteLevelBPETokenizer()
            tokenizer.train_from_iterator(learned[::4], VOCABULARY, min_frequency=2, special_tokens=["<s>", "</s>"])
            fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>")
            fast.save_pretrained(self.work / "tokenizer")
            places = {"input": self.work / "training.jsonl", "output": self.work / "tokens"}
            verb("preprocess", processes=1, append_eod=True, tokenizer=self.work / "tokenizer", **places)
            self.held_out.write_text("\n\n".join(pieces), encoding="utf-8")

    def started(self, name: str) -> Path:
        """One of the models with random weights, as a Hugging Face directory."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        folder = self.work / f"{name}_start"
        if not folder.exists():
            torch.manual_seed(0)
            kind, sizes = MODELS[name]
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)
            AutoTokenizer.from_pretrained(self.work / "tokenizer").save_pretrained(folder)
        return folder

    def learned(self, name: str) -> Path:
        """One of the models, trained from nothing."""
        start, run = self.work / f"{name}_megatron", self.work / f"{name}_trained"
        self.verb("import", input=self.started(name), output=start)
        balance = {"moe_aux_loss_coeff": "0.01"} if name == "experts" else {}
        self.verb("train", input=start, output=run, lr="2e-3", min_lr="2e-4", **self.data(self.steps), **balance)
        return run / "weights"

    def data(self, steps: int) -> dict[str, Any]:
        """Options of everything that learns."""
        batch = {"seq_length": LENGTH, "global_batch_size": 16, "micro_batch_size": 16, "save_interval": steps}
        return {"data": self.work / "tokens", "train_iters": steps, "lr_warmup_iters": steps // 20, **batch}

    def quality(self, model: Path) -> float:
        """Perplexity of the held-out documents."""
        output = model.with_name(f"{model.name}.perplexity.json")
        windows = {"window": LENGTH, "windows": WINDOWS}
        self.verb("evaluate", input=model, text=self.held_out, output=output, **windows)
        return float(json.loads(output.read_text())["perplexity"])

    def recovered(self, model: Path, seed: int = 0) -> float:
        """The same after some training."""
        run = model.with_name(f"{model.name}_recovered_{seed}")
        self.verb("train", input=model, output=run, lr="5e-4", min_lr="5e-5", seed=seed, **self.data(self.more))
        return self.quality(run / "weights")

    def kept(self, row: Row) -> bool:
        """Whether all of a row was done."""
        ends = [f"{folder}_trimmed_recovered_{self.seeds[-1]}" for folder in row.folders()]
        if len(ends) > 1:
            ends = [f"{folder}_trimmed_recovered_{self.seeds[0]}" for folder in row.folders()]
        return all((self.work / end / "weights.perplexity.json").exists() for end in ends)

    def line(self, row: Row) -> list[Any]:
        """Prune, trim, evaluate, recover."""
        text = {"calibration": self.work / "training.jsonl", "calibration_samples": 256}
        text = {} if row.method == "magnitude" else text | {"calibration_seq_length": LENGTH}
        before, after, sizes = [], [], [0, 0]
        for options, folder in zip(row.options, row.folders(), strict=True):
            run = self.work / folder
            self.verb("prune", *options, input=self.dense, output=run, method=row.method, target=row.target, **text)
            small = self.trimmed(run)
            sizes = counted(small)
            before.append(self.quality(small))
            after += [self.recovered(small, seed) for seed in (self.seeds if len(row.options) == 1 else self.seeds[:1])]
        return [row.name, *sizes, geometric(before), geometric(after), round(min(after), 2), round(max(after), 2)]


def geometric(values: list[float]) -> float:
    """Perplexities are averaged as losses are."""
    return round(math.exp(fmean(map(math.log, values))), 2)


def counted(model: Path) -> list[int]:
    """Parameters, and those that a token meets."""
    from megatron_prune.model.checkpoint import read_description
    from megatron_prune.model.cost import active_parameters, parameters

    config = read_description(model).config
    return [parameters(config), active_parameters(config)]


def main() -> None:
    """Train, prune, recover, and write the result file."""
    steps = option("--steps", type=int, default=1200, help="of the whole models")
    more = option("--more", type=int, default=60, help="of the pruned ones")
    only = option("--only", type=int, nargs="+", help="do just these rows, from 0, without a result file")
    seeds = option("--seeds", type=int, nargs="+", default=[0, 1], help="of the order of the data in recovery")
    kept = option("--kept", action="store_true", help="write the rows whose runs are in the work folder, and run none")
    given = arguments(__doc__, SHARED, steps, more, work("runs/experts"), only, seeds, kept)
    bench = Mixture(given)
    bench.write_texts()
    if given.only:
        for number in given.only:
            print(bench.line(ROWS[number]), flush=True)
        return
    rows: list[list[Any]] = []
    for name, title in (("dense", "a dense model of that size"), ("experts", "16 experts, 4 for each token")):
        model = bench.learned(name)
        longer = [bench.recovered(model, seed) for seed in given.seeds]
        spread = [round(min(longer), 2), round(max(longer), 2)]
        rows.append([title, *counted(model), round(bench.quality(model), 2), geometric(longer), *spread])
    rows += [bench.line(row) for row in ROWS if not given.kept or bench.kept(row)]
    protocol = (
        f"Models of 6 layers of 128, {given.steps} steps of 16 x {LENGTH} tokens of the training mix; perplexity of "
        f"{WINDOWS} windows of {LENGTH} of documents held out, a vocabulary of {VOCABULARY}. Calibration: 256 windows. "
        f"Recovery: {given.more} more steps for every row, whole models too, data in {len(given.seeds)} orders; of "
        f"random experts, over {len(CHOICES)} choices. 2:4: all linears of attention and experts, half of whose "
        "weights are zero."
    )
    write_result("experts", given, COLUMNS, rows, protocol)


if __name__ == "__main__":
    main()
