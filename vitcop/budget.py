"""How many visual tokens each layer of the language model sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


class UnreachableBudgetError(ValueError):
    """A method cannot reach the retention ratio that it was asked for."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Shape of one clip's visual tokens and depth of the language model that reads them."""

    num_layers: int
    frames: int
    height: int
    width: int

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    def total(self, retention_ratio: float) -> float:
        """Token-layers that a retention ratio allows: the visual tokens of each layer, added over all layers."""
        return retention_ratio * self.num_layers * self.num_tokens


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Token counts of one clip, known before any tensor is looked at.

    Attributes:
        entering: tokens left when the language model is entered (all of them if nothing is pruned before it).
        layers: layer index -> tokens left when that layer is entered; ascending, counts never rise.
        names: label of each stage for reports, by layer index (-1 is the stage before the model).
    """

    entering: int
    layers: Mapping[int, int] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)

    def per_layer(self, num_layers: int) -> tuple[int, ...]:
        """Visual tokens that each of the `num_layers` layers sees."""
        counts, current = [], self.entering
        for layer in range(num_layers):
            current = self.layers.get(layer, current)
            counts.append(current)
        return tuple(counts)

    def stages(self) -> dict[str, int]:
        """Tokens left after each stage, by stage name."""
        counts = {-1: self.entering, **self.layers}
        return {self.names.get(layer, f"layer {layer}"): count for layer, count in counts.items()}


def single_stage(geometry: Geometry, retention_ratio: float, name: str = "vision") -> Plan:
    """The plan of a method that prunes once, before the language model.

    Raises:
        UnreachableBudgetError: the ratio keeps less than one token.
    """
    count = round(retention_ratio * geometry.num_tokens)
    if count < 1:
        raise UnreachableBudgetError(
            f"retention_ratio {retention_ratio} keeps less than one of {geometry.num_tokens} visual tokens; "
            f"use at least {1 / geometry.num_tokens:.4f}"
        )
    return Plan(entering=count, names={-1: name})
