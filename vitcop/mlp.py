"""MLPs of the language model, a few tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenChunks(nn.Module):
    """Runs an MLP on a few tokens at a time, so that its wide intermediate activations never exist for all of them."""

    def __init__(self, mlp: nn.Module, tokens: int) -> None:
        super().__init__()
        self.mlp, self.tokens = mlp, tokens

    def forward(self, hidden: Tensor) -> Tensor:
        """The MLP's output (B, S, D) for hidden states (B, S, D)."""
        if hidden.shape[1] <= self.tokens:
            whole: Tensor = self.mlp(hidden)
            return whole
        # An MLP works on each token alone, so cutting along S changes no value.
        output = torch.empty_like(hidden)
        for start in range(0, hidden.shape[1], self.tokens):
            part = slice(start, start + self.tokens)
            output[:, part] = self.mlp(hidden[:, part])
        return output
