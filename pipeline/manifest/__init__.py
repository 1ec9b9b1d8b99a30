"""Questions in: rows, the clips they are about, and reading them from files."""

from pipeline.manifest.read import load_manifest
from pipeline.manifest.rows import CONTENT, INPUT_SCHEMA, ROW_SCHEMA, Clip, Manifest, Row, cut_clips, group_clips

__all__ = [
    "CONTENT",
    "INPUT_SCHEMA",
    "ROW_SCHEMA",
    "Clip",
    "Manifest",
    "Row",
    "cut_clips",
    "group_clips",
    "load_manifest",
]
