"""The report of made-up sweeps, read as text and opened in a browser."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.sweep.report import write_report
from pipeline.sweep.report.data import BASELINES, BEFORE, HYBRID, INSIDE, Sweep, load_sweep
from pipeline.sweep.report.findings import headline, standings, warnings
from pipeline.sweep.report.gallery import CLEAR, DROPPED, RIM, _mask
from pipeline.sweep.report.html import Html, element
from pipeline.sweep.report.markdown import plain
from pipeline.sweep.report.plots import pareto_front
from pipeline.sweep.report.style import spread
from tests.pipeline.sweep.sweeps import NASTY_QUESTION, RATIOS, SKILLS, make_sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SMALL = {"vitcop": 0.9, "random": 0.8, "evs": 0.85}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with all its parts, and its report."""
    path = make_sweep(tmp_path_factory.mktemp("sweep"))
    assert write_report(path) == path / "report.html"
    return path


@pytest.fixture(scope="module")
def sweep(folder: Path) -> Sweep:
    return load_sweep(folder)


class Page(HTMLParser):
    """What a test asks of a page: its tags, and whether each that was opened is closed."""

    VOID = ("meta", "link", "input")

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
    assert links and all(link and link.startswith(("#", "data:")) for link in links)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link and link.startswith("#")} <= set(ids)
    assert len(text) < 5_000_000


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


def test_html_is_escaped_unless_it_is_html() -> None:
    inner = element("b", "5 > 3", class_="x", data_y='"', hidden=True, title=None, open=False)
    assert inner == '<b class="x" data-y="&quot;" hidden>5 &gt; 3</b>'
    assert element("p", "<", inner, Html("<br>")) == f"<p>&lt;{inner}<br></p>"
    assert plain("a|b *c* <d>\n# `e`_[f]") == r"a\|b \*c\* \<d\> \# \`e\`\_\[f\]"


def test_groups_are_read_from_the_tokens_that_layers_saw(sweep: Sweep) -> None:
    (comparison,) = sweep.comparisons
    groups = {"random": BASELINES, "evs": BEFORE, "fastv": INSIDE, "flashvid": HYBRID, "vitcop": HYBRID}
    assert {name: comparison.group(name) for name in groups} == groups
    assert comparison.methods[:2] == ["vitcop", "random"] and set(comparison.methods) == set(SKILLS)
    assert [point.method for point in comparison.floors] == ["one_frame", "text_only"]
    assert comparison.ratios == list(RATIOS)


def test_seeds_are_pooled(sweep: Sweep) -> None:
    (comparison,) = sweep.comparisons
    (point,) = comparison.at(0.05, "random")
    accuracies = [cell["accuracy"] for cell in point.cells]
    assert len(accuracies) == 3 and point.mean("accuracy") == pytest.approx(np.mean(accuracies))


def cells_with(folder: Path, changes: dict[str, dict[str, object]]) -> Path:
    """Rewrites columns of some cells."""
    file = folder / "cells.parquet"
    table = pq.read_table(file)
    rows = [row | changes.get(row["cell"], {}) for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    return folder


def write_answers(folder: Path, right: dict[str, list[bool]]) -> None:
    """Replaces who was right where."""
    shutil.rmtree(folder / "answers")
    (folder / "answers").mkdir()
    rows = [
        {"cell": cell, "sample_id": str(number), "video": "v", "correct": each}
        for cell, values in right.items()
        for number, each in enumerate(values)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "answers/part-00000.parquet")
    means = {cell: {"accuracy": sum(values) / len(values)} for cell, values in right.items()}
    cells_with(folder, means)


def test_the_headline_says_what_the_answers_say(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.5, 0.1, 0.02), questions=8, gallery=False)
    good, fair, bad = ([True] * count + [False] * (40 - count) for count in (38, 30, 10))
    right = {"none": good, "vitcop-0.5": good, "vitcop-0.1": fair, "vitcop-0.02": bad}
    right |= {"evs-0.5": bad, "evs-0.1": good, "evs-0.02": [*bad[1:], True]}
    right |= {f"random-{ratio}-s{seed}": fair for ratio in (0.5, 0.02) for seed in range(3)}
    # At 10 % one seed of random is worse than ViTCoP and two are as good, so it's a tie.
    right |= {"random-0.1-s0": bad, "random-0.1-s1": fair, "random-0.1-s2": fair}
    write_answers(folder, right)
    sweep = load_sweep(folder)
    text = "\n".join(headline(sweep, sweep.comparisons[0])).replace("\N{NO-BREAK SPACE}", " ")
    assert "The model tiny <model> answered 8 questions about 1 clips, seeing 8 frames of each, with 3 pruning" in text
    assert "With all tokens it is right in 95.0 %" in text
    assert "Against random selection of as many tokens, ViTCoP wins at 50 % (+20.0), ties at 10 % (+16.7), and" in text
    assert "(+16.7), and loses at 2 % (−50.0)" in text
    assert (
        "Against the best other method at each ratio, ViTCoP wins at 50 % (random, +20.0), ties nowhere, and loses at "
        "10 % (evs, −20.0) and 2 % (random, −50.0)" in text
    )
    assert (
        "Against all tokens, ViTCoP wins nowhere, ties at 50 % (+0.0), and loses at 10 % (−20.0) and 2 % (−70.0)"
        in text
    )
    assert "Over all 6 pairs of another method and a ratio, ViTCoP wins 2, ties 2 and loses 2." in text
    places = [(standing.place, standing.field) for standing in standings(sweep, sweep.comparisons[0])]
    assert places == [(1, 3), (2, 3), (2, 3)]


