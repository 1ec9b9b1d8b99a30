"""Model families that can be pruned. A new one is a file here and a line in `FAMILIES`."""

from __future__ import annotations

from torch import nn

from vitcop.families.base import Family, UnsupportedInputError, UnsupportedModelError
from vitcop.families.llava_onevision import LlavaOnevision

FAMILIES: dict[str, type[Family]] = {
    model_type: family for family in (LlavaOnevision,) for model_type in family.model_types
}


def family_of(model: nn.Module) -> Family:
    """Return the adapter for a model.

    Raises:
        UnsupportedModelError: no family here has the model's type.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        known = ", ".join(sorted({family.label for family in FAMILIES.values()}))
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {model_type!r}) can't be pruned; known are {known}"
        )
    return FAMILIES[model_type](model)


__all__ = ["FAMILIES", "Family", "UnsupportedInputError", "UnsupportedModelError", "family_of"]
