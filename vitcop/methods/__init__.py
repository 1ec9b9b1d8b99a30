"""The pruning methods. A new one is a file here and a line in `METHODS`."""

from __future__ import annotations

from vitcop.methods.base import Method
from vitcop.methods.random import Random
from vitcop.methods.vitcop import ViTCoP

METHODS: dict[str, type[Method]] = {method.name: method for method in (ViTCoP, Random)}


def get_method(name: str) -> type[Method]:
    """Return the method class called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"unknown pruning method {name!r}; known are {', '.join(sorted(METHODS))}")
    return METHODS[name]


__all__ = ["METHODS", "Method", "Random", "ViTCoP", "get_method"]
