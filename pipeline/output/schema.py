"""The columns that a job writes after the input columns."""

import pyarrow as pa

from pipeline.errors import RowError

ANSWER_SCHEMA = pa.schema(
    {
        "prediction": pa.string(),
        "samples": pa.list_(pa.string()),
        "choice": pa.int32(),
        "correct": pa.bool_(),
        "status": pa.string(),
        "error_type": pa.string(),
        "error": pa.string(),
        "attempt": pa.int32(),
        "model": pa.string(),
        "method": pa.string(),
        "keep_ratio": pa.float64(),
        "num_frames": pa.int32(),
        "requested_frames": pa.int32(),
        "lost_frames": pa.list_(pa.int32()),
        "timestamps": pa.list_(pa.float64()),
        "decoder": pa.string(),
        "visual_tokens_full": pa.int32(),
        "visual_tokens_kept": pa.float64(),
        "visual_tokens_stages": pa.map_(pa.string(), pa.int32()),
        "prompt_tokens": pa.int32(),
        "generated_tokens": pa.int32(),
        "seconds_decode": pa.float64(),
        "seconds_vision": pa.float64(),
        "seconds_selection": pa.float64(),
        "seconds_prefill": pa.float64(),
        "seconds_generate": pa.float64(),
        "peak_memory_bytes": pa.int64(),
    }
)
"""The columns that a job writes after the input columns; what a row with an error does not know is null."""


Columns = dict[str, object]
"""Columns of one output row by name."""


def error_columns(error: RowError) -> Columns:
    """The columns of a row without an answer."""
    return {"status": "error", "error_type": error.error_type, "error": error.message}
