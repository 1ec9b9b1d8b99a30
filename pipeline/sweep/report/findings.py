"""What the numbers say, in plain words: where ViTCoP wins, ties and loses, and what the reader should distrust."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.sweep.cells import RANDOM
from pipeline.sweep.report.data import SUBJECT, SUBJECT_TITLE, Comparison, Point, Sweep, is_subject
from pipeline.sweep.report.words import counted, gain, listed, percent, share, unbroken
from pipeline.sweep.statistics import SHOWN_DIFFERENCE, mcnemar

SIGNIFICANT = 0.05
WIN, OPEN, LOSS, UNTESTED = "wins", "is not significantly different", "loses", "untested"
WHOLE = 0.999
"""A cell that kept this part of the tokens has pruned nothing to speak of."""


@dataclass(frozen=True)
class PairedDifference:
    """One point against another on the same questions.

    Attributes:
        difference: of the accuracies, mean over seeds.
        outcome: a win or a loss when McNemar's test finds it with every seed; `untested` without common answers.
        p: the largest over the seeds.
        n: questions that both answered, the fewest over the seeds.
        needed: how many would show a difference of 5 points, the most over the seeds.
    """

    point: Point
    rival: Point
    difference: float
    outcome: str
    p: float | None
    n: int = 0
    needed: int = 0


@dataclass(frozen=True)
class Standing:
    """How ViTCoP stands at a keep ratio.

    Attributes:
        best: the most accurate other method; None when there is none.
        place: 1 + the number of other methods that are more accurate by the numbers, of `field` in all.
    """

    point: Point
    full: PairedDifference | None
    random: PairedDifference | None
    best: PairedDifference | None
    place: int
    field: int


def paired_difference(sweep: Sweep, point: Point, rival: Point) -> PairedDifference | None:
    """`point` against `rival`; None when one of them has no accuracy."""
    mine, theirs = point.mean("accuracy"), rival.mean("accuracy")
    if mine is None or theirs is None:
        return None
    sides = [[sweep.correct.get(cell["cell"], {}) for cell in side.cells] for side in (point, rival)]
    # Every seed of one against every seed of the other.
    tests = [mcnemar(first, second) for first in sides[0] for second in sides[1] if first.keys() & second.keys()]
    if not tests:
        return PairedDifference(point, rival, mine - theirs, UNTESTED, None)
    outcome = OPEN
    if all(test.p < SIGNIFICANT and test.wins > test.losses for test in tests):
        outcome = WIN
    if all(test.p < SIGNIFICANT and test.wins < test.losses for test in tests):
        outcome = LOSS
    return PairedDifference(
        point,
        rival,
        mine - theirs,
        outcome,
        p=max(test.p for test in tests),
        n=min(test.n for test in tests),
        needed=max(test.questions_to_show() for test in tests),
    )


def standings(sweep: Sweep, comparison: Comparison) -> list[Standing]:
    """How ViTCoP stands at each keep ratio that it reached."""
    found = []
    for point in comparison.of(SUBJECT):
        assert point.keep_ratio is not None
        mine = point.mean("accuracy")
        if mine is None:
            continue
        others = [(rival.mean("accuracy"), rival) for rival in rivals(comparison, point.keep_ratio)]
        scored = [(accuracy, rival) for accuracy, rival in others if accuracy is not None]
        # Picked by the same answers that it is tested on, which the page says.
        best = max(scored, key=lambda pair: pair[0])[1] if scored else None
        random = next((rival for _, rival in scored if rival.method == RANDOM), None)
        found.append(
            Standing(
                point=point,
                full=paired_difference(sweep, point, comparison.full) if comparison.full else None,
                random=paired_difference(sweep, point, random) if random else None,
                best=paired_difference(sweep, point, best) if best else None,
                place=1 + sum(accuracy > mine for accuracy, _ in scored),
                field=1 + len(scored),
            )
        )
    return found


def rivals(comparison: Comparison, ratio: float) -> list[Point]:
    """All points at a keep ratio but those of ViTCoP and its variants."""
    return [point for point in comparison.at(ratio) if not is_subject(point.method)]


def headline(sweep: Sweep, comparison: Comparison) -> list[str]:
    """The findings as sentences, the most important first."""
    table = standings(sweep, comparison)
    return [
        _what(sweep, comparison),
        *(_against_random(table) if table else [_absent(comparison)]),
        *_against_best(table),
        *_against_full(table),
        *_against_all(sweep, comparison),
        *_kinds(comparison, sweep.chosen_ratio),
        *_speed(comparison),
    ]


@dataclass(frozen=True)
class Caution:
    """What a reader should know before trusting a number.

    Attributes:
        details: one for each case, folded in the page.
    """

    text: str
    details: tuple[str, ...] = ()


def cautions(comparison: Comparison) -> list[Caution]:
    """Methods without effect, errors, timings that can't be relied on, cells out of reach."""
    return [*_no_ops(comparison), *_troubles(comparison), *_unreliable(comparison), *_unreachable(comparison)]


