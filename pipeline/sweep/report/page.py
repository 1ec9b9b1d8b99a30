"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from pipeline.sweep.report.data import SUBJECT_TITLE, Comparison, Sweep
from pipeline.sweep.report.findings import frames_seen, headline, warnings
from pipeline.sweep.report.gallery import gallery_section
from pipeline.sweep.report.html import Html, element, join
from pipeline.sweep.report.pictures import Pictures
from pipeline.sweep.report.style import GLYPHS, Plot, looks
from pipeline.sweep.report.tables import cell_table, duel_table, standing_table
from pipeline.sweep.report.words import share
from pipeline.sweep.statistics import RESAMPLES

HERE = Path(__file__).parent
TITLE = f"{SUBJECT_TITLE} and its rivals at equal budget"


def render_page(sweep: Sweep, pictures: Sequence[Pictures]) -> str:
    """The whole page.

    Args:
        pictures: the plots of each of `sweep.comparisons`.
    """
    several = len(sweep.comparisons) > 1
    parts: list[Html] = [element("h1", TITLE)]
    for number, (comparison, plots) in enumerate(zip(sweep.comparisons, pictures, strict=True)):
        if several:
            parts.append(element("h1", f"With {frames_seen(sweep, comparison)}"))
        parts += _comparison(sweep, comparison, plots, number)
    gallery = gallery_section(sweep.folder)
    parts.append(element("h2", "What each method kept"))
    parts.append(element("p", GALLERY_NOTE if gallery else "The sweep was run without a gallery.", class_="note"))
    parts.append(gallery or Html())
    parts += [element("h2", "How it was measured"), *_method_notes(sweep)]
    values = {name: (HERE / file).read_text(encoding="utf-8") for name, file in ASSETS.items()}
    template = Template(values.pop("template"))
    return template.substitute(values, title=TITLE, body=join(parts))


SETTINGS_SHOWN = ("model", "frames", "sweep", "answer")
"""Groups of the run's configuration that bear on the results; the others hold paths."""
ASSETS = {"template": "template.html", "style": "style.css", "script": "script.js"}


def _comparison(sweep: Sweep, comparison: Comparison, plots: Pictures, number: int) -> Iterable[Html]:
    lead, *findings = headline(sweep, comparison)
    yield element("p", lead, class_="lead")
    yield _list(findings)
    if (standings := standing_table(sweep, comparison)) is not None:
        yield standings
        yield element("p", RULES, class_="note")
    yield _list(warnings(comparison))
    yield _chips(comparison)
    yield element("h2", "Accuracy against tokens kept")
    no_accuracy = element("p", "No question has a known answer, so there are no accuracies.")
    yield element("div", *map(_figure, plots.accuracy), class_="plots") if plots.accuracy else no_accuracy
    yield element("p", ACCURACY_NOTE, class_="note")
    if (duels := duel_table(sweep, comparison)) is not None:
        yield element("h3", f"{SUBJECT_TITLE} minus each other method, percentage points")
        yield duels
    yield element("h2", "Accuracy against speed")
    yield join(map(_figure, plots.speed)) if plots.speed else element("p", NO_COSTS)
    yield element("h2", "Where the time goes")
    yield _tabbed(plots.stages, f"stages{number}", NO_COSTS)
    yield element("h2", "Memory")
    yield _tabbed(plots.memory, f"memory{number}", "Memory was not measured in this sweep.")
    yield element("h2", "Kinds of question")
    yield _tabbed(plots.kinds, f"kinds{number}", "The manifest has no column that groups questions.")
    yield element("h2", "All cells")
    table = f"cells{number}"
    yield element(
        "p", Html(f'<input data-filter="{table}" placeholder="filter rows: vitcop 10" aria-label="filter rows">')
    )
    yield element("div", cell_table(comparison), id=table, class_="tall")


