"""No pruning: what every method is measured against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from vitcop.budget import Geometry, Plan, keep_all
from vitcop.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class KeepAll(Method):
    """Keep every visual token, whatever `retention_ratio` says: the model as it is, with a record of each prefill."""

    name: ClassVar[str] = "none"
    fixed_budget: ClassVar[bool] = True

    retention_ratio: float = field(default=1.0, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "retention_ratio", 1.0)

    def plan(self, geometry: Geometry) -> Plan:
        return keep_all(geometry)
