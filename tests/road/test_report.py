"""The `report` verb on runs made by the other verbs: what it says, and that its page works in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune.__main__ import main
from megatron_prune.log import left_start, read_metrics
from megatron_prune.reporting.collect import collect
from megatron_prune.version import VERSION
from tests.models import byte_tokenizer, tiny_llama, words
from tests.tasks import write_tasks

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COMMANDS = (
    "import --input hf --output dense",
    "prune --input dense --output learned --method maskllm --target 2:4 --data words.jsonl --seq-length 16 "
    "--global-batch-size 2 --train-iters 4 --eval-data words.jsonl --eval-windows 2 --eval-interval 2",
    "trim --input learned --output sparse",
    "export --input sparse --output exported",
    "prune --input dense --output narrow --method minitron --target num_layers=1,ffn_hidden_size=32 "
    "--calibration words.jsonl --calibration-samples 4 --calibration-seq-length 16",
    "evaluate --input dense --text text.txt --window 16 --windows 2 --output dense.json",
    "evaluate --input exported --text text.txt --window 16 --windows 2 --output exported.json",
    "evaluate --input exported --dense dense --tasks choices --tasks-folder tasks --output tasks.json",
    "verify --input exported --target 2:4 --output verified.json",
    "bench --input exported --batch-sizes 1 2 --prompt-length 8 --new-tokens 2 --repeats 1 --output bench.json",
)
INPUTS = "learned narrow dense exported dense.json exported.json tasks.json verified.json bench.json".split()


def at(root: Path, command: str) -> list[str]:
    """The words of a command, names of files and folders placed in `root`."""
    names = {*INPUTS, "hf", "sparse", "words.jsonl", "text.txt", "tasks"}
    return [str(root / word) if word in names else word for word in command.split()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, models, results, and the page."""
    root = tmp_path_factory.mktemp("report")
    words(root / "words.jsonl")
    write_tasks(root / "tasks")
    byte_tokenizer(tiny_llama(root / "hf", vocab_size=257))
    (root / "text.txt").write_text("words of a text that is long enough for two windows of sixteen bytes")
    for command in COMMANDS:
        assert main(at(root, command)) == 0, command
    title = "<b>of & by"
    assert main(["report", *at(root, " ".join(INPUTS)), "--output", str(root / "page.html"), "--title", title]) == 0
    return root


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "page.html").read_text(encoding="utf-8")


def test_the_page_is_alone_and_escapes_what_it_is_given(page: str) -> None:
    assert "<b>of" not in page and "&lt;b&gt;of &amp; by" in page
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not re.search(r"url\((?!#)", page) and "default-src 'none'" in page


def test_its_numbers_are_those_of_the_files(root: Path, page: str) -> None:
    dense, pruned = (json.loads((root / name).read_text())["perplexity"] for name in ("dense.json", "exported.json"))
    assert f'<td class="n">{dense:.4g}</td><td class="n">1.000</td>' in page
    assert f'<td class="n">{pruned:.4g}</td><td class="n">{pruned / dense:.3f}</td>' in page
    density = re.findall(r'class="n" style="[^"]*">([\d.]+)</td>', page)
    assert len(density) == 2 * 7 and set(density) == {"0.5000"}  # layers x matrices
    dense, pruned = json.loads((root / "tasks.json").read_text())["results"]
    assert f'<th class="n" data-sort>choices<br>{next(iter(dense["tasks"]["choices"]["metrics"]))}</th>' in page
    for model in (dense, pruned):
        scores = [f"{value:.4f}" for value in model["tasks"]["choices"]["metrics"].values()]
        row = page[page.index(f"<td>{Path(model['model']).name}</td>", page.index("Zero-shot tasks")) :]
        assert re.findall(r'class="n">([\d.]+) &plusmn;', row[: row.index("</tr>")]) == scores
    narrow = json.loads((root / "narrow" / "decision" / "trim.json").read_text())
    assert f"{narrow['parameters']:,} parameters" in page
    assert "verified.json</b>: verified" in page and "pattern 2:4 holds" in page


def test_results_come_first_with_version_and_date_and_no_folders_of_a_machine(root: Path, page: str) -> None:
    overview = page[page.index('id="overview"') : page.index('id="removed"')]
    dense = json.loads((root / "dense.json").read_text())["perplexity"]
    assert overview.index("Results") < overview.index(f"{dense:.4g}") < overview.index("<h2>Runs")
    scores = [
        next(iter(task["metrics"].values()))
        for task in json.loads((root / "tasks.json").read_text())["results"][0]["tasks"].values()
    ]
    assert f"{sum(scores) / len(scores):.4f}" in overview
    assert f"megatron_prune {VERSION}, 20" in page
    assert str(root) not in page and "input: dense" in page
    moved = left_start(read_metrics(root / "learned"))
    assert moved is not None
    assert f"{100 * moved:.2f}%" in overview and "share of the groups that left their start" in page
    assert ("no group has left its start" in overview) == (moved == 0)


