"""Saliency scores against their plain definitions."""

import pytest
import torch

from vitcop.ops import scores


def test_key_norm_is_the_norm_of_the_head_mean() -> None:
    keys = torch.randn(2, 4, 5, 8)
    torch.testing.assert_close(scores.key_norm(keys), keys.mean(dim=1).norm(dim=-1))


def test_key_norm_is_the_same_over_query_heads_and_shared_key_heads() -> None:
    keys = torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(scores.key_norm(keys), scores.key_norm(keys.repeat_interleave(7, dim=1)))


def test_key_distance_ignores_what_all_keys_share() -> None:
    keys = torch.randn(1, 2, 6, 8)
    torch.testing.assert_close(scores.key_distance(keys), scores.key_distance(keys + 100), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("elements", [1, 100, 1 << 24])
def test_received_attention_is_the_column_mean_whatever_the_block(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "BLOCK_ELEMENTS", elements)
    queries, keys = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)
    attention = (queries @ keys.transpose(-1, -2) * 0.5).softmax(dim=-1)
    received = scores.received_attention(queries, keys, 0.5)
    torch.testing.assert_close(received, attention.mean(dim=(1, 2)))
    torch.testing.assert_close(received.sum(dim=-1), torch.ones(2))


def test_attention_rows_share_key_heads_and_respect_the_mask() -> None:
    queries, keys = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 6, 8)
    mask = torch.arange(6)[None, None, None] < 4
    rows = scores.attention_rows(queries, keys, 0.3, mask)
    third = (queries[0, 2] @ keys[0, 1, :4].T * 0.3).softmax(dim=-1)
    torch.testing.assert_close(rows[0, 2, :, :4], third)
    assert not rows[..., 4:].any()
