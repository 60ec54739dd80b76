"""What mkdocs does beyond its own for the documentation's site (mkdocs.yml names this file).

Pages of the repository outside of docs/ become pages of the site, the reference is made from the code, and links to
other files lead to the repository where pyproject.toml has its address, else they are words.
"""

from __future__ import annotations

import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import links, site_reference  # noqa: E402

log = logging.getLogger("mkdocs.hooks.site")
BESIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docker/README.md": "containers.md",
}
"""Page of the repository -> page of the site; those of examples/ besides, and docs/ as it is."""
MADE = {"reference/commands.md": site_reference.commands, "reference/python.md": site_reference.python}
"""Page of the site -> what writes it."""
REVISION = "HEAD"


def beside() -> dict[str, str]:
    """Every page from outside of docs/: its path in the repository -> that in the site."""
    recipes = sorted((ROOT / "examples").glob("*/README.md"))
    return BESIDE | {f"examples/{path.parent.name}/README.md": f"examples/{path.parent.name}.md" for path in recipes}


def slug(title: str, separator: str) -> str:
    """The anchor of a heading, as forges make it."""
    return re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The anchors, and a link to the repository where it has an address."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    config.repo_url = config.repo_url or links.repository()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that docs/ does not hold."""
    for path, page in beside().items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for page, written in MADE.items():
        files.append(File.generated(config, page, content=written()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Links as the site has them."""
    here = page.file.src_uri
    if here in MADE:
        return markdown
    pages = beside()
    where = {site: path for path, site in pages.items()}.get(here, f"docs/{here}")
    return links.replaced(markdown, where, lambda link: in_site(link, here, pages, config.repo_url))


def in_site(link: links.Link, here: str, pages: dict[str, str], address: str | None) -> str | None:
    """A link of the page `here`; a warning, and so an error of a strict build, when it leads to nothing."""
    site = pages.get(link.path)
    if site is None and link.path.startswith("docs/") and link.path.endswith((".md", ".png", ".svg")):
        site = link.path.removeprefix("docs/")
    if site is not None:
        mark = "!" if link.picture else ""
        return f"{mark}[{link.text}]({posixpath.relpath(site, posixpath.dirname(here))}{link.anchor})"
    if link.path.startswith("..") or not (ROOT / link.path).exists():
        log.warning("%s: a link leads to %s, which does not exist", here, link.path)
    return link.in_words() if not address else link.at_repository(address, REVISION)