def test_many_weights_that_stay_dense_are_counted(root: Path, tmp_path: Path) -> None:
    """In the table; the run's configuration names them."""
    dense = "+".join(f"layers.{n}.self_attn.{part}_proj.weight" for n in (0, 1) for part in "qko")
    asked = ["--method", "magnitude", "--target", f"2:4,dense={dense}"]
    assert main(["prune", "--input", str(root / "dense"), "--output", str(tmp_path / "run"), *asked]) == 0
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<td>2:4,dense=6 weights</td>" in page and page.count("layers.1.self_attn.q_proj.weight&#43;") <= 1


def test_the_picture_shows_the_neurons_that_stay(root: Path, page: str) -> None:
    from PIL import Image

    (run,) = collect([root / "narrow"]).runs
    assert run.removed is not None
    (layer,), (block,) = run.removed.units.layers, run.removed.units.blocks
    image = re.search(r'src="data:image/png;base64,([^"]+)"[^>]*alt="MLP neurons of narrow"', page)
    assert image is not None
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image[1]))))
    blue = (pixels == (31, 119, 180)).all(-1)
    assert blue.shape == (2, 64) and not blue[1 - layer].any()
    assert np.flatnonzero(blue[layer]).tolist() == list(block.ffn)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any, root: Path) -> Iterator[Any]:
    """The page, opened; errors of its script and requests to anywhere fail the test."""
    tab = browser.new_page()
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    tab.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url))
    tab.goto((root / "page.html").as_uri())
    yield tab
    assert wrong == []
    tab.close()


def test_every_tab_opens_its_section_alone(tab: Any) -> None:
    sections = [section.get_attribute("id") for section in tab.query_selector_all("section")]
    assert len(sections) == 6
    for name in [*sections[1:], sections[0]]:
        tab.click(f"[data-tab={name}]")
        assert [s.get_attribute("id") for s in tab.query_selector_all("section") if s.is_visible()] == [name]


def test_a_run_can_be_hidden_in_all_curves(tab: Any) -> None:
    tab.click("[data-tab=training]")
    titles = tab.locator("figcaption").all_inner_texts()
    assert any("loss" in title for title in titles) and any("entropy" in title for title in titles)
    lines = tab.locator('[id="run-0-line"]')
    assert lines.count() == len(titles)
    tab.uncheck('[data-run="0"]')
    assert not any(lines.nth(number).is_visible() for number in range(len(titles)))
    tab.check('[data-run="0"]')
    assert all(lines.nth(number).is_visible() for number in range(len(titles)))


def test_a_click_on_a_heading_sorts(tab: Any) -> None:
    tab.click("[data-tab=quality]")
    column = tab.locator("#quality tbody tr td:nth-child(5)")
    for rising in (True, False):
        tab.click("#quality th:nth-child(5)")
        values = [float(text) for text in column.all_inner_texts()]
        assert values == sorted(values, reverse=not rising) and len(values) == 2


def test_pictures_are_drawn(tab: Any) -> None:
    tab.click("[data-tab=removed]")
    assert tab.locator("img.units").count() == 4
    assert all(width > 0 for width in tab.eval_on_selector_all("img.units", "all => all.map(i => i.naturalWidth)"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("report --output {new}", "no run given"),
        (
            "report {root}/words.jsonl --output {new}",
            "run folders, Megatron checkpoints, Hugging Face directories and results of verbs",
        ),
        (
            "report {root}/nothing --output {new}",
            "run folders, Megatron checkpoints, Hugging Face directories and results of verbs",
        ),
        ("report {root}/hf/config.json --output {new}", "no result of evaluate, verify or bench"),
        ("report {root}/learned --output {root}/page.html", "already exists"),
        ("inspect {root}/learned {root}/learned", "allowed here: INPUT"),
    ],
)
def test_mistakes_are_one_line(root: Path, given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    new = root / "new.html"
    assert main(given.format(root=root, new=new).split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and not new.exists()


def test_a_run_that_is_still_learning_is_shown(root: Path) -> None:
    """Its last line of metrics may be half-written; a damaged line before it is an error."""
    run = root / "unfinished"
    run.mkdir()
    about = json.loads((root / "learned" / "run.json").read_text()) | {"state": "learning"}
    (run / "run.json").write_text(json.dumps(about))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    (found,) = collect([run]).runs
    assert [line["step"] for line in found.metrics] == [1, 2]
    assert main(["report", str(run), "--output", str(root / "unfinished.html")]) == 0
    (run / "metrics.jsonl").write_text('{"step": 1, "lo\n{"step": 2, "loss": 2.0}\n')
    assert main(["report", str(run), "--output", str(root / "damaged.html")]) == 2
