"""Takes a transformers model and its tokenizer that are in memory and gets them back pruned.

    python examples/python_api/prune_in_memory.py MODEL TEXT.jsonl OUTPUT

MODEL is a directory that `from_pretrained` opens, TEXT.jsonl has a document under "text" in each line. Cell by cell it
is a notebook: progress is shown there, too.
"""

# %% what you have: a model, a tokenizer, some text
import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_prune as mp

source, text, output = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(source)
tokenizer = AutoTokenizer.from_pretrained(source)
texts = [json.loads(line)["text"] for line in Path(text).read_text(encoding="utf-8").splitlines()]

# %% the pruned model: two of every four weights are zero, those that stay make up for them
pruned = mp.prune_model(
    model,
    tokenizer,
    method="sparsegpt",
    target="2:4",
    texts=texts,
    calibration_samples=16,
    calibration_seq_length=128,
)

# %% it is an ordinary transformers model
pruned.save_pretrained(output)
tokenizer.save_pretrained(output)

# %% and the verbs are functions, too: proof that every group of four has its two zeros, and what they cost
mp.verify(output, target="2:4")
for path in (source, output):
    mp.evaluate(path, text=text, window=128, windows=8)
