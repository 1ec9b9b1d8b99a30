"""SparseVLM (arXiv 2410.04417): tokens that the question's telling words look at, and a few merged ones."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcop.budget import Geometry, Plan, scaled_layers, solve_stages
from vitcop.methods.base import Method
from vitcop.methods.before import required
from vitcop.ops.clustering import pairwise_distance
from vitcop.selection import Selection, take, true_indices
from vitcop.tokens import LayerTokens, Needs

PROPORTIONS = (300, 200, 110)
"""Tokens left after each stage, in the authors' budget of 192 of 576."""
ROW_BLOCK = 32
"""Attention rows that exist at a time."""


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Method):
    """In three layers, keep the visual tokens that the question's raters attend to, and merge some of the others.

    Raters are the question's tokens to which the visual tokens' embeddings, by a softmax of dot products, are closer
    than on average. A visual token's score is the attention it gets from them, mean over heads, in the layer just
    run. Of the tokens dropped, the best 30 % are clustered by density peaks on their hidden states, and each cluster
    stays as the mean of its tokens; these count as kept. The layers before the first stage see all tokens.
    Question-aware.

    Deviations (of version 1.0 of the code): positions stay the original ones, and a merged token stands at its
    cluster's centre (the authors put merged tokens last and renumber); equal densities are told apart by score (the
    authors draw random numbers); a question whose tokens are all alike has them all as raters.

    Attributes:
        layers: the layers before which tokens are dropped; by default after those at the depths of 2, 6 and 15 of 32.
    """

    name: ClassVar[str] = "sparsevlm"
    query_aware: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(previous_hidden=True, embeds=True)

    layers: tuple[int, ...] | None = None

    def plan(self, geometry: Geometry) -> Plan:
        layers = scaled_layers((3, 7, 16), geometry.num_layers) if self.layers is None else self.layers
        if len(layers) != len(PROPORTIONS):
            raise ValueError(f"SparseVLM has {len(PROPORTIONS)} stages, got layers {tuple(layers)}")

        def counts(scale: float) -> list[int]:
            kept = [geometry.num_tokens]
            # In the published proportions, but at least one token beside the merged ones, and never more than before.
            for proportion in PROPORTIONS:
                wanted = int(geometry.num_tokens * scale * proportion / PROPORTIONS[-1])
                kept.append(min(max(wanted, self.least(kept[-1])), kept[-1]))
            return kept[1:]

        return solve_stages(geometry, self.retention_ratio, layers, counts)

    def least(self, entering: int) -> int:
        """Fewest tokens that a stage can leave of `entering`: one, and those merged from the others."""
        return 1 + clusters_of(entering - 1)

    def select_layer(self, tokens: LayerTokens, plan: Plan, geometry: Geometry) -> Selection:
        entering, left = tokens.visual.shape[1], plan.layers[tokens.layer]
        # Merged tokens count as kept, and their number depends on how many are dropped: the largest count that fits.
        kept = next(kept for kept in range(left, 0, -1) if kept + clusters_of(entering - kept) == left)
        score = visual_scores(tokens, raters(tokens))
        return recycle(tokens.features, score, kept).selection(entering)


def raters(tokens: LayerTokens) -> Tensor:
    """Mask (B, T) of the raters among the last T tokens of the sequence, T being the number that are not visual."""
    embeds, visual = required(tokens.embeds, "embeddings"), required(tokens.embeds_visual, "embeddings")
    count = embeds.shape[1] - visual.shape[1]
    question = tokens.question[:, -count:]
    # (B, T) closeness of each text token to the picture; those above the question's mean are raters
    score = rater_scores(take(embeds, visual), embeds[:, -count:], question)
    mean = score.sum(dim=1, keepdim=True) / question.sum(dim=1, keepdim=True)
    rater = score > mean
    return torch.where(rater.any(dim=1, keepdim=True), rater, question)


def rater_scores(visual: Tensor, text: Tensor, question: Tensor) -> Tensor:
    """Closeness (B, T) of text (B, T, D) to visual embeddings (B, K, D): softmax over the question, mean over visual.

    `question` (B, T) is False at tokens that are not part of it, which score 0.
    """
    # (B, K, T)
    logits = visual.float() @ text.float().transpose(1, 2)
    return logits.masked_fill(~question[:, None], float("-inf")).softmax(dim=-1).mean(dim=1)


def visual_scores(tokens: LayerTokens, rater: Tensor) -> Tensor:
    """Attention (B, K) of each visual token from the `rater` (B, T) rows, mean over them and heads."""
    total = sum_of(attention for _, attention in rater_attention(tokens, rater))
    return total.mean(dim=1) / rater.sum(dim=1, keepdim=True)


