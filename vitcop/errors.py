"""The exceptions of `vitcop`: models, inputs, budgets and profiles that it refuses."""

from __future__ import annotations


class UnsupportedModelError(TypeError):
    """The model belongs to no family that can be pruned."""


class UnsupportedInputError(ValueError):
    """The model can be pruned, but not on these inputs or with this kind of generation."""


class UnreachableBudgetError(ValueError):
    """A method cannot reach the retention ratio that it was asked for."""


class ProfileError(ValueError):
    """A profile is missing, cannot be read, or belongs to another model."""