def test_kinds_are_compared_with_all_tokens(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.5, 0.1), questions=8, gallery=False)
    kinds = {"none": [0.9, 0.8], "vitcop-0.1": [0.85, 0.5], "vitcop-0.5": [0.1, 0.9]}
    changes = {
        cell: {"kind_accuracy": list(zip(("color", "order"), each, strict=True))} for cell, each in kinds.items()
    }
    sweep = load_sweep(cells_with(folder, changes))
    text = "\n".join(headline(sweep, sweep.comparisons[0]))
    assert "furthest behind all tokens on questions of the kind order (−30.0 points) and least on color (−5.0)" in text


def test_the_reader_is_warned(sweep: Sweep, tmp_path: Path) -> None:
    text = "\n".join(warnings(sweep.comparisons[0])).replace("\N{NO-BREAK SPACE}", " ")
    assert "Without effect: evs at 50 %" in text
    assert "Not reachable: fastv at 10 %, 5 % and 2 %: layers before 1 see all tokens" in text
    assert "Errors" not in text and "Empty" not in text

    folder = make_sweep(tmp_path / "s", skills=SMALL, ratios=(0.1,), questions=8, gallery=False)
    differing = {cell["cell"]: {"differs_from_full": 0.1} for cell in load_sweep(folder).comparisons[0].cells}
    cells_with(folder, differing | {"vitcop-0.1": {"errors": 3, "empty_answers": 0.25, "differs_from_full": 0.1}})
    text = "\n".join(warnings(load_sweep(folder).comparisons[0])).replace("\N{NO-BREAK SPACE}", " ")
    assert "Errors: vitcop at 10 % left 3 questions" in text
    assert "Empty answers: vitcop at 10 % said nothing to 25.0 %" in text
    assert "Every method changed at least one prediction" in text


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


def test_a_mask_clears_rims_and_darkens() -> None:
    mask = _mask(np.array([[True, False]]), 4)
    assert mask.shape == (4, 8)
    assert (mask[:, 4:] == DROPPED).all() and (mask[1:3, 1:3] == CLEAR).all()
    assert (mask[[0, 3], :4] == RIM).all() and (mask[:, [0, 3]] == RIM).all()


def test_the_gallery_has_a_row_for_each_stage(folder: Path) -> None:
    clips = json.loads((folder / "gallery.json").read_text())
    tags = Page((folder / "report.html").read_text()).tags
    rows = sum(max(len(cell["stages"]), 1) for clip in clips for cell in clip["cells"])
    assert sum(attributes.get("class") == "strip" for tag, attributes in tags if tag == "svg") == rows


def test_the_front_is_what_nothing_beats() -> None:
    places = np.array([[1, 5], [2, 5], [2, 4], [3, 1], [4, 3], [0, 9]])
    assert pareto_front(places) == [5, 1, 4]


def test_labels_are_pushed_apart_but_stay_in_order() -> None:
    placed = spread([5.0, 5.0, 5.1, 9.0], gap=1.0, low=0, high=10)
    assert (np.diff(placed) >= 0.99).all() and placed.min() >= 0 and placed.max() <= 10
    crowded = spread([1.0] * 5, gap=10, low=0, high=10)
    assert crowded.min() >= 0 and crowded.max() <= 10


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


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_without_complaint(folder: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    probed = tmp_path / "probed.html"
    probed.write_text((folder / "report.html").read_text().replace("</body>", PROBE + "</body>"))
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += (
        " --disable-component-update --disable-sync --virtual-time-budget=5000 --enable-logging=stderr --dump-dom"
    )
    command = [CHROMIUM, *options.split(), f"--user-data-dir={tmp_path / 'profile'}", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    dump = next(attributes for tag, attributes in Page(done.stdout).tags if tag == "body")
    found = json.loads(dump["data-found"] or "")

    assert found["plots"] == 4 + 2 + 3
    up, down = ([float(value) for value in found[way] if value is not None] for way in ("up", "down"))
    assert len(up) > 50 and up == sorted(up) and down == sorted(down, reverse=True)
    assert found["up"][-1] is found["down"][-1] is None
    assert found["filtered"] == len(RATIOS)
    assert found["lit"] == ["evs"]
    assert found["tabs"] == [False, True, False]
    assert found["loaded"] == 0
    assert "taken over" not in re.findall(r"<title>([^<]*)</title>", done.stdout)[0]
