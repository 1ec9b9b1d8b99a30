"""All selection work of one clip, against plain code with the same result: `python -m benchmarks.selection`.

Both sides do what ViTCoP does between the forward passes: attention scores to the best tokens of each frame, clusters
of their keys, key norms, quotas, merging, and the deep stage. The plain code follows the formulas with loops over
frames, tokens and clusters; "pairs" also loops over the pairs of tokens of a frame, "frames" has the distances of a
frame as one matrix. All must come to the same tokens, or nothing is reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.common import alternate, machine, publish, seconds
from vitcop import ViTCoP
from vitcop.budget import Geometry, Plan
from vitcop.selection import Selection, apply_selection
from vitcop.tokens import LayerTokens, VisualTokens

GOAL = 20
HEADS, HEAD_DIM = 4, 128  # key heads of the 7B models' language model
CUTOFF, SPATIAL_CUTOFF = 8.0, 0.6


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What the stages read, for V = frames * height * width visual tokens, batch 1.

    Attributes:
        attention: (1, F, N) attention that each token gets in the vision encoder.
        vision_keys: (1, F, N, d).
        features: (1, F, N, D) projected tokens.
        hidden: (1, V, D) hidden states before a layer; a stage reads as many as have survived.
        layer_keys: (1, G, V, d_h) keys of the layer before, likewise.
    """

    geometry: Geometry
    attention: Tensor
    vision_keys: Tensor
    features: Tensor
    hidden: Tensor
    layer_keys: Tensor

    def to(self, device: torch.device) -> Clip:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Clip(geometry=self.geometry, **tensors)


def make_clip(geometry: Geometry, vision_dim: int, dim: int, heads: int, head_dim: int, seed: int = 0) -> Clip:
    """Random tensors whose keys lie in blobs about one cut-off wide, so that densities differ."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    frames, count = geometry.frames, geometry.tokens_per_frame
    blobs = torch.randint(0, 12, (frames, count, 1), generator=generator).expand(-1, -1, vision_dim)
    centres = normal(frames, 12, vision_dim) * 16 / vision_dim**0.5
    return Clip(
        geometry=geometry,
        attention=torch.rand(1, frames, count, generator=generator),
        vision_keys=(centres.gather(1, blobs) + normal(frames, count, vision_dim) * 4 / vision_dim**0.5)[None],
        features=normal(1, frames, count, dim),
        hidden=normal(1, geometry.num_tokens, dim),
        layer_keys=normal(1, heads, geometry.num_tokens, head_dim),
    )


# -- the library -------------------------------------------------------------------------------------------------------


def select(method: ViTCoP, plan: Plan, clip: Clip) -> list[tuple[Tensor, Tensor]]:
    """Kept indices and token values after each of the three stages, by the method as `prune` calls it."""
    tokens = VisualTokens(
        features=clip.features,
        height=clip.geometry.height,
        width=clip.geometry.width,
        attention=clip.attention,
        keys=clip.vision_keys,
    )
    first = method.select_frames(tokens, plan, clip.geometry)
    stages = [(first.keep, apply_selection(first, clip.features.flatten(1, 2)))]
    labels = first.labels
    for layer in plan.layers:
        tokens_in = _layer_tokens(clip, layer, len(stages[-1][0][0]), labels)
        chosen: Selection = method.select_layer(tokens_in, plan, clip.geometry)
        stages.append((chosen.keep, apply_selection(chosen, tokens_in.features)))
        labels = None
    return stages


def _layer_tokens(clip: Clip, layer: int, count: int, labels: Tensor | None) -> LayerTokens:
    """The part of a layer's input that the method reads; nothing stands where it does not look."""
    index = torch.arange(count, device=clip.hidden.device)[None]
    unread: dict[str, Any] = {field.name: None for field in fields(LayerTokens)}
    read = {"layer": layer, "hidden": clip.hidden, "visual": index, "previous_keys": clip.layer_keys, "labels": labels}
    return LayerTokens(**(unread | read))


# -- plain code --------------------------------------------------------------------------------------------------------

Neighbours = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, list[int | None]]]
"""Of points (n, d) at positions (n, 2): distances (n, n), densities (n,), distances to the nearest denser point (n,)
and which one that is."""


