"""The output folder: its columns and parts, the record of a run, progress and summary. Nothing else writes there."""

from pipeline.output.folder import RUN_FILE, Done, OutputFolder, open_output
from pipeline.output.schema import ANSWER_SCHEMA, error_columns
from pipeline.output.writer import ShardWriter

__all__ = ["ANSWER_SCHEMA", "RUN_FILE", "Done", "OutputFolder", "ShardWriter", "error_columns", "open_output"]
