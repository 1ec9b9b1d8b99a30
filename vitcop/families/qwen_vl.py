"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: their own ViT, 2x2 patches merged into a token, M-RoPE language model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from vitcop.budget import Geometry
from vitcop.cost import linear_macs
from vitcop.errors import UnsupportedInputError
from vitcop.families.base import Capture, Family, Inputs, VideoModel, joined
from vitcop.language import rotate
from vitcop.ops.scores import received_attention
from vitcop.tokens import Needs, VisualTokens


class QwenVL(Family):
    """Videos, or pictures as clips of one frame, one for each prompt of the batch and all of one grid.

    A frame of tokens is a temporal slice, which merges `temporal_patch_size` frames of the video. The tower attends
    within a slice only, so chunks of slices are exact. It has no CLS: saliency is the attention that a patch receives
    on average in the last block that sees the whole slice, from rotated queries and keys; keys are that block's
    `k_proj` outputs. Both are averaged over the patches that the merger makes one token of.
    """

    visual_inputs: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "pixel_values_videos",
        "image_grid_thw",
        "video_grid_thw",
    )

    def __init__(self, model: VideoModel) -> None:
        super().__init__(model)
        self.visual: Any = self.base.visual
        self.vision: Any = self.config.vision_config

    # -- inputs -----------------------------------------------------------------------------------------------------

    def pixels(self, inputs: Inputs) -> Tensor | None:
        videos, pictures = inputs.get("pixel_values_videos"), inputs.get("pixel_values")
        if videos is not None and pictures is not None:
            raise UnsupportedInputError(
                f"videos together with pictures can't be pruned on {self.label}; pass the pictures as videos"
            )
        return pictures if videos is None else videos

    def _grid(self, inputs: Inputs) -> Tensor:
        name = "image_grid_thw" if inputs.get("pixel_values_videos") is None else "video_grid_thw"
        if inputs.get(name) is None:
            raise UnsupportedInputError(f"pass {name} together with the pixels, as the processor returns them")
        return inputs[name]

    def geometry(self, inputs: Inputs) -> Geometry:
        # Read from the device once a prefill, before the tower has any work queued.
        grids = self._grid(inputs).tolist()
        if any(grid != grids[0] for grid in grids):
            raise UnsupportedInputError(
                f"all clips of a batch must have one grid (time, height, width), got {grids}; "
                "put other lengths or sizes into other batches"
            )
        merge = self.vision.spatial_merge_size
        frames, height, width = grids[0]
        return Geometry(
            num_layers=self.language.num_layers, frames=frames, height=height // merge, width=width // merge
        )

    def placeholders(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.config.video_token_id) | (input_ids == self.config.image_token_id)

    def position_ids(self, inputs: Inputs) -> Tensor:
        compute = self.base.compute_3d_position_ids
        # Versions differ in what this method asks for; it gets those of its arguments that the caller passed.
        names = inspect.signature(compute).parameters
        positions = compute(**{name: inputs.get(name) for name in names})
        return super().position_ids(inputs) if positions is None else positions

    # -- the tower --------------------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        """Width of the tower's hidden states."""
        return self.vision.hidden_size

    @property
    def _score_block(self) -> Any:
        """The last block whose attention spans the whole slice."""
        return self.visual.blocks[-1]

    def encode(self, inputs: Inputs, geometry: Geometry, needs: Needs, frame_chunk: int) -> Iterator[VisualTokens]:
        grid, pixels = self._grid(inputs), self.pixels(inputs)
        assert pixels is not None
        # (B, slices, patches of a slice, channels of a patch): the processor lays all clips out in one list
        slices = pixels.unflatten(0, (len(grid), geometry.frames, -1))
        # `frame_chunk` counts frames of the video, of which a slice holds several.
        step = max(1, frame_chunk // self.vision.temporal_patch_size)
        for first in range(0, geometry.frames, step):
            yield self._encode_chunk(slices[:, first : first + step], grid, first, geometry, needs)

    def _encode_chunk(self, slices: Tensor, grid: Tensor, first: int, geometry: Geometry, needs: Needs) -> VisualTokens:
        # (B, slices, tokens of a slice)
        shape = (*slices.shape[:2], geometry.tokens_per_frame)
        # The tower is told that each clip has as many slices as this chunk.
        grid = torch.cat((torch.full_like(grid[:, :1], slices.shape[1]), grid[:, 1:]), dim=1)
        # Scores come from one block, whose projections are watched while it runs.
        wanted = needs.attention or needs.keys
        modules = {"qkv": self._score_block.attn.qkv, "rotary": self.visual.rotary_pos_emb} if wanted else {}
        with Capture(**modules) as captured:
            output = self.base.get_video_features(slices.flatten(0, 2), grid, return_dict=True)
        return VisualTokens(
            features=joined(output.pooler_output).unflatten(0, shape),
            height=geometry.height,
            width=geometry.width,
            attention=self._saliency(captured, grid, shape) if needs.attention else None,
            keys=self._keys(captured, grid, shape) if needs.keys else None,
            first_frame=first,
            deepstack=tuple(joined(side).unflatten(0, shape) for side in self._deepstack(output)),
        )

    def _deepstack(self, output: Any) -> Sequence[Tensor | Iterable[Tensor]]:
        return []

    def _queries_and_keys(self, captured: Mapping[str, Tensor], grid: Tensor) -> tuple[Tensor, Tensor]:
        """Unrotated queries and keys (patches, heads, d_h) in the order of the pixels."""
        # (patches, 3 * heads * d_h) -> (patches, 3, heads, d_h)
        qkv = captured["qkv"].unflatten(-1, (3, self.vision.num_heads, -1))
        queries, keys, _ = self._unpermuted(qkv, grid).unbind(1)
        return queries, keys

    def _unpermuted(self, patches: Tensor, grid: Tensor) -> Tensor:
        """Patch values in the order of the pixels, from the order in which the blocks see them."""
        return patches

    def _keys(self, captured: Mapping[str, Tensor], grid: Tensor, shape: tuple[int, ...]) -> Tensor:
        _, keys = self._queries_and_keys(captured, grid)
        return self._merged(keys.flatten(1), shape)

    def _saliency(self, captured: Mapping[str, Tensor], grid: Tensor, shape: tuple[int, ...]) -> Tensor:
        queries, keys = self._queries_and_keys(captured, grid)
        # Attention spans one slice, so slices become the batch: (B * F, patches, ...)
        slices = (shape[0] * shape[1], -1)
        cos, sin = (part.float().unflatten(0, slices) for part in captured["rotary"])
        # (B * F, heads, patches, d_h), rotated as the block does it
        queries, keys = (
            rotate(states.float().unflatten(0, slices).transpose(1, 2), (cos, sin)) for states in (queries, keys)
        )
        attention = received_attention(queries, keys, queries.shape[-1] ** -0.5)
        return self._merged(attention.view(-1, 1), shape).squeeze(-1)

    def _merged(self, patches: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Patch values (patches, C), of which those of one token follow each other, averaged: (B, F, N, C)."""
        return patches.unflatten(0, (*shape, -1)).mean(dim=3)

    # -- cost -------------------------------------------------------------------------------------------------------

    def vision_macs(self, geometry: Geometry) -> float:
        merge = self.vision.spatial_merge_size
        height, width = geometry.height * merge, geometry.width * merge
        patches = height * width
        weights = linear_macs(self.visual.blocks) + self.visual.patch_embed.proj.weight.numel()
        # A pair of query and key costs d multiply-adds for its logit and d for its value.
        pairs = sum(self._attended(block, height, width) for block in range(len(self.visual.blocks)))
        mergers = [self.visual.merger, getattr(self.visual, "deepstack_merger_list", None)]
        merged = sum(linear_macs(merger) for merger in mergers if merger is not None)
        slice_macs = patches * weights + 2 * pairs * self._width + geometry.tokens_per_frame * merged
        return float(geometry.frames * slice_macs)

    def _attended(self, block: int, height: int, width: int) -> int:
        """Pairs of query and key that a block computes in one slice."""
        return (height * width) ** 2


class Qwen2VL(QwenVL):
    """`Qwen2VLForConditionalGeneration`."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    label: ClassVar[str] = "Qwen2-VL"

    @property
    def _width(self) -> int:
        return self.vision.embed_dim


class Qwen2_5VL(QwenVL):
    """`Qwen2_5_VLForConditionalGeneration`: most blocks see windows, so the patches are reordered by window."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    label: ClassVar[str] = "Qwen2.5-VL"

    @property
    def _score_block(self) -> Any:
        return self.visual.blocks[max(self.vision.fullatt_block_indexes)]

    def _unpermuted(self, patches: Tensor, grid: Tensor) -> Tensor:
        vision = self.vision
        window_index, _ = get_vision_window_index(
            grid,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        # (groups,) where each 2x2 group stands among the blocks' groups; the four patches of a group stay together.
        order = window_index.argsort().to(patches.device)
        return patches.unflatten(0, (len(order), -1))[order].flatten(0, 1)

    def _attended(self, block: int, height: int, width: int) -> int:
        if block in self.vision.fullatt_block_indexes:
            return super()._attended(block, height, width)
        side = self.vision.window_size // self.vision.patch_size
        # Windows at the right and lower edge are smaller; the sum over windows of their area squared.
        rows, columns = (
            sum(min(side, size - start) ** 2 for start in range(0, size, side)) for size in (height, width)
        )
        return rows * columns


class Qwen3VL(QwenVL):
    """`Qwen3VLForConditionalGeneration`: time stamps between the frames, and deepstack features beside the tokens.

    What the model adds to the hidden states after its first layers is selected, and before the model also merged, like
    the tokens. A token merged inside the model gets from then on what belongs to its own place.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    label: ClassVar[str] = "Qwen3-VL"

    def _deepstack(self, output: Any) -> Sequence[Tensor | Iterable[Tensor]]:
        return output.deepstack_features
