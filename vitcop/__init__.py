"""Visual-token pruning for unmodified Hugging Face video language models.

from vitcop import ViTCoP, prune

with prune(model, ViTCoP(retention_ratio=0.25)) as stats:
    output = model.generate(**inputs)
print(stats.last)
"""

from vitcop.cache import record_of
from vitcop.errors import ProfileError, UnreachableBudgetError, UnsupportedInputError, UnsupportedModelError
from vitcop.families import Family, family_of
from vitcop.join import join, mask_of_new_tokens, select
from vitcop.methods import METHODS, Method, ViTCoP, get_method
from vitcop.pruning import prune
from vitcop.stats import PrefillRecord, PruneStats
from vitcop.vision import VisionCache

__all__ = [
    "METHODS",
    "Family",
    "Method",
    "PrefillRecord",
    "ProfileError",
    "PruneStats",
    "UnreachableBudgetError",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "ViTCoP",
    "VisionCache",
    "family_of",
    "get_method",
    "join",
    "mask_of_new_tokens",
    "prune",
    "record_of",
    "select",
]
