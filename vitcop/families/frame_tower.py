"""What families share whose vision tower sees every frame alone: CLIP, SigLIP and InternViT encoders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from vitcop.budget import Geometry
from vitcop.cost import EncoderConfig, encoder_macs, linear_macs
from vitcop.errors import UnsupportedInputError, UnsupportedModelError
from vitcop.families.base import Capture, Family, Inputs, VideoModel
from vitcop.ops.scores import attention_rows, received_attention
from vitcop.tokens import Needs, VisualTokens


class TowerConfig(EncoderConfig, Protocol):
    """What is read of a tower's config."""

    model_type: str
    num_attention_heads: int
    image_size: Any  # one number, or height and width apart in InternViT's
    patch_size: Any


class FrameTower(Family):
    """Frames go through the tower independently, so any chunking of them is exact.

    Scores come from the layer whose output the projector reads: the attention that CLS pays to each patch (the paper),
    or, in SigLIP, which has no CLS, the attention a patch receives on average. Keys are that layer's keys. Where the
    model pools patches into tokens, both go through the same pooling.
    """

    towers: ClassVar[tuple[str, ...]] = ("clip_vision_model", "siglip_vision_model")
    """Model types of the vision towers that the adapter knows."""

    def __init__(self, model: VideoModel) -> None:
        super().__init__(model)
        self.vision: TowerConfig = self.config.vision_config
        if self.vision.model_type not in self.towers:
            raise UnsupportedModelError(
                f"{type(model).__name__} with vision tower {self.vision.model_type!r} can't be pruned; "
                f"{self.label} is known with {', '.join(self.towers)}"
            )

    # -- what differs between these families ------------------------------------------------------------------------

    @abstractmethod
    def frames(self, inputs: Inputs, geometry: Geometry) -> Tensor:
        """(B, F, channels, height, width) pixels."""

    @abstractmethod
    def project(self, frames: Tensor) -> Tensor:
        """(B, F, N, D) tokens of frames (B, F, ...), by the model's own method; (B, F, 1 + N, D) if CLS stays."""

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a frame's token grid."""
        return self.patch_grid

    def pool(self, patches: Tensor) -> Tensor:
        """Pool patch values (M, C, height, width) as the model pools patches into tokens."""
        return patches

    # -- the tower --------------------------------------------------------------------------------------------------

    @property
    def has_cls(self) -> bool:
        return self.vision.model_type != "siglip_vision_model"

    @property
    def keeps_cls(self) -> bool:
        """Whether the CLS token of each frame enters the language model."""
        strategy: str = self.config.vision_feature_select_strategy
        return self.has_cls and strategy == "full"

    @property
    def patch_grid(self) -> tuple[int, int]:
        side = self.vision.image_size // self.vision.patch_size
        return side, side

    def patches(self, geometry: Geometry) -> tuple[int, int]:
        """Height and width of the patch grid that a clip's frames are cut into."""
        return self.patch_grid

    @property
    def tower(self) -> Any:
        return self.base.vision_tower

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        return self.tower.encoder.layers

    def queries_and_keys(self, layer: Any) -> dict[str, nn.Module]:
        """The modules of a vision layer that put out queries and keys (M, tokens, heads * d_h)."""
        return {"queries": layer.self_attn.q_proj, "keys": layer.self_attn.k_proj}

    def _feature_layer(self) -> nn.Module:
        """The layer whose output the projector reads (the last of them, where it reads several)."""
        index = self.config.vision_feature_layer
        index = index if isinstance(index, int) else index[-1]
        # hidden_states[i] is the output of layer i - 1; negative indices count from the last layer's output.
        return self.vision_layers[index if index < 0 else index - 1]

    # -- encoding ---------------------------------------------------------------------------------------------------

    def _geometry(self, frames: int) -> Geometry:
        height, width = self.grid
        return Geometry(
            num_layers=self.language.num_layers,
            frames=frames,
            height=height,
            width=width,
            fixed=frames * self.keeps_cls,
        )

    def encode(self, inputs: Inputs, geometry: Geometry, needs: Needs, frame_chunk: int) -> Iterator[VisualTokens]:
        frames = self.frames(inputs, geometry)
        for first in range(0, geometry.frames, frame_chunk):
            yield self._encode_chunk(frames[:, first : first + frame_chunk].contiguous(), first, geometry, needs)

    def _encode_chunk(self, frames: Tensor, first: int, geometry: Geometry, needs: Needs) -> VisualTokens:
        wanted = needs.attention or needs.keys
        modules = self.queries_and_keys(self._feature_layer()) if wanted else {}
        with Capture(**modules) as captured:
            tokens = self.project(frames)
        return VisualTokens(
            features=tokens[:, :, 1:] if self.keeps_cls else tokens,
            height=geometry.height,
            width=geometry.width,
            attention=self._saliency(captured, len(frames)) if needs.attention else None,
            keys=self._keys(captured, len(frames)) if needs.keys else None,
            first_frame=first,
            fixed=tokens[:, :, 0] if self.keeps_cls else None,
        )

    def _saliency(self, captured: Mapping[str, Tensor], batch: int) -> Tensor:
        heads = self.vision.num_attention_heads
        queries, keys = (captured[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("queries", "keys"))
        scale = queries.shape[-1] ** -0.5
        if self.has_cls:
            attention = attention_rows(queries[:, :, :1], keys, scale)[:, :, 0, 1:].mean(dim=1)
        else:
            attention = received_attention(queries, keys, scale)
        return self._to_tokens(attention[..., None], batch).squeeze(-1)

    def _keys(self, captured: Mapping[str, Tensor], batch: int) -> Tensor:
        keys = captured["keys"]
        return self._to_tokens(keys[:, 1:] if self.has_cls else keys, batch)

    def _to_tokens(self, patches: Tensor, batch: int) -> Tensor:
        """Patch values (B * F, P, C) at the token grid: (B, F, N, C)."""
        grid = patches.transpose(1, 2).unflatten(-1, self.patch_grid)
        return self.pool(grid).flatten(2).transpose(1, 2).unflatten(0, (batch, -1))

    def token_offsets(self, geometry: Geometry) -> Tensor:
        if not self.keeps_cls:
            return super().token_offsets(geometry)
        count = geometry.tokens_per_frame
        return torch.arange(geometry.frames * (count + 1)).view(-1, count + 1)[:, 1:].flatten()

    def vision_macs(self, geometry: Geometry) -> float:
        height, width = self.patches(geometry)
        tower = encoder_macs(self.vision, height * width, extra=int(self.has_cls))
        return geometry.frames * (tower + self._projected(geometry) * linear_macs(self.base.multi_modal_projector))

    def _projected(self, geometry: Geometry) -> int:
        """Tokens of a frame that the projector sees."""
        return geometry.tokens_per_frame + int(self.keeps_cls)


class VideoTower(FrameTower):
    """Clips come as `pixel_values_videos` (B, F, channels, height, width)."""

    def pixels(self, inputs: Inputs) -> Tensor | None:
        if inputs.get("pixel_values") is not None:
            raise UnsupportedInputError(
                f"pictures (pixel_values) of {self.label} can't be pruned; pass a picture as a video of one frame"
            )
        return inputs.get("pixel_values_videos")

    def geometry(self, inputs: Inputs) -> Geometry:
        return self._geometry(inputs["pixel_values_videos"].shape[1])

    def frames(self, inputs: Inputs, geometry: Geometry) -> Tensor:
        return inputs["pixel_values_videos"]

    def placeholders(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.config.video_token_id


class PictureTower(FrameTower):
    """Everything comes as pictures `pixel_values` (M, channels, height, width); those of a prompt are its frames."""

    def pixels(self, inputs: Inputs) -> Tensor | None:
        return inputs.get("pixel_values")

    def geometry(self, inputs: Inputs) -> Geometry:
        height, width = self.grid
        length = height * width + int(self.keeps_cls)
        count = int(self.placeholders(inputs["input_ids"][0]).sum())
        pictures = len(inputs["pixel_values"])
        if count == 0 or count % length or pictures % (count // length):
            raise UnsupportedInputError(
                f"{count} placeholder tokens in the first prompt and {pictures} pictures of {length} tokens don't "
                "match; every prompt of the batch must hold the same number of whole pictures"
            )
        return self._geometry(count // length)

    def frames(self, inputs: Inputs, geometry: Geometry) -> Tensor:
        return inputs["pixel_values"].unflatten(0, (-1, geometry.frames))

    def placeholders(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.config.image_token_id

    def project(self, frames: Tensor) -> Tensor:
        output = self.base.get_image_features(frames.flatten(0, 1), return_dict=True).pooler_output
        tokens = output if isinstance(output, Tensor) else torch.stack(list(output))
        return tokens.unflatten(0, frames.shape[:2])
