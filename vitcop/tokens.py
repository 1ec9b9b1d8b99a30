"""The tokens that a method chooses among: before the language model, and inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vitcop.language import LanguageModel, Rotary
from vitcop.ops.scores import attention_rows
from vitcop.selection import take


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method reads beside the tokens themselves; the rest is not computed or kept for it.

    Attributes:
        attention, keys: of the vision tower, see VisualTokens.
        previous_hidden, embeds: of the language model, see LayerTokens.
    """

    attention: bool = False
    keys: bool = False
    previous_hidden: bool = False
    embeds: bool = False


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """Visual tokens of B clips as the projector made them; all frames of a clip, or a run of consecutive ones.

    Attributes:
        features: (B, F, N, D), as the language model would receive them.
        height, width: token grid of a frame, N = height * width, raster order.
        attention: (B, F, N) or None. Attention each token's patches get from CLS, or on average from all patches,
            in the vision layer that feeds the projector, pooled to the token grid.
        keys: (B, F, N, d) or None. `k_proj` outputs of that layer (heads concatenated), pooled likewise.
        first_frame: number of the first frame here within the clip.
        deepstack: side features (B, F, N, D) that the model adds to the hidden states after its layers 0, 1, ...
        fixed: (B, X, D) or None. What the model puts into these frames' other placeholders (a CLS token, a separator),
            in their order; always kept.
    """

    features: Tensor
    height: int
    width: int
    attention: Tensor | None = None
    keys: Tensor | None = None
    first_frame: int = 0
    deepstack: Sequence[Tensor] = ()
    fixed: Tensor | None = None

    @property
    def frames(self) -> int:
        return self.features.shape[1]


@dataclass(frozen=True, kw_only=True)
class LayerTokens:
    """The sequence on its way into a layer of the language model, and the K visual tokens in it.

    Attributes:
        language: the language model, for its norms and projections.
        layer: index of the layer about to run.
        hidden: (B, S, D) its input.
        visual: (B, K) positions of the visual tokens within S, ascending.
        index: (B, K) number of each visual token within its clip, before any pruning.
        labels: (B, K) or None, labels given by an earlier stage.
        previous_keys, previous_values: (B, G, S, d_h) rotated keys and values of the layer before, as cached.
        previous_hidden: (B, S, D) or None, input of the layer before; there if the method asks for it.
        embeds, embeds_visual: what entered layer 0, (B, S0, D), and the positions (B, K0) of the visual tokens in it;
            None unless the method asks for them.
        valid: (B, S) bool or None, False at padding.
        rotary: cosine and sine of the tokens' positions, (B, S, d_h) each.
        after: (B,) tokens after the video: the question, and padding if it is on the right.
        next_position: (B,) position of the token that follows the prompt.
    """

    language: LanguageModel
    layer: int
    hidden: Tensor
    visual: Tensor
    index: Tensor
    labels: Tensor | None
    previous_keys: Tensor
    previous_values: Tensor
    previous_hidden: Tensor | None
    embeds: Tensor | None
    embeds_visual: Tensor | None
    valid: Tensor | None
    rotary: Rotary
    after: Tensor
    next_position: Tensor

    @cached_property
    def question(self) -> Tensor:
        """(B, S) mask of the text after the video."""
        place = torch.arange(self.hidden.shape[1], device=self.hidden.device)
        # (B, S) True at the last `after` places of each row, padding on the right among them
        after = place >= self.hidden.shape[1] - self.after[:, None]
        return after if self.valid is None else after & self.valid

    @cached_property
    def last(self) -> Tensor:
        """(B, 1) position of the last token that is no padding."""
        batch, length = self.hidden.shape[:2]
        place = torch.arange(length, device=self.hidden.device).expand(batch, -1)
        # Padding is multiplied to place 0, so the largest place left is that of a token.
        return (place if self.valid is None else place * self.valid).amax(dim=1, keepdim=True)

    @cached_property
    def keys(self) -> Tensor:
        """(B, G, K, d_h) cached keys of the visual tokens in the layer before."""
        heads, dim = self.previous_keys.shape[1], self.previous_keys.shape[3]
        # (B, G, K, d_h) the visual positions, repeated for every key head and channel as `gather` wants them
        where = self.visual[:, None, :, None].expand(-1, heads, -1, dim)
        return self.previous_keys.gather(2, where)

    @cached_property
    def plain_keys(self) -> Tensor:
        """(B, G, K, d_h) keys of the visual tokens in the layer before, without norm and rotation.

        Read from `previous_hidden`.
        """
        return self.language.plain_keys(self.layer - 1, take(self._hidden_before(), self.visual))

    @cached_property
    def features(self) -> Tensor:
        """(B, K, D) hidden states of the visual tokens."""
        return take(self.hidden, self.visual)

    def attention_to_visual(self, rows: Tensor, *, own_layer: bool) -> Tensor:
        """Attention that the tokens at `rows` (B, Q) pay to each visual token, softmax over all they may see.

        Only these rows are computed, from the queries and keys of the coming layer (`own_layer`, PyramidDrop) or of
        the layer before (FastV; needs `previous_hidden`).

        Returns:
            (B, H, Q, K) float32.
        """
        layer = self.layer if own_layer else self.layer - 1
        hidden = self.hidden if own_layer else self._hidden_before()
        # (B, H, Q, d_h) queries of a few rows, against all (B, G, S, d_h) keys
        cos, sin = self.rotary
        queries = self.language.rotated_queries(layer, take(hidden, rows), (take(cos, rows), take(sin, rows)))
        keys = self.language.rotated_keys(layer, hidden, self.rotary) if own_layer else self.previous_keys
        position = torch.arange(hidden.shape[1], device=hidden.device)
        # (B, 1, Q, S): no row sees what comes after it, or padding
        seen = (position <= rows[..., None])[:, None]
        if self.valid is not None:
            seen = seen & self.valid[:, None, None, :]
        attention = attention_rows(queries, keys, self.language.attention_scale(layer), seen)
        # Softmax is over all that a row sees; only then are the visual tokens picked out.
        where = self.visual[:, None, None, :].expand(-1, attention.shape[1], attention.shape[2], -1)
        return attention.gather(3, where)

    def _hidden_before(self) -> Tensor:
        if self.previous_hidden is None:
            raise RuntimeError(
                "the method reads the input of the layer before; its `needs` must say previous_hidden=True"
            )
        return self.previous_hidden