RULES = (
    "A win or a loss is a difference that McNemar's exact test on the same questions finds with p < 0.05, for methods "
    "with seeds against every seed; anything else is a tie, and p is the largest over seeds. The best other method is "
    "picked by the same answers it is tested on, which flatters it. No correction is made for the number of tests: "
    "among 20 of equal methods, one such difference is expected by chance."
)
ACCURACY_NOTE = (
    "Bars are 95 % bootstrap intervals over clips; for methods with seeds, means over the seeds of accuracy and "
    "interval. Baselines are dashed, floors and all tokens are horizontal lines. All panels share their axes, and show "
    f"{SUBJECT_TITLE} and random for comparison."
)
GALLERY_NOTE = (
    "Tokens that were kept are bright and rimmed, the others are dark; a token that stands for several is drawn where "
    "the method put it. Methods with several stages have one row for each."
)
NO_COSTS = "Costs were not measured in this sweep."


def _list(texts: Iterable[str]) -> Html:
    return element("ul", *(element("li", text) for text in texts), class_="findings")


def _chips(comparison: Comparison) -> Html:
    """Buttons that highlight a method, which are the legend of colours and markers too."""
    look = looks(comparison)
    buttons = [
        element(
            "button",
            element("span", GLYPHS[look[name].marker], style=f"color: {look[name].colour}"),
            f" {name}",
            type="button",
            data_pick=name,
            aria_pressed="false",
        )
        for name in comparison.methods
    ]
    return element("nav", element("small", "Highlight: "), *buttons, class_="chips", aria_label="highlight methods")


def _figure(plot: Plot, **attributes: str | bool) -> Html:
    return element("figure", element("figcaption", plot.title), element("div", Html(plot.svg)), **attributes)


def _tabbed(plots: Mapping[float, Plot], name: str, missing: str) -> Html:
    """Figures of which one is shown at a time, chosen by keep ratio."""
    if not plots:
        return element("p", missing)
    buttons, figures = [], []
    for number, (ratio, plot) in enumerate(plots.items()):
        target = f"{name}-{number}"
        pressed = "true" if number == 0 else "false"
        buttons.append(element("button", share(ratio), type="button", data_show=target, aria_pressed=pressed))
        figures.append(_figure(plot, id=target, hidden=number > 0))
    bar = element("div", element("small", "Tokens kept: "), *buttons, class_="tabs")
    return join([bar if len(plots) > 1 else Html(), *figures])


def _method_notes(sweep: Sweep) -> Iterable[Html]:
    yield _list(measured_how(sweep))
    run = sweep.run
    facts = {key: run[key] for key in ("started", "machine", "versions") if run.get(key)}
    if facts:
        yield element("dl", *(part for key, value in facts.items() for part in _fact(key, value)))
    settings = {group: config for group, config in run.get("config", {}).items() if group in SETTINGS_SHOWN}
    if settings:
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        yield element("details", element("summary", "Settings"), element("pre", text))


def _fact(key: str, value: Any) -> tuple[Html, Html]:
    if isinstance(value, Mapping):
        value = ", ".join(f"{name} {part}" for name, part in value.items())
    return element("dt", key), element("dd", str(value))


def measured_how(sweep: Sweep) -> list[str]:
    """What the numbers mean and how they were taken."""
    seeds, clips, rounds = (sweep.setting("sweep", name) for name in ("seeds", "cost_clips", "cost_rounds"))
    if clips and sweep.clips:
        clips = min(clips, sweep.clips)
    notes = [
        "Budget: a keep ratio is the number of visual tokens that a layer of the language model sees, averaged over "
        "its layers, over the number before pruning; tokens that a method adds count. Each method's settings are "
        "solved for it, and what was realised stands in the table. What a method can't reach is left out, never "
        "rounded.",
        "All cells answer the same questions on the same frames with the same model, prompt and arithmetic.",
        f"Accuracy intervals draw clips, not questions, with replacement ({RESAMPLES:,} times), since questions about "
        "one clip share its frames.",
        "The speed-up that operations allow counts multiply-accumulates of vision tower and language model. Seconds "
        "are medians; videos a second and measured speed-ups leave decoding out.",
    ]
    if seeds:
        notes.append(f"Methods that draw at random were run with {seeds} seeds.")
    if clips:
        notes.append(
            f"Costs were measured on {clips} clips, {rounds} times each after warming up, the cells taking turns in "
            "one process that did nothing else."
        )
    return notes
