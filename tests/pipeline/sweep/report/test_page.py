"""The report of made-up sweeps, read as text and opened in a browser."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.sweep.report import write_report
from pipeline.sweep.report.data import load_sweep
from tests.pipeline.sweep.sweeps import NASTY_QUESTION, RATIOS, SMALL, cells_with, make_sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a test asks of a page: its tags, and whether each that was opened is closed."""

    VOID = ("meta", "link", "input", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()


def test_the_page_is_whole_and_needs_nothing_else(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    loaded = [
        value
        for tag, attributes in page.tags
        if tag != "a"
        for name, value in attributes.items()
        if name in ("src", "href")
    ]
    assert loaded and all(link and link.startswith(("#", "data:")) for link in loaded)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link and link.startswith("#")} <= set(ids)
    assert len(text) < 5_000_000


def test_the_page_links_to_the_data_beside_it(folder: Path, tmp_path: Path) -> None:
    def targets(text: str) -> list[str | None]:
        return [attributes["href"] for tag, attributes in Page(text).tags if tag == "a"]

    found = targets((folder / "report.html").read_text())
    assert found == ["cells.parquet", "answers", "run.json", "report.md"]
    assert all((folder / str(name)).exists() for name in found)
    bare = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.1,), questions=8, gallery=False)
    shutil.rmtree(bare / "answers")
    assert "answers" not in targets(write_report(bare).read_text())


