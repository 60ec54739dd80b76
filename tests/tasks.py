"""Small tasks for tests: a multiple choice with its definition, WikiText in three pages, rows of the public tasks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

STOCK = "the cat saw a dog and it ran home to play with Lily in the park because she was happy".split()
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {validation: choices.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{question}}"
doc_to_choice: answers
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


def write_tasks(folder: Path, items: int = 12) -> Path:
    """`choices`, and the text for the package's `wikitext`; one question is empty, one ends with a space."""
    folder.mkdir(parents=True)
    generator = random.Random(0)

    def say(longest: int) -> str:
        return " ".join(generator.choices(STOCK, k=generator.randint(1, longest)))

    rows = [
        {"question": say(14), "answers": [say(4) for _ in range(4)], "right": number % 4} for number in range(items)
    ]
    rows[1]["question"], rows[2]["question"] = "", rows[2]["question"] + " "
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choices.yaml").write_text(CHOICES)
    pages = [f" = {name} = \n \n {say(40)} . \n = = Part = = \n {say(40)} . \n \n" for name in ("One", "Two", "Three")]
    (folder / "wiki.test.raw").write_text(" \n" + "".join(pages))
    return folder


PUBLIC_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "hellaswag": ("hellaswag_val.jsonl", {"query": "Tea: A man", "endings": ["sits.", "ran."], "label": 1}),
    "piqa": ("piqa_val.jsonl", {"goal": "Cut", "sol1": "knife", "sol2": "spoon", "label": 0}),
    "winogrande": (
        "winogrande_xl_val.jsonl",
        {"sentence": "The cup fell, so the _ broke.", "option1": "cup", "option2": "floor", "answer": "1"},
    ),
    "boolq": ("boolq_val.jsonl", {"passage": "Ice is cold.", "question": "is ice cold", "answer": True}),
    "arc_easy": (
        "arc_easy_val.jsonl",
        {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"},
    ),
    "arc_challenge": (
        "arc_challenge_test.jsonl",
        {"query": "Question: Hot?\nAnswer:", "choices": ["ice", "fire"], "gold": 1},
    ),
    "openbookqa": (
        "openbookqa_test.jsonl",
        {"query": "Question: Predators eat\nAnswer:", "choices": ["grass", "bunnies"], "gold": 1},
    ),
    "rte": ("rte_val.jsonl", {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}),
}
"""File and a row of each of the package's own multiple-choice tasks."""
EXPECTED: dict[str, list[tuple[str, str]]] = {
    "hellaswag": [("Tea: A man", " sits."), ("Tea: A man", " ran.")],
    "piqa": [("Question: Cut\nAnswer:", " knife"), ("Question: Cut\nAnswer:", " spoon")],
    "winogrande": [
        ("The cup fell, so the cup", " broke."),
        ("The cup fell, so the floor", " broke."),
    ],
    "boolq": [
        ("Ice is cold.\nQuestion: is ice cold?\nAnswer:", " no"),
        ("Ice is cold.\nQuestion: is ice cold?\nAnswer:", " yes"),
    ],
    "arc_easy": [("Question: Hot?\nAnswer:", " ice"), ("Question: Hot?\nAnswer:", " fire")],
    "arc_challenge": [("Question: Hot?\nAnswer:", " ice"), ("Question: Hot?\nAnswer:", " fire")],
    "openbookqa": [("Predators eat", " grass"), ("Predators eat", " bunnies")],
    "rte": [
        ("It rains.\nQuestion: It is wet. True or False?\nAnswer:", " True"),
        ("It rains.\nQuestion: It is wet. True or False?\nAnswer:", " False"),
    ],
}
"""What the harness's public tasks of these names ask of such a row: contexts and continuations."""


def write_public_rows(folder: Path) -> Path:
    """One row of each of the package's own tasks."""
    folder.mkdir(parents=True)
    for file, row in PUBLIC_ROWS.values():
        (folder / file).write_text(json.dumps(row) + "\n")
    return folder
