"""What methods that prune once, before the language model, have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from vitcop.budget import Geometry, Plan, single_stage
from vitcop.methods.base import Method

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BeforeModel(Method):
    """A method with one stage, before the language model, so that every layer sees `retention_ratio` of the tokens."""

    def plan(self, geometry: Geometry) -> Plan:
        return single_stage(geometry, self.retention_ratio)


def required(value: T | None, what: str) -> T:
    """`value`, which the family gives to every method that says it needs it."""
    if value is None:
        raise RuntimeError(f"the tokens came without {what}")
    return value
