"""A selection applied to tokens, and the index helpers."""

import torch

from vitcop.selection import Selection, apply_selection, take, top_k_in_order, true_indices


def test_take_gathers_along_the_token_axis() -> None:
    tokens = torch.randn(2, 5, 3)
    index = torch.tensor([[0, 4], [3, 3]])
    assert torch.equal(take(tokens, index)[1], tokens[1, [3, 3]])


def test_without_merging_the_kept_tokens_are_unchanged() -> None:
    tokens = torch.randn(1, 4, 3)
    kept = apply_selection(Selection(keep=torch.tensor([[1, 3]])), tokens)
    assert torch.equal(kept, tokens[:, [1, 3]])


def test_mean_merge_is_the_mean_of_the_group_and_authors_merge_adds_it() -> None:
    tokens = torch.randn(1, 5, 3)
    keep, into = torch.tensor([[1, 3]]), torch.tensor([[0, 0, 0, -1, -1]])
    mean = apply_selection(Selection(keep=keep, merge_into=into, merge="mean"), tokens)
    authors = apply_selection(Selection(keep=keep, merge_into=into, merge="authors"), tokens)
    group = tokens[0, :3].mean(dim=0)
    torch.testing.assert_close(mean[0, 0], group)
    torch.testing.assert_close(authors[0, 0], tokens[0, 1] + group)
    assert torch.equal(mean[0, 1], tokens[0, 3]), "a slot without a group keeps its token"


def test_finished_features_replace_the_gather() -> None:
    features = torch.randn(1, 2, 3)
    selection = Selection(keep=torch.tensor([[0, 1]]), features=features)
    assert torch.equal(apply_selection(selection, torch.zeros(1, 4, 3)), features)


def test_top_k_is_ascending_and_gives_ties_to_the_lower_index() -> None:
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    assert top_k_in_order(score, 2).tolist() == [[1, 2]]
    assert top_k_in_order(score, 4).tolist() == [[1, 2, 3, 4]]


def test_true_indices_are_the_places_of_true() -> None:
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    assert true_indices(mask, 2).tolist() == [[0, 2], [2, 3]]