def test_the_first_thing_is_every_method_at_every_ratio(folder: Path) -> None:
    text = (folder / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    title = "ViTCoP and its rivals at equal budget: tiny &lt;model&gt; on &lt;held&gt;/q.jsonl"
    assert f"<title>{title}</title>" in text and f"<h1>{title}</h1>" in text
    body = text[text.index("<h1>") :]
    assert body.index("<table") < min(body.index(part) for part in ("<p", "<ul", "<figure", "<details"))
    table = body[: body.index("</table>")]
    assert all(f">{100 * ratio:g} %</th>" in table for ratio in RATIOS)
    rows = [attributes for tag, attributes in Page(table + "</table></div></div></div>").tags if tag == "tr"]
    (comparison,) = load_sweep(folder).comparisons
    assert [row["data-method"] for row in rows[1:]] == ["none", "one_frame", "text_only", *comparison.methods]


def test_what_is_out_of_reach_is_folded(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    place = text.index("Not reachable: ")
    assert text[:place].rstrip().endswith('<details class="caution"><summary>')


def test_a_cost_stands_beside_its_spread_and_is_marked_when_it_cannot_be_true(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.5,), questions=8, gallery=False)
    cells_with(folder, {"vitcop-0.5": {"cost_doubt": "rounds <disagree>", "speedup_doubt": "rounds <disagree>"}})
    text = write_report(folder).read_text()
    rows = {part.split('"')[0]: part[: part.index("</tr>")] for part in text.split('data-cell="')[1:]}
    assert re.search(r">\d+\.\d \[\d+\.\d, \d+\.\d\]</td>", rows["evs-0.5"]) and "doubt" not in rows["evs-0.5"]
    assert 'title="unreliable: rounds &lt;disagree&gt;"' in rows["vitcop-0.5"] and "] ?</td>" in rows["vitcop-0.5"]


def test_every_plot_is_in_the_page_and_a_picture(folder: Path) -> None:
    tags = Page((folder / "report.html").read_text()).tags
    figures = sum(tag == "figure" for tag, _ in tags)
    pictures = sorted((folder / "plots").glob("*.png"))
    assert figures == len(pictures) == 4 + 2 + 3 * 3
    for picture in pictures:
        with Image.open(picture) as image:
            assert np.asarray(image.convert("L")).std() > 5, f"{picture.name} is blank"


def test_text_from_the_data_stays_text(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert text.count("<script") == 1 and "&lt;script&gt;" in text
    assert NASTY_QUESTION not in text and "<i>two" not in text and "<b>two" not in text and "<all>" not in text
    assert "<model>" not in text and "tiny &lt;model&gt;" in text
    markdown = (folder / "report.md").read_text()
    assert "<model>" not in markdown.replace("\\<", "") and "<all>" not in markdown.replace("\\<", "")


def test_sections_without_data_are_left_out_with_a_sentence(tmp_path: Path) -> None:
    folder = make_sweep(
        tmp_path / "s", skills={"evs": 0.8}, ratios=(0.1,), questions=8, costs=False, gallery=False, kinds=False
    )
    shutil.rmtree(folder / "answers")
    (folder / "run.json").unlink()
    text = write_report(folder).read_text()
    assert Page(text).open == []
    for sentence in (
        "ViTCoP is not among the methods",
        "Costs were not measured",
        "without a gallery",
        "no column that groups questions",
    ):
        assert sentence in text
    assert not list((folder / "plots").glob("stages*")) and not list((folder / "plots").glob("kinds*"))


def test_open_questions_have_costs_but_no_accuracy(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.1,), questions=8, gallery=False)
    unknown = ("accuracy", "accuracy_low", "accuracy_high", "kind_accuracy", "wins_full", "wins_random")
    nothing = dict.fromkeys(unknown)
    cells_with(folder, {cell["cell"]: nothing for cell in load_sweep(folder).comparisons[0].cells})
    text = write_report(folder).read_text()
    assert "nothing can be said of accuracy" in text and "A win or a loss" not in text
    assert {picture.name for picture in (folder / "plots").iterdir()} == {
        "speedup.png",
        "stages-0.1.png",
        "memory-0.1.png",
    }


def test_a_sweep_of_one_method_is_drawn(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills={"vitcop": 0.9}, ratios=(0.1,), questions=8)
    text = write_report(folder).read_text()
    assert "Random selection was not run" in text and (folder / "plots/accuracy-4.png").is_file()


def test_frame_counts_are_compared_apart(tmp_path: Path) -> None:
    folder = make_sweep(
        tmp_path / "s", skills=SMALL, ratios=(0.1,), frame_counts=(4, 8), questions=16, costs=False, gallery=False
    )
    text = write_report(folder).read_text()
    page = Page(text)
    assert page.open == [] and "With 4 frames" in text and "With 8 frames" in text
    names = {picture.name for picture in (folder / "plots").iterdir()}
    assert {"accuracy-1-4f.png", "accuracy-1-8f.png", "kinds-0.1-4f.png"} <= names
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_an_unfinished_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no cells\.parquet"):
        write_report(tmp_path)
    done = subprocess.run([sys.executable, "-m", "pipeline.sweep.report", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr


PROBE = """
<script>
const column = [...document.querySelectorAll(".sortable thead th")].findIndex((th) => th.textContent.startsWith("acc"));
const head = document.querySelectorAll(".sortable thead th")[column];
const values = () => [...document.querySelectorAll(".sortable tbody tr")].map((row) => row.cells[column].dataset.value);
const found = {plots: [...document.querySelectorAll("figure svg")].filter((svg) => svg.getBBox().width > 0).length};
head.querySelector("button").click();
found.up = values();
head.querySelector("button").click();
found.down = values();
const input = document.querySelector("input[data-filter]");
input.value = "vitcop";
input.dispatchEvent(new Event("input"));
found.filtered = [...document.querySelectorAll(".sortable tbody tr")].filter((row) => !row.hidden).length;
document.querySelector('.chips button[data-pick="evs"]').click();
found.lit = [...new Set([...document.querySelectorAll(".on")].map((part) => part.dataset.method))];
const tab = document.querySelectorAll(".tabs button")[1];
tab.click();
found.tabs = [...tab.parentNode.children].map((b) => b.dataset.show).filter(Boolean)
  .map((id) => !document.getElementById(id).hidden);
found.loaded = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:")).length;
document.body.dataset.found = JSON.stringify(found);
</script>
"""


def dump(page: Path, profile: Path) -> tuple[str, dict[str, Any]]:
    """What a browser made of a page: its text, and what the probe found."""
    assert CHROMIUM is not None
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += (
        " --disable-component-update --disable-sync --virtual-time-budget=5000 --enable-logging=stderr --dump-dom"
    )
    command = [CHROMIUM, *options.split(), f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    body = next(attributes for tag, attributes in Page(done.stdout).tags if tag == "body")
    return done.stdout, json.loads(body["data-found"] or "")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_without_complaint(folder: Path, tmp_path: Path) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text((folder / "report.html").read_text().replace("</body>", PROBE + "</body>"))
    text, found = dump(probed, tmp_path / "profile")

    assert found["plots"] == 4 + 2 + 3
    up, down = ([float(value) for value in found[way] if value is not None] for way in ("up", "down"))
    assert len(up) > 50 and up == sorted(up) and down == sorted(down, reverse=True)
    assert found["up"][-1] is found["down"][-1] is None
    assert found["filtered"] == len(RATIOS)
    assert found["lit"] == ["evs"]
    assert found["tabs"] == [False, True, False]
    assert found["loaded"] == 0
    assert "taken over" not in re.findall(r"<title>([^<]*)</title>", text)[0]


NARROW_PROBE = """
<script>
const wide = [...document.querySelectorAll(".answer, h1, p, li, summary")].filter((part) => part.offsetParent)
  .filter((part) => part.getBoundingClientRect().right > innerWidth).map((part) => part.textContent.slice(0, 40));
const answers = document.querySelectorAll("details[open] .answer").length;
parent.postMessage({width: innerWidth, scroll: document.documentElement.scrollWidth, wide, answers}, "*");
</script>
"""
FRAME = """<!doctype html><html><body><iframe src="PAGE" width="WIDTH" height="800" style="border: 0"></iframe>
<script>onmessage = (message) => { document.body.dataset.found = JSON.stringify(message.data); };</script>
</body></html>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [420, 1280])
def test_words_and_answers_fit_the_screen(folder: Path, tmp_path: Path, width: int) -> None:
    text = (folder / "report.html").read_text()
    (tmp_path / "probed.html").write_text(text.replace("</body>", NARROW_PROBE + "</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("PAGE", "probed.html").replace("WIDTH", str(width)))
    _, found = dump(frame, tmp_path / "profile")
    assert found["width"] == width and found["scroll"] <= width and found["wide"] == []
    assert found["answers"] == len(json.loads((folder / "gallery.json").read_text())[0]["cells"]), "the open clip's"
