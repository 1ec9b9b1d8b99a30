"""The output folder: its columns and parts, the record of a run, progress and summary. Nothing else writes there."""

from pipeline.output.folder import Done, OutputFolder, open_output, write_table
from pipeline.output.schema import ANSWER_SCHEMA, Columns, error_columns
from pipeline.output.writer import ShardWriter

__all__ = [
    "ANSWER_SCHEMA",
    "Columns",
    "Done",
    "OutputFolder",
    "ShardWriter",
    "error_columns",
    "open_output",
    "write_table",
]
