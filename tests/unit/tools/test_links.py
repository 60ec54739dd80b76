"""Links of README.md where the repository's files are not: they lead to the repository, or say what they led to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import links

PAGE = """# Title

See [the page](docs/a.md#part), [`b.md`](docs/b.md), [up](#title) and [there](https://example.org/x).

![a picture](docs/images/c.png)

```console
$ echo [not a link](docs/a.md)
```
"""


def test_without_an_address_links_are_words() -> None:
    found = links.long_description(PAGE, None, "v1")
    assert "See the page (`docs/a.md`), `docs/b.md`, [up](#title) and [there](https://example.org/x).\n\n```" in found
    assert "$ echo [not a link](docs/a.md)" in found and "picture" not in found


def test_with_an_address_they_lead_to_the_version() -> None:
    found = links.long_description(PAGE, "https://example.org/repo", "v1")
    assert "[the page](https://example.org/repo/blob/v1/docs/a.md#part)" in found
    assert "![a picture](https://example.org/repo/raw/v1/docs/images/c.png)" in found
    assert "$ echo [not a link](docs/a.md)" in found


@pytest.mark.parametrize(
    ("page", "target", "path"),
    [
        ("docs/x.md", "../tools/y.py", "tools/y.py"),
        ("README.md", "LICENSE", "LICENSE"),
        ("a/b/c.md", "d.md", "a/b/d.md"),
    ],
)
def test_paths_count_from_the_root(page: str, target: str, path: str) -> None:
    seen = []
    assert links.replaced(f"[t]({target}#z)", page, seen.append) == f"[t]({target}#z)"
    assert seen == [links.Link(path, "#z", "t", False)]


@pytest.mark.parametrize(
    ("lines", "address"), [("", None), ('[project.urls]\nRepository = "https://x.org/r/"', "https://x.org/r")]
)
def test_the_address_is_pyprojects(tmp_path: Path, lines: str, address: str | None) -> None:
    (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "x"\n{lines}\n')
    assert links.repository(tmp_path) == address
