"""Text by name: data sets of the hub that are drawn from once, and kept in the user's cache as lines of JSON.

`c4`, `wikitext2` and `fineweb-edu` are short for data sets; `hub:NAME[:CONFIG[:SPLIT]]` is any, its documents under
`text`. Streamed and shuffled in a buffer, by the seed, so that the first documents are no single site's. WikiText-2's
lines are joined to one document, as SparseGPT and Wanda have it. `sample` is text that comes with this package, of
public domain: enough to try a method without a network, and nothing to judge one by.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_prune.data.dataset import cache_folder
from megatron_prune.data.pieces import HUB, check_hub, open_hub
from megatron_prune.data.text import TEXT, BadDocument, Form
from megatron_prune.errors import UserError, brief
from megatron_prune.files import new_file
from megatron_prune.foreign import fenced
from megatron_prune.log import say
from megatron_prune.ranks import by_leader

NAMED = {
    "c4": f"{HUB}allenai/c4:en:train",
    "wikitext2": f"{HUB}Salesforce/wikitext:wikitext-2-raw-v1:train",
    "fineweb-edu": f"{HUB}HuggingFaceFW/fineweb-edu:sample-10BT:train",
}
JOINED = ("wikitext2",)
"""Whose rows are lines of one text."""
SAMPLE = "sample"
KEY = TEXT.key
FEWEST = 1024
"""Documents that are fetched at least."""
EACH = 16
"""Documents for each window: some are shorter than a window."""
BUFFER = 10_000
"""Documents that are shuffled together."""
GIVEN = "--calibration"
ADVICE = "give text files, or --calibration sample, which comes with the package"


def is_named(text: str) -> bool:
    """Whether a word names text in place of a file; a file of that name comes first."""
    return (text in NAMED or text == SAMPLE or text.startswith(HUB)) and not Path(text).exists()


def named_files(paths: Sequence[Path], windows: int, seed: int, form: Form = TEXT) -> tuple[Path, ...]:
    """The same with a file in place of each name; `windows` are to be drawn. Collective.

    UserError, in one line, where the network or the data set is not there.
    """
    return tuple(_file(str(path), windows, seed, form) if is_named(str(path)) else path for path in paths)


def _file(name: str, windows: int, seed: int, form: Form) -> Path:
    if form is not TEXT and not name.startswith(HUB):
        raise UserError(
            f"--apply-chat-template: --calibration {name} is plain text; allowed: files of rows with messages, or "
            f"{HUB}NAME[:CONFIG[:SPLIT]] of a data set of them, such as {HUB}HuggingFaceH4/ultrachat_200k::train_sft"
        )
    if name == SAMPLE:
        return Path(str(files("megatron_prune.data") / "sample.txt"))
    count = max(FEWEST, EACH * windows)
    source = NAMED.get(name, name)
    rows = "" if form is TEXT else f":{form.keys}"
    key = hashlib.sha256(f"{source}:{count}:{seed}{rows}".encode()).hexdigest()[:16]
    place = cache_folder() / f"{name.removeprefix(HUB).replace('/', '_').replace(':', '_')[:80]}-{key}.jsonl"

    def fetch() -> None:
        if not place.exists():
            _fetch(name, source, count, seed, place, form)

    by_leader(fetch)
    return place


def _fetch(name: str, source: str, count: int, seed: int, place: Path, form: Form) -> None:
    check_hub(source, GIVEN, ADVICE)
    say(f"{name}: fetching {count} documents into {place.name} of the cache")
    with fenced(f"--calibration {name}: {source} cannot be streamed", ADVICE):
        rows = open_hub(source, GIVEN, ADVICE)
        if name not in JOINED:
            rows = rows.shuffle(seed=seed, buffer_size=BUFFER)
        taken = list(itertools.islice(rows, None if name in JOINED else count))
    found = list(filter(None, (_kept(row, form) for row in taken)))
    if not found:
        what, keys = "text" if form is TEXT else "messages", " or ".join(map(brief, form.keys))
        raise UserError(f"--calibration {name}: no {what} under the key {keys} in {source}: {ADVICE}")
    documents = [{KEY: "\n\n".join(row[KEY] for row in found)}] if name in JOINED else found
    place.parent.mkdir(parents=True, exist_ok=True)
    with new_file(place, "cached text") as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")


def _kept(row: dict[str, Any], form: Form) -> dict[str, Any] | None:
    """What a form reads of a row; None where it reads nothing."""
    try:
        form.document(row)
    except BadDocument:
        return None
    return {key: row[key] for key in form.keys if row.get(key) is not None}