def frames_seen(sweep: Sweep, comparison: Comparison) -> str:
    """Which frames the model saw, in words."""
    frames = sweep.run.get("fingerprint", {}).get("frames", {})
    count = comparison.num_frames or frames.get("num_frames")
    if count is not None:
        return f"{count} frames"
    return f"{frames['fps']:g} frames a second" if frames.get("fps") else "an unrecorded number of frames"


def _what(sweep: Sweep, comparison: Comparison) -> str:
    full = comparison.full
    asked = max((cell["n"] or 0 for cell in comparison.cells), default=0)
    clips = f" about {counted(sweep.clips, 'clip')}" if sweep.clips else ""
    name = f" {sweep.model}" if sweep.model else ""
    text = (
        f"The model{name} answered {counted(asked, 'question')}{clips}, seeing {frames_seen(sweep, comparison)} of each"
    )
    if comparison.ratios:
        text += (
            f", with {counted(len(comparison.methods), 'pruning method')}, keeping "
            f"{listed([share(ratio) for ratio in comparison.ratios])} of the visual tokens (averaged over the language "
            "model's layers)"
        )
    text += "."
    if full is None or full.mean("accuracy") is None:
        return text + " There is no accuracy with all tokens to compare with."
    (cell,) = full.cells
    interval = f"95 % interval {100 * cell['accuracy_low']:.1f} to {100 * cell['accuracy_high']:.1f}"
    return f"{text} With all tokens it is right in {percent(cell['accuracy'])} ({interval})."


def _absent(comparison: Comparison) -> str:
    """Why there is nothing to say of ViTCoP's accuracy."""
    if not comparison.of(SUBJECT):
        return f"{SUBJECT_TITLE} is not among the methods that were run."
    return "No question has a known answer, so nothing can be said of accuracy."


def _against_random(table: Sequence[Standing]) -> list[str]:
    differences = [standing.random for standing in table if standing.random]
    if not differences:
        return ["Random selection was not run, so nothing shows that scoring tokens is worth anything."]
    return [f"Against random selection of as many tokens, {_outcomes(differences)}."]


def _against_best(table: Sequence[Standing]) -> list[str]:
    differences = [standing.best for standing in table if standing.best]
    return (
        [f"Against the best other method at each ratio, {_outcomes(differences, named=True)}."] if differences else []
    )


def _outcomes(differences: Iterable[PairedDifference], named: bool = False) -> str:
    """`ViTCoP wins at 5 % (+3.1), loses nowhere, and is not significantly different at 10 % (evs, -0.2): n = ...`"""
    by_outcome: dict[str, list[PairedDifference]] = defaultdict(list)
    for each in differences:
        by_outcome[each.outcome].append(each)

    def places(outcome: str) -> str:
        if not by_outcome[outcome]:
            return "nowhere"
        return f"at {listed([_place(each, named) for each in by_outcome[outcome]])}"

    if by_outcome[UNTESTED]:
        return f"{SUBJECT_TITLE} differs, untested, by these points {places(UNTESTED)}"
    text = f"{SUBJECT_TITLE} wins {places(WIN)}"
    if not by_outcome[OPEN]:
        return f"{text} and loses {places(LOSS)}"
    needed = unbroken(f"n = {max(each.needed for each in by_outcome[OPEN]):,}")
    here = unbroken(f"n = {min(each.n for each in by_outcome[OPEN]):,}")
    shown = f"{needed} would show {100 * SHOWN_DIFFERENCE:g} points, here {here}"
    return f"{text}, loses {places(LOSS)}, and {OPEN} {places(OPEN)}: {shown}"


def _place(each: PairedDifference, named: bool) -> str:
    note = f"{each.rival.method}, {gain(each.difference)}" if named else gain(each.difference)
    return f"{share(each.point.keep_ratio or 0)} ({note})"


def _against_full(table: Sequence[Standing]) -> list[str]:
    differences = [standing.full for standing in table if standing.full]
    return [f"Against all tokens, {_outcomes(differences)}."] if differences else []


def paired_differences(sweep: Sweep, comparison: Comparison) -> dict[tuple[str, float], PairedDifference]:
    """ViTCoP against every other method at every keep ratio that both reached, by method and ratio."""
    found = {}
    for point in comparison.of(SUBJECT):
        for rival in rivals(comparison, point.keep_ratio or 0):
            if each := paired_difference(sweep, point, rival):
                found[rival.method, point.keep_ratio or 0] = each
    return found