def rater_attention(tokens: LayerTokens, rater: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The last T rows of the sequence, block by block: their positions (B, rows), and the attention (B, H, rows, K)
    that they pay to the visual tokens in the layer before, zero in rows that are not raters.
    """
    length, count = tokens.hidden.shape[1], rater.shape[1]
    # (B, T) the last T positions, a few at a time, so that no full attention map exists
    rows = torch.arange(length - count, length, device=rater.device).expand(len(rater), -1)
    for block, mask in zip(rows.split(ROW_BLOCK, dim=1), rater.split(ROW_BLOCK, dim=1), strict=True):
        # Filled, not multiplied: rows of padding see nothing, and their softmax is not a number.
        yield block, tokens.attention_to_visual(block, own_layer=False).masked_fill(~mask[:, None, :, None], 0)


def sum_of(blocks: Iterable[Tensor]) -> Tensor:
    """Sum of attention blocks (B, H, rows, K) over their rows: (B, H, K)."""
    return functools.reduce(operator.add, (block.sum(dim=2) for block in blocks))


def clusters_of(dropped: int) -> int:
    """Clusters that the best of `dropped` tokens are merged into."""
    return candidates_of(dropped) // 10 + 1


def candidates_of(dropped: int) -> int:
    """How many of `dropped` tokens take part in merging."""
    return int(0.3 * dropped) + 1


@dataclass(frozen=True)
class Recycled:
    """Which of V tokens a stage keeps, and how those dropped are merged.

    Attributes:
        kept: (B, k) ascending indices.
        candidates: (B, c) indices of the dropped tokens of highest score, in falling order.
        density, cluster_score: (B, c).
        centres: (B, C) places among the candidates, by falling cluster score.
        cluster: (B, c) cluster of each candidate.
    """

    kept: Tensor
    candidates: Tensor
    density: Tensor
    cluster_score: Tensor
    centres: Tensor
    cluster: Tensor

    def selection(self, entering: int) -> Selection:
        """Keep, of `entering` tokens, those kept and the clusters' centres, which become their clusters' means."""
        # (B, C) indices among the V tokens
        centre = self.candidates.gather(1, self.centres)
        mask = torch.zeros(len(centre), entering, dtype=torch.bool, device=centre.device)
        mask.scatter_(1, self.kept, True).scatter_(1, centre, True)
        # (B, c) place among the kept tokens of each candidate's cluster centre
        slot = (mask.long().cumsum(dim=1) - 1).gather(1, centre).gather(1, self.cluster)
        merge_into = torch.full_like(mask, -1, dtype=torch.int64).scatter_(1, self.candidates, slot)
        return Selection(keep=true_indices(mask, self.kept.shape[1] + centre.shape[1]), merge_into=merge_into)


def recycle(features: Tensor, score: Tensor, kept: int, noise: Tensor | None = None) -> Recycled:
    """Keep the `kept` tokens of highest score, and cluster the best of the others around density peaks.

    The density of a candidate is `exp(-mean squared distance to its C nearest)`, itself among them, where C is the
    number of clusters; its cluster score is the density times the distance to the nearest denser candidate.

    Args:
        features: (B, V, D) hidden states.
        score: (B, V); kept < V.
        noise: (B, c) numbers from 0 to 1 that tell equal densities apart; by default they fall with the score.
    """
    dropped = score.shape[1] - kept
    count, clusters = candidates_of(dropped), clusters_of(dropped)
    # The best stay, the next best are candidates for merging: (B, c).
    order = score.argsort(dim=1, descending=True, stable=True)
    candidates = order[:, kept : kept + count]
    distance = pairwise_distance(take(features, candidates)) / features.shape[-1] ** 0.5
    # Two tokens nearest to each other are equally dense only if their distance is the same both ways, to the bit.
    distance = torch.maximum(distance, distance.transpose(1, 2))
    if noise is None:
        noise = torch.linspace(1, 0, count, device=score.device)
    # (B, c, clusters), itself among them
    nearest = distance.topk(clusters, dim=2, largest=False).values
    density = (-nearest.square().mean(dim=2)).exp() + noise * 1e-6
    denser = density[:, None, :] > density[:, :, None]
    # (B, c) distance to the nearest denser one; the densest has the largest distance there is
    delta = torch.where(denser, distance, distance.amax(dim=(1, 2), keepdim=True)).amin(dim=2)
    cluster_score = delta * density
    centres = cluster_score.argsort(dim=1, descending=True, stable=True)[:, :clusters]
    # Every candidate joins the nearest centre, a centre itself.
    number = torch.arange(clusters, device=score.device).expand_as(centres)
    cluster = take(distance, centres).argmin(dim=1).scatter(1, centres, number)
    return Recycled(order[:, :kept].sort(dim=1).values, candidates, density, cluster_score, centres, cluster)
