"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.sweep.report.data import SUBJECT_TITLE, Comparison, Sweep
from pipeline.sweep.report.findings import Caution, cautions, frames_seen, headline
from pipeline.sweep.report.gallery import read_gallery
from pipeline.sweep.report.pictures import Pictures
from pipeline.sweep.report.style import GLYPHS, looks
from pipeline.sweep.report.tables import Table, accuracy_table, cell_table, difference_table, standing_table
from pipeline.sweep.report.words import counted, share
from pipeline.sweep.statistics import RESAMPLES
from pipeline.sweep.timing import DISAGREEMENT, TOLERANCE

HERE = Path(__file__).parent
SETTINGS_SHOWN = ("model", "frames", "sweep", "answer")
"""Groups of the run's configuration that bear on the results; the others hold paths."""
DATA_FILES = ("cells.parquet", "answers", "run.json", "report.md")
"""What the page links to where it is there, relative to the page."""
NO_COSTS = "Costs were not measured in this sweep."
UNRELIABLE = "No timing of this sweep can be relied on."
RULES = (
    "A win or a loss is a difference that McNemar's exact test on the same questions finds with p < 0.05, for methods "
    "with seeds against every seed; p is the largest over seeds. Where nothing is significant, n is the number of "
    "questions with which a difference of 5 points would be found four times of five, if the two methods disagree as "
    "often as here (Connor 1987; questions taken as independent). The best other method is picked by the same answers "
    "it is tested on, which flatters it. No correction is made for the number of tests: among 20 of equal methods, one "
    "significant difference is expected by chance."
)


@dataclass(frozen=True)
class Chip:
    """A button that highlights a method; all of them are the legend of colours and markers."""

    method: str
    glyph: str
    colour: str


@dataclass(frozen=True)
class Section:
    """What the page says of one comparison.

    Attributes:
        title: which frames; empty when there is one comparison only.
        number: makes ids unique in the page.
    """

    number: int
    title: str
    accuracies: Table
    lead: str
    findings: Sequence[str]
    standings: Table
    cautions: Sequence[Caution]
    chips: Sequence[Chip]
    differences: Table
    cells: Table
    plots: Pictures
    no_costs: str


def render_page(sweep: Sweep, pictures: Sequence[Pictures]) -> str:
    """The whole page.

    Args:
        pictures: the plots of each of `sweep.comparisons`.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = share
    # Style, script and the plots' SVG are our own and stand in the page as they are; all other text is escaped.
    run = sweep.run
    settings = {group: values for group, values in run.get("config", {}).items() if group in SETTINGS_SHOWN}
    return environment.get_template("page.html").render(
        title=title_of(sweep),
        subject=SUBJECT_TITLE,
        style=(HERE / "style.css").read_text(encoding="utf-8"),
        script=(HERE / "script.js").read_text(encoding="utf-8"),
        links=[name for name in DATA_FILES if (sweep.folder / name).exists()],
        sections=list(_sections(sweep, pictures)),
        rules=RULES,
        gallery=read_gallery(sweep.folder),
        notes=measured_how(sweep),
        facts=[(key, _fact(run[key])) for key in ("started", "machine", "versions") if run.get(key)],
        settings=json.dumps(settings, indent=2, ensure_ascii=False) if settings else "",
    )


def title_of(sweep: Sweep) -> str:
    """What the report is about, with the model and the data where they are recorded."""
    title = f"{SUBJECT_TITLE} and its rivals at equal budget"
    about = " on ".join(name for name in (sweep.model, sweep.data) if name)
    return f"{title}: {about}" if about else title


def _sections(sweep: Sweep, pictures: Sequence[Pictures]) -> Iterable[Section]:
    several = len(sweep.comparisons) > 1
    for number, (comparison, plots) in enumerate(zip(sweep.comparisons, pictures, strict=True)):
        lead, *findings = headline(sweep, comparison)
        yield Section(
            number=number,
            title=f"With {frames_seen(sweep, comparison)}" if several else "",
            accuracies=accuracy_table(comparison),
            lead=lead,
            findings=findings,
            standings=standing_table(sweep, comparison),
            cautions=cautions(comparison),
            chips=_chips(comparison),
            differences=difference_table(sweep, comparison),
            cells=cell_table(comparison),
            plots=plots,
            no_costs=UNRELIABLE if any(point.doubt for point in comparison.points) else NO_COSTS,
        )


def _chips(comparison: Comparison) -> list[Chip]:
    look = looks(comparison)
    return [Chip(name, GLYPHS[look[name].marker], look[name].colour) for name in comparison.methods]


def _fact(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return str(value)


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
        "are medians, with the quartiles of their rounds in brackets; videos a second and measured speed-ups leave "
        "decoding out, which is measured once a clip.",
        f"A timing is marked as unreliable when the quartiles of its rounds lie more than {100 * DISAGREEMENT:g} % of "
        f"the median apart, when its speed-up is more than {100 * (TOLERANCE - 1):.0f} % beyond the one that the "
        "operation counts allow, or when there was one round only. Such a cell is measured again first. Where "
        "the time of all tokens can't be relied on, no speed-up can.",
    ]
    if seeds:
        notes.append(f"Methods that draw at random were run with {counted(seeds, 'seed')}.")
    if clips:
        times = f"{counted(clips, 'clip')}, in {counted(rounds, 'round')} or more after warming up"
        notes.append(f"Costs were measured on {times}, the cells taking turns in one process that did nothing else.")
    if not _has_spread(sweep):
        notes.append("This sweep has no record of how far its rounds lay apart.")
    return notes


def _has_spread(sweep: Sweep) -> bool:
    cells = [cell for comparison in sweep.comparisons for cell in comparison.cells]
    timed = [cell for cell in cells if cell["seconds_total"] is not None]
    return not timed or any(cell.get("seconds_total_low") is not None for cell in timed)