def _against_all(sweep: Sweep, comparison: Comparison) -> list[str]:
    outcomes = [each.outcome for each in paired_differences(sweep, comparison).values()]
    if not outcomes or UNTESTED in outcomes:
        return []
    wins, losses, rest = (outcomes.count(outcome) for outcome in (WIN, LOSS, OPEN))
    return [
        f"Over all {len(outcomes)} pairs of another method and a ratio, {SUBJECT_TITLE} wins {wins}, loses {losses}, "
        f"and {rest} show no significant difference."
    ]


def _kinds(comparison: Comparison, wanted: float) -> list[str]:
    """On which kinds of question pruning costs most and least."""
    mine = comparison.at(comparison.nearest(wanted), SUBJECT) if comparison.ratios else []
    full = comparison.full.kinds() if comparison.full else {}
    changes = (
        {kind: accuracy - full[kind] for kind, accuracy in mine[0].kinds().items() if kind in full} if mine else {}
    )
    if len(set(changes.values())) < 2:
        return []
    worst, best = min(changes, key=changes.__getitem__), max(changes, key=changes.__getitem__)
    return [
        f"Keeping {share(mine[0].keep_ratio or 0)}, {SUBJECT_TITLE} is furthest behind all tokens on questions of the "
        f"kind {worst} ({gain(changes[worst])} points) and least on {best} ({gain(changes[best])})."
    ]


def _speed(comparison: Comparison) -> list[str]:
    """Measured speed-ups at the smallest and largest ratio of which they can be relied on."""
    measured = [point for point in comparison.of(SUBJECT) if point.speedup()]
    if not measured:
        return []
    least, most = measured[0], measured[-1]
    text = f"Leaving decoding out, {SUBJECT_TITLE} answers {_speedup(most)} times as fast as with all tokens"
    text += f" when it keeps {share(most.keep_ratio or 0)}"
    if least is not most:
        text += f", and {_speedup(least)} times at {share(least.keep_ratio or 0)}"
    allowed = [point.mean("speedup_allowed") for point in ((most,) if most is least else (most, least))]
    known = [f"{factor:.2f}" for factor in allowed if factor]
    if len(known) == len(allowed):
        text += f"; the operation counts would allow {listed(known)}"
    return [text + "."]


def _speedup(point: Point) -> str:
    """`1.20 (1.17 to 1.22)`: the median, and the quartiles where they are recorded."""
    low, high = point.speedup("_low"), point.speedup("_high")
    spread = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return f"{point.speedup() or 0:.2f}{spread}"


def _no_ops(comparison: Comparison) -> list[Caution]:
    """Points that kept all tokens, whatever was asked for, and points that pruned without changing an answer."""
    reached = [point for method in comparison.methods for point in comparison.of(method)]
    whole = [point for point in reached if (point.mean("retention_mean") or 0) >= WHOLE]
    idle = [point for point in reached if point.mean("differs_from_full") == 0 and point not in whole]
    found = []
    if whole:
        titles = listed([point.title for point in whole])
        found.append(Caution(f"Nothing was pruned: {titles} kept every visual token, so this is the full model again."))
    if idle:
        places = []
        for point in idle:
            kept = point.mean("retention_mean")
            places.append(f"{point.title} (kept {percent(kept)})" if kept is not None else f"{point.title}")
        found.append(
            Caution(f"Without effect on the answers: {listed(places)} changed no prediction of the full model.")
        )
    return found


def _unreachable(comparison: Comparison) -> list[Caution]:
    """A line a method, with the reason at the largest of its ratios."""
    missed: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(comparison.points, key=lambda point: -(point.keep_ratio or 0)):
        if not point.reachable:
            missed[point.method].append(point)
    if not missed:
        return []
    details = tuple(
        f"{method} at {listed([share(point.keep_ratio or 0) for point in points])}: "
        f"{(points[0].cells[0]['reason'] or 'no reason is recorded').rstrip('.')}."
        for method, points in missed.items()
    )
    count = f"{len(missed)} of {len(comparison.methods)} methods"
    return [Caution(f"Not reachable: {count} can't prune as far as some of the ratios ask.", details)]


def _unreliable(comparison: Comparison) -> list[Caution]:
    """Points of which no seed has a cost to rely on; such costs stand in the table of cells alone."""
    doubted = [point for point in comparison.points if point.doubt]
    if not doubted:
        return []
    details = tuple(f"{point.title}: {point.doubt}." for point in doubted)
    measured = sum(point.mean("seconds_total") is not None for point in comparison.points)
    text = f"Unreliable timings: {len(doubted)} of {measured}, which sentences and plots leave out."
    return [Caution(text, details)]


def _troubles(comparison: Comparison) -> list[Caution]:
    found = []
    for point in comparison.points:
        if errors := sum(cell["errors"] or 0 for cell in point.cells):
            found.append(Caution(f"Errors: {point.title} left {counted(errors, 'question')} without an answer."))
        if empty := point.mean("empty_answers"):
            found.append(Caution(f"Empty answers: {point.title} said nothing to {percent(empty)} of the questions."))
    return found
