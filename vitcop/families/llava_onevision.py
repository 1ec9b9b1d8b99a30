"""LLaVA-OneVision: SigLIP tower, projector, 27x27 patches pooled to 14x14 tokens, Qwen2 language model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from vitcop.budget import Geometry
from vitcop.cost import encoder_macs
from vitcop.families.base import Capture, Family, UnsupportedInputError
from vitcop.methods.base import Method
from vitcop.scores import received_attention
from vitcop.tokens import VisualTokens


class LlavaOnevision(Family):
    """Video inputs of `LlavaOnevisionForConditionalGeneration`.

    SigLIP has no CLS token: saliency is the attention that a patch receives, averaged over heads and queries, in the
    layer whose output the projector reads; keys are that layer's `k_proj` outputs. The model pools features to half
    the grid after the projector, bilinearly, so scores and keys go through the same interpolation. The newline
    embedding at the end of a video is always kept and counts as text.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    label: ClassVar[str] = "LLaVA-OneVision"

    def pixels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        if inputs.get("pixel_values") is not None:
            raise UnsupportedInputError(
                "images of LLaVA-OneVision (any-resolution tiles) can't be pruned; pass a picture as a one-frame video"
            )
        return inputs.get("pixel_values_videos")

    def geometry(self, inputs: Mapping[str, Any]) -> Geometry:
        frames = inputs["pixel_values_videos"].shape[1]
        side = math.ceil(self._patches / 2)
        return Geometry(num_layers=self.num_layers, frames=frames, height=side, width=side)

    @property
    def _patches(self) -> int:
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    def encode(self, inputs: Mapping[str, Any], method: Method, frame_chunk: int) -> Iterator[VisualTokens]:
        pixels = inputs["pixel_values_videos"]
        geometry = self.geometry(inputs)
        attention = self._vision_layer().self_attn
        wanted = method.needs_vision_attention or method.needs_vision_keys
        for first in range(0, geometry.frames, frame_chunk):
            chunk = pixels[:, first : first + frame_chunk]
            modules = {"queries": attention.q_proj, "keys": attention.k_proj} if wanted else {}
            with Capture(**modules) as captured:
                output = self.base.get_video_features(chunk, return_dict=True).pooler_output
            features = output[:, :-1].unflatten(1, (chunk.shape[1], -1))  # the last one is the newline
            batch = len(pixels)
            yield VisualTokens(
                features=features,
                height=geometry.height,
                width=geometry.width,
                attention=self._saliency(captured, batch) if method.needs_vision_attention else None,
                keys=self._pool(captured["keys"], batch) if method.needs_vision_keys else None,
                first_frame=first,
            )

    def _vision_layer(self) -> Any:
        tower = self.base.vision_tower
        layers = getattr(tower, "vision_model", tower).encoder.layers
        feature_layer = self.config.vision_feature_layer
        if not isinstance(feature_layer, int):
            feature_layer = feature_layer[-1]
        # hidden_states[i] is the output of layer i - 1; negative indices count from the last layer's output.
        return layers[feature_layer if feature_layer < 0 else feature_layer - 1]

    def _saliency(self, captured: Mapping[str, Tensor], batch: int) -> Tensor:
        vision = self.config.vision_config
        heads, dim = vision.num_attention_heads, vision.hidden_size // vision.num_attention_heads
        queries, keys = (captured[name].unflatten(-1, (heads, dim)).transpose(1, 2) for name in ("queries", "keys"))
        return self._pool(received_attention(queries, keys, dim**-0.5)[..., None], batch).squeeze(-1)

    def _pool(self, patches: Tensor, batch: int) -> Tensor:
        """Pool patch values (B * F, P, C) to the token grid as the model pools features -> (B, F, N, C)."""
        side = self._patches
        size = math.ceil(side / 2)
        grid = patches.transpose(1, 2).unflatten(-1, (side, side))
        pooled = functional.interpolate(grid, size=(size, size), mode="bilinear")
        return pooled.flatten(2).transpose(1, 2).unflatten(0, (batch, -1))

    def placeholders(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.config.video_token_id

    def fixed_features(self, batch: int, geometry: Geometry) -> Tensor | None:
        return self.base.image_newline.expand(batch, 1, -1)

    def vision_macs(self, geometry: Geometry) -> float:
        vision, width = self.config.vision_config, self.text_config.hidden_size
        patches = self._patches**2
        projector = patches * (vision.hidden_size * width + width * width)
        return geometry.frames * (encoder_macs(vision, patches) + projector)
