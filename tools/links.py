"""Links of the repository's Markdown, for readers who are elsewhere: the package index and the documentation's site.

Pages link to files by relative paths, which work in a checkout and on a forge. Elsewhere such a link becomes one to the
repository, where pyproject.toml has its address (`[project.urls]`, `Repository`), and otherwise words: text and path.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^ *(```|~~~)")
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^()\s]+)\)")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|/")


@dataclass(frozen=True)
class Link:
    """A link to a file of the repository."""

    path: str
    """From the root of the repository."""
    anchor: str
    """Empty, or begins with #."""
    text: str
    picture: bool

    def at_repository(self, address: str, revision: str) -> str:
        """The same link to the repository's files at a revision."""
        kind, mark = ("raw", "!") if self.picture else ("blob", "")
        return f"{mark}[{self.text}]({address}/{kind}/{revision}/{self.path}{self.anchor})"

    def in_words(self) -> str:
        """Where it cannot be followed: what it is called, and where that is; nothing of a picture."""
        if self.picture:
            return ""
        known = self.text.strip("`") in (self.path, posixpath.basename(self.path))
        return f"`{self.path}`" if known else f"{self.text} (`{self.path}`)"


def repository(root: Path = ROOT) -> str | None:
    """The address of the project's repository; None while it has none."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project.get("urls", {}).get("Repository")
    return None if address is None else str(address).rstrip("/")


def replaced(text: str, page: str, answer: Callable[[Link], str | None]) -> str:
    """The text of a page, a path from the root of the repository, with its links to files as `answer` has them.

    None leaves a link as it is. Code blocks stay.
    """

    def one(found: re.Match[str]) -> str:
        path, sign, anchor = found["target"].partition("#")
        if not path or _ELSEWHERE.match(path):
            return found[0]
        full = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        other = answer(Link(full, sign + anchor, found["text"], bool(found["picture"])))
        return found[0] if other is None else other

    lines, fence = text.split("\n"), ""
    for at, line in enumerate(lines):
        mark = _FENCE.match(line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        elif not fence:
            lines[at] = _LINK.sub(one, line)
    return "\n".join(lines)


def long_description(text: str, address: str | None, revision: str) -> str:
    """README.md as the package index shows it: no link there may be relative."""

    def answer(link: Link) -> str:
        return link.in_words() if address is None else link.at_repository(address, revision)

    return re.sub(r"\n{3,}", "\n\n", replaced(text, "README.md", answer))
