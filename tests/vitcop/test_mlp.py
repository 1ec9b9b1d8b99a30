"""An MLP in chunks of tokens."""

import pytest
import torch
from torch import nn

from vitcop.mlp import TokenChunks


@pytest.mark.parametrize("length", [1, 4, 5, 8, 11])
def test_chunks_give_what_the_whole_gives_and_never_see_more_tokens(length: int) -> None:
    mlp, seen = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 6)), []
    handle = mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    hidden = torch.randn(2, length, 6)
    chunked = TokenChunks(mlp, 4)(hidden)
    handle.remove()
    assert max(seen) <= 4
    assert sum(seen) == length
    torch.testing.assert_close(chunked, mlp(hidden))
