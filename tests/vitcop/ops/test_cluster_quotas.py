"""Sharing a budget out over clusters, against a plain loop."""

import pytest
import torch
from torch import Tensor

from vitcop.ops.cluster_quotas import select_in_clusters
from vitcop.selection import apply_selection


def plain_select(saliency: Tensor, labels: Tensor, count: int) -> tuple[set[int], list[list[int]]]:
    """Stage II cluster by cluster: indices kept as they are, and the merged groups."""
    names = sorted(set(labels.tolist()))
    groups = {name: [i for i in range(len(labels)) if labels[i] == name] for name in names}
    total = {name: float(saliency[groups[name]].sum()) for name in names}
    if len(names) > count:
        best = sorted(names, key=lambda name: -total[name])[: count - 1]
        rest = sorted(i for name in names if name not in best for i in groups[name])
        return set(), [groups[name] for name in best] + [rest]
    spare, weight = count - len(names), len(labels) - len(names)
    quota = {name: round((len(groups[name]) - 1) / max(weight, 1) * spare) for name in names}
    missing = spare - sum(quota.values())
    for name in sorted(names, key=lambda name: -total[name] if missing > 0 else total[name]):
        if missing > 0 and quota[name] < len(groups[name]) - 1:
            quota[name], missing = quota[name] + 1, missing - 1
        elif missing < 0 and quota[name] > 0:
            quota[name], missing = quota[name] - 1, missing + 1
    kept: set[int] = set()
    merged = []
    for name in names:
        by_saliency = sorted(groups[name], key=lambda i: -float(saliency[i]))
        kept |= set(by_saliency[: quota[name]])
        merged.append(sorted(by_saliency[quota[name] :]))
    return kept, merged


@pytest.mark.parametrize("count", [1, 4, 6, 7, 11, 25, 39, 40])
@pytest.mark.parametrize("seed", range(3))
def test_stage_two_equals_the_plain_loop(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(7), torch.randint(7, (33,), generator=generator)])[None]
    saliency, hidden = torch.rand(1, 40, generator=generator), torch.randn(1, 40, 5, generator=generator)
    selection = select_in_clusters(saliency, labels, 7, count)
    kept, groups = plain_select(saliency[0], labels[0], count)
    middles = {group[len(group) // 2]: group for group in groups}
    assert selection.keep[0].tolist() == sorted(kept | set(middles))
    survivors = apply_selection(selection, hidden)[0]
    for slot, index in enumerate(selection.keep[0].tolist()):
        extra = hidden[0, middles[index]].mean(dim=0) if index in middles else 0
        torch.testing.assert_close(survivors[slot], hidden[0, index] + extra)


def test_stage_two_treats_rows_apart() -> None:
    labels = torch.cat([torch.arange(5), torch.randint(5, (15,))]).expand(2, -1)
    saliency = torch.rand(2, 20)
    both = select_in_clusters(saliency, labels, 5, 9)
    for row in range(2):
        alone = select_in_clusters(saliency[row : row + 1], labels[row : row + 1], 5, 9)
        assert torch.equal(alone.keep[0], both.keep[row])
