"""The cells of a sweep: which methods at which keep ratios and frame counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pipeline.config import CALIBRATED, PruneConfig, Scalar, SweepConfig, parse_options
from pipeline.errors import ConfigError

FULL = "none"
RANDOM = "random"
UNREACHABLE = "cannot_prune"

Record = dict[str, Any]
"""A row of `cells.parquet`, or of the answers, by column."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration of a sweep.

    Attributes:
        method: as it was asked for, options included (`vitcop:key_score=large`); `none` keeps all tokens.
        keep_ratio: None for floors, which keep what they keep (`one_frame`, `text_only`).
        num_frames: frames of a clip; None where frames are sampled by rate.
        seed: of seeded methods.
    """

    method: str
    keep_ratio: float | None = None
    num_frames: int | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        parts = [self.method]
        parts += [f"{self.keep_ratio:g}"] if self.keep_ratio is not None else []
        parts += [f"{self.num_frames}f"] if self.num_frames is not None else []
        parts += [f"s{self.seed}"] if self.seed is not None else []
        return "-".join(parts)

    @property
    def prune(self) -> PruneConfig:
        """The pruning settings of the main job that make this cell."""
        name, options = split_method(self.method)
        if self.seed is not None:
            options["seed"] = self.seed
        ratio = 1.0 if self.method == FULL else self.keep_ratio or 0.5  # floors ignore the ratio
        return PruneConfig(method=name, keep_ratio=ratio, method_options=options)


def split_method(text: str) -> tuple[str, dict[str, Scalar]]:
    """`vitcop:key_score=large,merge=mean` as a name and its options."""
    name, colon, rest = text.partition(":")
    try:
        return name, parse_options(rest.split(",")) if colon else {}
    except ValueError as error:
        raise ConfigError(f"--methods {text}: {error}") from error


def named_methods(config: SweepConfig) -> SweepConfig:
    """The settings with every method by its name, so that a record says what `all` stood for."""
    from vitcop import METHODS

    names = chain.from_iterable(METHODS if text == "all" else [text] for text in config.methods)
    return dataclasses.replace(config, methods=tuple(dict.fromkeys(names)))


def cells_of(config: SweepConfig) -> list[Cell]:
    """All cells: for each frame count the full model, the floors, and each method at each ratio with each seed.

    Raises:
        ConfigError: an unknown method or option.
    """
    counts: Sequence[int | None] = config.frame_counts or (None,)
    cells = [Cell(method=FULL, num_frames=count) for count in counts]
    for text in named_methods(config).methods:
        seeded, fixed_budget = _traits(text)
        seeds: Sequence[int | None] = range(config.seeds) if seeded else (None,)
        ratios: Sequence[float | None] = (None,) if fixed_budget else config.keep_ratios
        cells += [
            Cell(method=text, keep_ratio=ratio, num_frames=count, seed=seed)
            for count in counts
            for ratio in ratios
            for seed in seeds
        ]
    return list(dict.fromkeys(cells))  # what is asked for twice is answered once


def _traits(text: str) -> tuple[bool, bool]:
    """Whether a method, as it is asked for, draws by a seed that isn't given, and whether it ignores the keep ratio."""
    from vitcop import get_method

    name, options = split_method(text)
    if name == CALIBRATED:  # the workers find it beside the model
        return False, False
    try:
        method = get_method(name)(retention_ratio=0.5, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--methods {text}: {error}") from error
    return "seed" in {field.name for field in dataclasses.fields(method)} and "seed" not in options, method.fixed_budget
