"""How many rows may be in flight, by number and by the memory of their caches."""

from __future__ import annotations

import torch

from pipeline.model.load import LoadedModel

CPU_ROWS, GPU_ROWS = 16, 64
"""Rows in flight where nothing else is asked for; a further row would hardly make the others cheaper."""
CACHE_SHARE = 0.5
"""Of the memory beside the weights, what caches may take; the rest is for the vision tower and activations."""


class RowLimit:
    """A limit on rows in flight. It only falls: memory that ran out once would run out again.

    Args:
        batch_rows: None: what suits the device.
        memory_fraction: of a GPU's memory, what the process may use. A CPU's memory is not looked at.

    Attributes:
        rows: how many rows may be in flight now.
    """

    def __init__(self, loaded: LoadedModel, batch_rows: int | None = None, memory_fraction: float = 0.9) -> None:
        on_gpu = loaded.device.type == "cuda"
        self.rows = batch_rows or (GPU_ROWS if on_gpu else CPU_ROWS)
        # Bytes that one token takes in the caches of all layers, from the geometry in the config.
        text = loaded.model.config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self._token_bytes = 2 * text.num_hidden_layers * heads * width * loaded.dtype.itemsize  # keys and values
        self._free: float | None = None
        if on_gpu:
            # The weights are on the device by now, so what is allocated is theirs.
            total = torch.cuda.get_device_properties(loaded.device).total_memory
            self._free = CACHE_SHARE * (memory_fraction * total - torch.cuda.memory_allocated(loaded.device))

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of so many tokens in the caches of all layers."""
        return tokens * self._token_bytes

    def allows(self, rows: int, cache_bytes: int) -> bool:
        """Whether so many rows, with caches of so many bytes together, may be in flight."""
        return rows <= self.rows and (self._free is None or cache_bytes <= self._free)

    def lower(self, rows: int) -> None:
        """From now on no more than `rows` (at least 1) are in flight."""
        self.rows = max(1, min(self.rows, rows))
