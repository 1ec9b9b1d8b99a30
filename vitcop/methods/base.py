"""The interface of pruning methods: how many tokens survive each stage, and which."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from vitcop.budget import Geometry, Plan
from vitcop.errors import UnsupportedModelError
from vitcop.selection import Selection
from vitcop.tokens import LayerTokens, Needs, VisualTokens

ADDITIVE = ("sdpa", "eager")
"""The attention implementations of transformers that take a mask to be added to the logits."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to prune visual tokens. Holds settings only; what a call needs lives with that call.

    Attributes:
        retention_ratio: fraction of visual tokens kept, averaged over the language model's layers, in (0, 1].
    """

    name: ClassVar[str]
    query_aware: ClassVar[bool] = False
    """Whether the selection depends on the text after the video (then a prefix cannot be shared by questions)."""
    frame_local: ClassVar[bool] = False
    """Whether the stage before the model looks at one frame at a time (then frames can be pruned chunk by chunk)."""
    fixed_budget: ClassVar[bool] = False
    """Whether the method has a budget of its own and ignores `retention_ratio` (one frame, text alone, everything)."""
    baseline: ClassVar[bool] = False
    """Whether it is a content-blind baseline: it looks at no token's content, at most at the size of a picture."""

    retention_ratio: float

    def __post_init__(self) -> None:
        check_shares(self, "retention_ratio")

    @property
    def bias(self) -> float:
        """Factor on log(m), which is added to the logits of a kept token that stands for m tokens; see Proportional."""
        return 0.0

    @property
    def needs(self) -> Needs:
        """What the method reads beside the tokens themselves."""
        return Needs()

    def bind(self, model: PreTrainedModel) -> Method:
        """The method as `prune` uses it on a model: the same, unless it needs something that lies beside the model."""
        return self

    @abstractmethod
    def plan(self, geometry: Geometry) -> Plan:
        """Solve the token counts of all stages for the retention ratio.

        Raises:
            UnreachableBudgetError: no counts of this method meet the ratio.
        """

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        """Choose among the tokens before the model; indices count frame by frame within `tokens`.

        The default keeps all, for methods that prune inside the language model only.
        """
        batch, frames, per_frame = tokens.features.shape[:3]
        return Selection(keep=torch.arange(frames * per_frame, device=tokens.features.device).expand(batch, -1))

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        """Choose `plan.layers[tokens.layer]` of the tokens about to enter that layer; indices count within them."""
        raise TypeError(f"{self.name} does not prune inside the language model")

    def describe(self) -> str:
        """The method with all its settings, for logs and outputs."""
        return repr(self)


@dataclass(frozen=True, kw_only=True)
class Proportional(Method):
    """A method whose kept tokens can be attended to in proportion to the tokens they stand for.

    With `bias` a > 0, every query adds `a log(m)` to its logit of a visual token that stands for m tokens: those merged
    into it, or dropped in its favour. At 1, a token of mass m counts as m equal ones at its position; prompt, questions
    and decoded tokens all do it, in every layer. Needs attention that takes an additive mask (sdpa or eager).

    Attributes:
        bias: in [0, 1]; 0 leaves the attention as it is.
    """

    bias: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.bias <= 1:
            raise ValueError(f"bias must be in [0, 1], got {self.bias}")

    def bind(self, model: PreTrainedModel) -> Method:
        """The method itself.

        Raises:
            UnsupportedModelError: there is a bias, and the model's attention takes none.
        """
        attention = model.config.get_text_config()._attn_implementation
        if self.bias and attention not in ADDITIVE:
            raise UnsupportedModelError(
                f"bias={self.bias:g} of {self.name} can't be added under attn_implementation={attention!r}; "
                f"use {' or '.join(map(repr, ADDITIVE))}, or bias=0"
            )
        return super().bind(model)


def check_shares(method: Method, *names: str) -> None:
    """Raise ValueError unless the method's settings of these names are in (0, 1], or left to their default (None)."""
    for name in names:
        value = getattr(method, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value}")


def check_at_least_one(method: Method, *names: str) -> None:
    """Raise ValueError unless the method's settings of these names are at least 1."""
    for name in names:
        if getattr(method, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(method, name)}")