def select_plainly(method: ViTCoP, plan: Plan, clip: Clip, neighbours: Neighbours) -> list[tuple[Tensor, Tensor]]:
    """The same stages, frame by frame and cluster by cluster."""
    geometry, count = clip.geometry, plan.entering // clip.geometry.frames
    clusters = method.clusters_per_frame(count, geometry)
    grid = [(y / geometry.height, x / geometry.width) for y in range(geometry.height) for x in range(geometry.width)]
    positions = torch.tensor(grid)
    kept, values, labels = [], [], []
    for frame in range(geometry.frames):
        best = clip.attention[0, frame].topk(count).indices.sort().values
        kept.append(best + frame * geometry.tokens_per_frame)
        values.append(clip.features[0, frame, best])
        near = neighbours(clip.vision_keys[0, frame, best], positions[best])
        labels.append(cluster_plainly(*near, clusters) + frame * clusters)
    stages = [(torch.cat(kept)[None], torch.cat(values)[None])]

    shallow, deep = plan.layers.values()
    norm = norm_plainly(clip, plan.entering)
    stages.append(shallow_plainly(norm, torch.cat(labels), shallow, clip.hidden[0]))
    chosen = norm_plainly(clip, shallow).topk(deep, largest=False).indices.sort().values
    stages.append((chosen[None], clip.hidden[:, chosen]))
    return stages


def pairs(points: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int | None]]:
    """Neighbours by a loop over pairs of tokens."""
    count = len(points)
    distance, density, delta = torch.zeros(count, count), torch.zeros(count), torch.full((count,), float("inf"))
    for token in range(count):
        for other in range(count):
            distance[token, other] = (points[token] - points[other]).norm()
        density[token] = (-((distance[token] / CUTOFF) ** 2)).exp().sum()
    parent: list[int | None] = [None] * count
    for token in range(count):
        for other in range(count):
            near = (positions[token] - positions[other]).norm() <= SPATIAL_CUTOFF
            if near and density[other] > density[token] and distance[token, other] < delta[token]:
                delta[token], parent[token] = distance[token, other], other
    return distance, density, delta, parent


def frames(points: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int | None]]:
    """Neighbours by matrices of a whole frame, and a loop over its tokens."""
    distance = (points[:, None] - points[None]).norm(dim=-1)
    near = (positions[:, None] - positions[None]).norm(dim=-1) <= SPATIAL_CUTOFF
    density = (-((distance / CUTOFF) ** 2)).exp().sum(dim=1)
    delta = torch.full((len(points),), float("inf"))
    parent: list[int | None] = [None] * len(points)
    for token in range(len(points)):
        candidates = torch.nonzero((density > density[token]) & near[token]).flatten()
        if len(candidates):
            nearest = candidates[distance[token, candidates].argmin()]
            delta[token], parent[token] = distance[token, nearest], int(nearest)
    return distance, density, delta, parent


def cluster_plainly(
    distance: Tensor, density: Tensor, delta: Tensor, parent: list[int | None], clusters: int
) -> Tensor:
    """Density-peak labels (n,) of one frame's tokens."""
    centres = (density * delta).argsort(descending=True, stable=True)[:clusters].tolist()
    labels: list[int | None] = [None] * len(density)
    for label, centre in enumerate(centres):
        labels[centre] = label
    for token in density.argsort(descending=True, stable=True).tolist():
        above = parent[token]
        if labels[token] is None and above is not None:
            labels[token] = labels[above]
    nearest = distance[:, centres].argmin(dim=1).tolist()
    return torch.tensor([near if label is None else label for label, near in zip(labels, nearest, strict=True)])


def norm_plainly(clip: Clip, count: int) -> Tensor:
    return clip.layer_keys[0, :, :count].mean(dim=0).norm(dim=-1)


