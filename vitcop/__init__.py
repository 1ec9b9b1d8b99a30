"""Visual-token pruning for unmodified Hugging Face video language models.

from vitcop import ViTCoP, prune

with prune(model, ViTCoP(retention_ratio=0.25)) as stats:
    output = model.generate(**inputs)
print(stats.last)
"""

from vitcop.budget import UnreachableBudgetError
from vitcop.families import UnsupportedInputError, UnsupportedModelError
from vitcop.methods import ViTCoP, get_method
from vitcop.pruning import prune
from vitcop.stats import PrefillRecord, PruneStats
from vitcop.vision import VisionCache

__all__ = [
    "PrefillRecord",
    "PruneStats",
    "UnreachableBudgetError",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "ViTCoP",
    "VisionCache",
    "get_method",
    "prune",
]
