"""The documentation as a site: it is built strictly, whole and local, and says what the code and the pages say."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import megatron_prune
from megatron_prune import helping
from megatron_prune.verbs import VERBS
from tools.links import Link

pytest.importorskip("material", reason="mkdocs-material is not installed (pip install 'megatron-prune[docs]')")

from tools import site_hooks

ROOT = Path(__file__).resolve().parents[3]
COUNTED = ("h1", "h2", "h3", "h4", "ul", "ol", "li", "table", "tr", "td", "pre", "img", "strong", "em")
"""Of a page: when these are as many, it reads alike on a forge and in the site. Code: links to files are code there."""
PAGES = {f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))} | site_hooks.beside()


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """mkdocs, as CONTRIBUTING.md has it."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, env=clean, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


class Seen(HTMLParser):
    """Of a page: its elements, anchors, what it loads and what it leads to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.anchors: set[str] = {""}
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] += 1
        self.anchors.add(found.get("id") or "")
        self.linked += [found["href"] or ""] if tag == "a" and "href" in found else []
        self.loaded += [found["href"] or ""] if tag == "link" else []
        self.loaded += [found["src"] or ""] if "src" in found else []


def article(path: Path) -> str:
    """What a page of the site says, without menus."""
    (found,) = re.findall(r"<article[^>]*>(.*?)</article>", path.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path.resolve(): Seen(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > len(PAGES)
    for path, page in pages.items():
        if path.name == "404.html":  # shown at any address: its links begin at the root of the server
            continue
        for link in page.loaded + page.linked:
            outside = link.startswith(("https://", "mailto:"))
            assert not (outside and link in page.loaded), f"{path.name} loads {link}"
            target, _, anchor = link.partition("#")
            if not outside:
                there = (path.parent / target).resolve() if target else path
                there = there / "index.html" if there.is_dir() else there
                assert there.is_file(), f"{path.name} leads to {link}"
                assert there not in pages or anchor in pages[there].anchors, f"{path.name} leads to {link}"


def test_styles_load_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*", path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_reads_alike_on_a_forge_and_in_the_site(site: Path, page: str) -> None:
    """By a second reader of Markdown: what one takes for a list or a table, the other does not take for a paragraph."""
    forge = Seen(MarkdownIt("commonmark").enable("table").render((ROOT / page).read_text(encoding="utf-8"))).tags
    here = Seen(article((site / PAGES[page]).with_suffix(".html"))).tags
    assert {tag: here[tag] for tag in COUNTED} == {tag: forge[tag] for tag in COUNTED}


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_of_every_command_is_in_the_reference(site: Path, verb: str) -> None:
    told = helping.text(VERBS[verb].config, "p", everything=True)
    flags = set(re.findall(r"^  (--[a-z][\w-]*)", told, re.MULTILINE)) - {"--config"}
    sections = re.split(r'<h2 id="', article(site / "reference" / "commands.html"))
    (section,) = [part for part in sections if part.startswith(f'{verb}"')]
    rows = re.findall(r"<tr>\s*<td><code>(--[\w-]+)</code></td>", section)
    assert sorted(rows) == sorted(flags) and len(set(rows)) == len(rows)


@pytest.mark.parametrize(
    ("flag", "cells"),
    [
        ("--calibration-samples", "<code>N</code> <code>128</code>"),
        ("--target", "<code>VALUE</code> required"),
        ("--lr-decay-style", "<code>cosine</code>, <code>linear</code>, <code>constant</code> <code>cosine</code>"),
        ("--percdamp", "<code>0.01</code> damping, as a share of the mean diagonal of the Hessian"),
        ("--update-weights", "<code>true</code> change the weights that stay, to make up for those removed"),
    ],
)
def test_the_reference_says_values_and_defaults(site: Path, flag: str, cells: str) -> None:
    rows = re.findall(rf"<td><code>{flag}</code></td>(.*?)</tr>", article(site / "reference/commands.html"), re.DOTALL)
    assert rows and any(" ".join(re.sub(r"</?td>", " ", row).split()).startswith(cells) for row in rows)


def test_every_name_of_the_python_api_is_in_the_reference(site: Path) -> None:
    text = article(site / "reference" / "python.html")
    titles = set(re.findall(r'<h2 id="(\w+)"', text))
    assert titles == {name.lower() for name in megatron_prune.__all__ if name != "__version__"}
    words = html.unescape(re.sub(r"<[^>]+>", "", text))
    assert "megatron_prune.prune_model(\n    model: PreTrainedModel,\n    tokenizer: PreTrainedTokenizerBase" in words
    assert "calibration_samples: int = 128," in words and ") -> Path" in words


def test_a_page_that_leads_nowhere_fails(tmp_path: Path) -> None:
    for name in ("docs", "tools", "megatron_prune", "examples", "docker"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "mkdocs.yml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    for name in ("LICENSE", "benchmarks", "SECURITY.md", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    mistakes = "[a](no_page.md), [b](install.md#no-anchor), [c](../tools/no_tool.py)"
    (tmp_path / "docs" / "new.md").write_text(f"# New\n\n{mistakes}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1 and done.stderr.count("WARNING") == 4, done.stderr
    for part in ("no_page.md", "#no-anchor", "tools/no_tool.py", "- new.md"):
        assert part in done.stderr


@pytest.mark.parametrize(
    ("path", "address", "link"),
    [
        ("docs/masks.md", None, "[t](../masks.md#a)"),
        ("README.md", None, "[t](../index.md#a)"),
        ("examples/tpu/README.md", None, "[t](tpu.md#a)"),
        ("tools/links.py", None, "t (`tools/links.py`)"),
        ("tools/links.py", "https://example.org/r", "[t](https://example.org/r/blob/HEAD/tools/links.py#a)"),
    ],
)
def test_links_to_files_of_the_repository(path: str, address: str | None, link: str) -> None:
    made = site_hooks.in_site(Link(path, "#a", "t", False), "examples/recovery.md", site_hooks.beside(), address)
    assert made == link