def shallow_plainly(norm: Tensor, labels: Tensor, count: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Stage II: a quota of low-norm tokens for each cluster, the rest of it merged into its middle token."""
    members = [torch.nonzero(labels == label).flatten() for label in range(int(labels.max()) + 1)]
    values = {}
    for group, quota in zip(members, quotas_plainly(members, norm, count), strict=True):
        order = group[norm[group].argsort(stable=True)]
        for token in order[:quota]:
            values[int(token)] = hidden[token]
        rest = order[quota:].sort().values
        middle = rest[len(rest) // 2]
        values[int(middle)] = hidden[middle] + hidden[rest].mean(dim=0)
    keep = sorted(values)
    return torch.tensor([keep]), torch.stack([values[token] for token in keep])[None]


def quotas_plainly(members: list[Tensor], norm: Tensor, count: int) -> list[int]:
    """Tokens that each cluster keeps unmerged, in proportion to its size less one, the rounding evened out."""
    spare = torch.tensor([len(group) - 1 for group in members])
    free = count - len(members)
    quota = torch.minimum((spare / spare.sum() * free).round().long(), spare)
    by_norm = torch.stack([norm[group].sum() for group in members]).argsort(stable=True)
    missing = free - int(quota.sum())
    for cluster in by_norm if missing > 0 else by_norm.flip(0):
        if missing > 0 and quota[cluster] < spare[cluster]:
            quota[cluster] += 1
            missing -= 1
        elif missing < 0 and quota[cluster] > 0:
            quota[cluster] -= 1
            missing += 1
    return quota.tolist()


def check_same(ours: list[tuple[Tensor, Tensor]], plain: list[tuple[Tensor, Tensor]]) -> None:
    """Raise AssertionError unless both sides kept the same tokens, with the same values up to rounding."""
    for (keep, values), (plain_keep, plain_values) in zip(ours, plain, strict=True):
        torch.testing.assert_close(keep.cpu(), plain_keep, msg=lambda text: f"other tokens kept: {text}")
        torch.testing.assert_close(values.cpu(), plain_values, atol=1e-4, rtol=1e-4)


def compare(clip: Clip, keep_ratio: float, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of all sides at one keep ratio, after a check that they agree."""
    method = ViTCoP(retention_ratio=keep_ratio)
    plan = method.plan(clip.geometry)
    there, host = clip.to(device), torch.device("cpu")
    ours = select(method, plan, there)
    for neighbours in (pairs, frames):
        check_same(ours, select_plainly(method, plan, clip, neighbours))
    runs = {
        "vitcop": lambda: seconds(lambda: select(method, plan, there), device),
        "plain, pairs": lambda: seconds(lambda: select_plainly(method, plan, clip, pairs), host),
        "plain, frames": lambda: seconds(lambda: select_plainly(method, plan, clip, frames), host),
    }
    times = {name: statistics.median(values) for name, values in alternate(runs, repeats).items()}
    ratios = {name: value / times["vitcop"] for name, value in times.items() if name != "vitcop"}
    return {"keep_ratio": keep_ratio, "stages": plan.stages(), "seconds": times, "ratio": ratios}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and on what."""

    frames: int = 32
    grid: int = 14
    """Tokens along each side of a frame."""
    vision_dim: int = 1152
    """Width of the vision encoder's keys."""
    dim: int = 3584
    """Width of the language model."""
    keep_ratios: tuple[float, ...] = (0.1, 0.25, 0.5)
    repeats: int = 7
    threads: int = 1
    device: str = "cpu"
    """A torch device."""
    save: bool = False
    """Keep the result under benchmarks/results/."""


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.selection", description=__doc__)
    torch.set_num_threads(options.threads)
    geometry = Geometry(num_layers=28, frames=options.frames, height=options.grid, width=options.grid)
    clip = make_clip(geometry, options.vision_dim, options.dim, heads=HEADS, head_dim=HEAD_DIM)
    results = [compare(clip, ratio, options.repeats, torch.device(options.device)) for ratio in options.keep_ratios]
    widths = {"vision_dim": options.vision_dim, "dim": options.dim, "heads": HEADS, "head_dim": HEAD_DIM}
    result = {
        "benchmark": "selection",
        "machine": machine(torch.device(options.device)),
        "shape": vars(geometry) | widths,
        "goal": {"ratio to plain, pairs": GOAL},
        "results": results,
    }
    publish("selection", result, options.save)


if __name__ == "__main__":
    main()
