"""Sheared LLaMA's masks over thousands of steps, on a model that a processor trains so long: stories260K.

    python benchmarks/sheared.py --model HF_DIRECTORY --shared ../shared

Two domains: stories that the dense model tells itself, and C4, which it knows little of. Masks and weights train
together, with the shares of the domains following their held-out losses (dynamic batch loading), then the smaller model
goes on alone. Beside it, at equal cost in CPU seconds: Minitron's width pruning to the same shape, and training on the
same text. What is kept in `--work` is not done again. The result also has, along the steps, the sparsities asked for
and expected, the multipliers and the domains' shares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.results import MODEL, SHARED, arguments, option, work, write_result
from bench.running import Times
from bench.study import C4_TRAINING, Study

SHAPE = "ffn_hidden_size=100,num_attention_heads=4,num_query_groups=2"
LENGTH, BATCH = 128, 16
STORIES, HELD_OUT = 2900, 172
"""Stories told for training and for evaluation."""
DOMAINS = ("stories", "c4")
TRAINING = {"seq_length": LENGTH, "global_batch_size": BATCH, "micro_batch_size": BATCH, "lr": "1e-3", "min_lr": "1e-4"}


def tell_stories(model: Path, folder: Path) -> None:
    """Write stories of 256 tokens that the model tells, sampled, for training and held out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    told: list[str] = []
    while len(told) < STORIES + HELD_OUT:
        start = torch.full((256, 1), tokenizer.bos_token_id)
        tokens = network.generate(start, do_sample=True, max_new_tokens=255, min_new_tokens=255, pad_token_id=0)
        told += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    write(folder / "stories", told[:STORIES], told[STORIES : STORIES + HELD_OUT])


def write(name: Path, training: list[str], held_out: list[str]) -> None:
    """One domain: documents to learn from, and held out ones, also as plain text to evaluate on."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in held_out)
    name.with_name(name.name + "_held_out.jsonl").write_text(lines)
    name.with_name(name.name + "_held_out.txt").write_text("\n\n".join(held_out))
    name.with_suffix(".jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in training))


class Shearing(Study):
    """The runs, and what they are evaluated on."""

    def write_texts(self, model: Path) -> None:
        """Both domains, unless they are there."""
        if not (self.work / "stories.jsonl").exists():
            tell_stories(model, self.work)
        documents = [json.loads(line)["text"] for line in self.texts.c4.read_text(encoding="utf-8").splitlines()]
        write(self.work / "c4", documents[:C4_TRAINING], documents[-200:])

    def loss(self, model: Path, domain: str) -> float:
        """Held-out loss in nats a token: 200 windows of LENGTH tokens."""
        output = model.with_name(f"{model.name}.{domain}.json")
        text = self.work / f"{domain}_held_out.txt"
        self.verb("evaluate", input=model, text=text, output=output, window=LENGTH, windows=200)
        return float(json.loads(output.read_text())["loss"])

    def data(self, steps: int, targets: list[float]) -> dict[str, Any]:
        """Options of everything that learns."""
        return {
            "data": [self.work / f"{domain}.jsonl" for domain in DOMAINS],
            "eval_data": [self.work / f"{domain}_held_out.jsonl" for domain in DOMAINS],
            "domain_targets": targets,
            "domain_interval": max(1, steps // 40),
            "eval_interval": max(1, steps // 10),
            "train_iters": steps,
            "lr_warmup_iters": steps // 20,
            **TRAINING,
        }

    def row(self, name: str, model: Path, steps: int, cost: float) -> list[Any]:
        """One line of the table."""
        losses = [round(self.loss(model, domain), 3) for domain in DOMAINS]
        return [name, steps, steps * LENGTH * BATCH, round(cost), *losses]


def curves(run: Path, points: int = 40) -> dict[str, list[Any]]:
    """Of a run's metrics, at about so many steps: everything about sparsity, multipliers, shares and losses."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    words = ("sparsity", "multiplier", "domain_", "eval_loss")
    found: dict[str, list[Any]] = {}
    last = max(record["step"] for record in records)
    for record in records:
        for key, value in record.items():
            rare = key.startswith(("domain_", "eval_loss"))
            if key.startswith(("target_", *words)) and (rare or record["step"] % max(1, last // points) == 0):
                found.setdefault(key, []).append([record["step"], value])
    return found


def main() -> None:
    """Run everything and write the result file."""
    steps = option("--steps", type=int, default=2000, help="of masks and weights together")
    more = option("--more", type=int, default=1000, help="of the smaller model alone")
    given = arguments(__doc__, MODEL, SHARED, steps, more, work("runs/sheared"))
    bench = Shearing(given.work, given.shared)
    bench.write_texts(given.model)
    bench.imported(given.model)
    targets = [bench.loss(bench.dense, domain) for domain in DOMAINS]
    rows = [bench.row("dense", bench.dense, 0, 0)]

    def spent(cost: Times) -> float:
        return float(cost["cpu_s"])

    run, goal = given.work / "sheared", bench.data(given.steps, targets)
    cost = spent(bench.verb("prune", input=bench.dense, output=run, method="sheared_llama", target=SHAPE, **goal))
    small = bench.trimmed(run)
    rows.append(bench.row("sheared_llama, masks and weights", small, given.steps, cost))
    went_on = given.work / "sheared_more"
    alone = spent(bench.verb("train", input=small, output=went_on, **bench.data(given.more, targets)))
    rows.append(bench.row("and the smaller model alone", went_on / "weights", given.steps + given.more, cost + alone))

    cut = given.work / "minitron"
    text = {"calibration": bench.work / "stories.jsonl", "calibration_samples": 256, "calibration_seq_length": LENGTH}
    before = spent(bench.verb("prune", input=bench.dense, output=cut, method="minitron", target=SHAPE, **text))
    start = bench.trimmed(cut)
    rows.append(bench.row("minitron, the same shape", start, 0, before))
    equal = int((cost + alone - before) / alone * given.more)
    longer = given.work / f"minitron_{equal}"
    after = spent(bench.verb("train", input=start, output=longer, **bench.data(equal, targets)))
    rows.append(bench.row("minitron, then training", longer / "weights", equal, before + after))
    protocol = (
        f"stories260K to {SHAPE}: {bench.parameters(run)} parameters. Steps of {BATCH} x {LENGTH} tokens of stories "
        "that the dense model told and of C4; losses in nats a token of 200 held-out windows of 128. One seed."
    )
    columns = ["", "steps", "tokens", "CPU s", "loss, stories", "loss, C4"]
    write_result("sheared", given, columns, rows, protocol, curves={p.name: curves(p) for p in (run, went_on, longer)})


if __name__ == "__main__":
    main()
