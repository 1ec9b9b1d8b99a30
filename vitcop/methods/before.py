"""What methods that prune once, before the language model, have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from vitcop.budget import Geometry, Plan, single_stage
from vitcop.errors import UnreachableBudgetError
from vitcop.methods.base import Method

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BeforeModel(Method):
    """A method with one stage, before the language model, so that every layer sees `retention_ratio` of the tokens."""

    def plan(self, geometry: Geometry) -> Plan:
        fewest = self.fewest(geometry)
        count = round(geometry.share(self.retention_ratio) * geometry.num_tokens)
        if fewest > 1 and count < fewest:
            raise UnreachableBudgetError(
                f"retention_ratio {self.retention_ratio} keeps {max(0, count)} of {geometry.num_tokens} visual tokens, "
                f"and {self.name} can't keep less than {fewest}; use {geometry.least(fewest)}"
            )
        return single_stage(geometry, self.retention_ratio)

    def fewest(self, geometry: Geometry) -> int:
        """Fewest tokens that the method can keep of a clip."""
        return 1


@dataclass(frozen=True, kw_only=True)
class Floor(Method):
    """A baseline with a budget of its own: `retention_ratio` is ignored, and the record tells what was kept.

    A ratio of 1 is refused all the same, because there `prune` leaves the model as it is.
    """

    fixed_budget: ClassVar[bool] = True

    retention_ratio: float = field(default=0.0, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.retention_ratio < 1:
            raise ValueError(
                f"{self.name} has its own budget and ignores retention_ratio; leave it out, or give one in [0, 1), "
                f"not {self.retention_ratio}"
            )


def required(value: T | None, what: str) -> T:
    """`value`, which the family gives to every method that says it needs it."""
    if value is None:
        raise RuntimeError(f"the tokens came without {what}")
    return value
