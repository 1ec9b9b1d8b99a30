"""How many visual tokens each layer of the language model sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vitcop.errors import UnreachableBudgetError

SHALLOW_AND_DEEP = (2, 22)
"""The layers of 32 before which ViTCoP prunes, as published; see `scaled_layers`."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Shape of one clip's visual tokens and depth of the language model that reads them.

    Attributes:
        height, width: token grid of a frame.
        fixed: visual tokens beside the grids that the family can't prune (a CLS token a frame). Every layer sees them,
            so they are part of every budget.
    """

    num_layers: int
    frames: int
    height: int
    width: int
    fixed: int = 0

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        """Visual tokens that can be pruned: those of all grids."""
        return self.frames * self.tokens_per_frame

    def share(self, retention_ratio: float) -> float:
        """Fraction of the grids' tokens that a retention ratio of all visual tokens leaves; negative if the fixed
        tokens alone are more.
        """
        return retention_ratio - (1 - retention_ratio) * self.fixed / self.num_tokens

    def total(self, retention_ratio: float) -> float:
        """Token-layers that a retention ratio allows: the grids' tokens of each layer, added over all layers."""
        return self.share(retention_ratio) * self.num_layers * self.num_tokens

    def ratio(self, kept: float) -> float:
        """The retention ratio at which `kept` of the grids' tokens are left, averaged over layers."""
        return (kept + self.fixed) / (self.num_tokens + self.fixed)

    def least(self, kept: float) -> str:
        """The ratio that is reached with `kept` of the grids' tokens, for errors; rounded up, so that it is enough."""
        fixed = f" ({self.fixed} tokens that can't be pruned are part of it)" if self.fixed else ""
        return f"at least {math.ceil(round(self.ratio(kept) * 1e4, 6)) / 1e4:.4f}{fixed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Token counts of one clip, known before any tensor is looked at; the fixed tokens come on top of each.

    Attributes:
        entering: tokens left when the language model is entered (all of them if nothing is pruned before it).
        layers: layer index -> tokens left when that layer is entered; ascending, counts never rise.
        names: label of each stage for reports, by layer index (-1 is the stage before the model).
        grid: token grid (height, width) that the vision tower makes of each frame, where it is not the model's own.
    """

    entering: int
    layers: Mapping[int, int] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    grid: tuple[int, int] | None = None

    def encoded(self, geometry: Geometry) -> Geometry:
        """The clip as the vision tower sees it."""
        return geometry if self.grid is None else replace(geometry, height=self.grid[0], width=self.grid[1])

    def per_layer(self, num_layers: int) -> tuple[int, ...]:
        """Visual tokens that each of the `num_layers` layers sees."""
        counts, current = [], self.entering
        for layer in range(num_layers):
            # A stage holds until the next one.
            current = self.layers.get(layer, current)
            counts.append(current)
        return tuple(counts)

    def stage_of_layer(self, num_layers: int) -> tuple[int, ...]:
        """For each layer how many stages inside the language model stand before it."""
        return tuple(sum(start <= layer for start in self.layers) for layer in range(num_layers))

    def name(self, layer: int) -> str:
        """What the stage before `layer` is called; -1 is the stage before the model."""
        return self.names.get(layer, f"layer {layer}")

    def stages(self) -> dict[str, int]:
        """Tokens left after each stage, by stage name."""
        return {self.name(layer): count for layer, count in {-1: self.entering, **self.layers}.items()}


def keep_all(geometry: Geometry) -> Plan:
    """The plan that prunes nothing."""
    return Plan(entering=geometry.num_tokens, names={-1: "vision"})


def single_stage(geometry: Geometry, retention_ratio: float, name: str = "vision") -> Plan:
    """The plan of a method that prunes once, before the language model.

    Raises:
        UnreachableBudgetError: the ratio keeps less than one token.
    """
    # Rounded once, over the whole clip.
    count = round(geometry.share(retention_ratio) * geometry.num_tokens)
    if count < 1:
        raise UnreachableBudgetError(
            f"retention_ratio {retention_ratio} keeps less than one of {geometry.num_tokens} visual tokens; "
            f"use {geometry.least(1)}"
        )
    return Plan(entering=count, names={-1: name})


def scaled_layers(layers: Sequence[int], num_layers: int, published_depth: int = 32) -> tuple[int, ...]:
    """Layers at the same relative depths in a model of `num_layers`, each at least 1 and beyond the one before."""
    scaled: list[int] = []
    for layer in layers:
        scaled.append(max(scaled[-1] + 1 if scaled else 1, round(layer * num_layers / published_depth)))
    return tuple(scaled)


def solve_stages(
    geometry: Geometry,
    retention_ratio: float,
    layers: Sequence[int],
    counts: Callable[[float], Sequence[int]],
    *,
    before_model: bool = False,
) -> Plan:
    """The plan that meets a ratio with a stage before each of `layers` of the language model.

    Args:
        counts: the tokens left after each stage, for a scale from 0 to 1; no count falls as the scale rises. The
            largest scale that the ratio allows is taken, and the last stage keeps what rounding leaves over.
        before_model: there is a stage before the language model too, the first in `counts`.

    Raises:
        UnreachableBudgetError: the counts for scale 0 are more than the ratio allows.
        ValueError: the layers don't ascend from 1 to the model's last.
    """
    # Ascending, without repeats, and below the number of layers.
    bounds = (*layers, geometry.num_layers)
    if not layers or layers[0] < 1 or list(bounds) != sorted(set(bounds)):
        raise ValueError(f"layers must ascend and lie between 1 and {geometry.num_layers - 1}, got {tuple(layers)}")
    # Stage i holds from its layer to the next stage's, for `widths[i]` layers.
    starts = (0, *layers) if before_model else tuple(layers)
    widths = [end - start for start, end in zip(starts, (*starts[1:], geometry.num_layers), strict=True)]
    # In token-layers; without a stage before the model, the first layers see everything.
    total, untouched = geometry.total(retention_ratio), starts[0] * geometry.num_tokens

    def spent(scale: float) -> int:
        return untouched + sum(count * width for count, width in zip(counts(scale), widths, strict=True))

    # Half a token a layer is what rounding may cost.
    if spent(0) > total + geometry.num_layers / 2:
        raise UnreachableBudgetError(
            f"retention_ratio {retention_ratio} can't be reached: pruning before layer "
            f"{', '.join(map(str, layers))} of {geometry.num_layers} keeps "
            f"{geometry.least(spent(0) / geometry.num_layers)}; use a higher ratio or earlier layers"
        )
    # The largest scale within the budget; counts are whole numbers, so a rest remains.
    scale = _largest(lambda scale: spent(scale) <= total)
    kept = list(counts(scale))
    # What truncated counts leave of the budget goes to the last stage, as far as tokens have come that far.
    before = kept[-2] if len(kept) > 1 else geometry.num_tokens
    kept[-1] = min(before, kept[-1] + max(0, round((total - spent(scale)) / widths[-1])))
    # With a stage before the model, layer 0 is what enters and no stage inside it.
    stages = dict(zip(starts, kept, strict=True))
    return Plan(entering=stages.pop(0, geometry.num_tokens), layers=stages, names={-1: "vision"})


def _largest(allowed: Callable[[float], bool]) -> float:
    """The largest scale in [0, 1] that is allowed, by bisection; 0 if none is."""
    if allowed(1.0):
        return 1.0
    low, high = 0.0, 1.0
    # 50 halvings reach the precision of a double.
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


def shares_to_counts(num_tokens: int, shares: Sequence[float]) -> list[int]:
    """Tokens left after each stage when that keeps a share of all; truncated, as in PyramidDrop, and at least 1."""
    return [max(1, int(num_tokens * share)) for share in shares]
