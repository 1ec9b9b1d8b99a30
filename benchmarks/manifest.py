"""Reading a manifest: rows per CPU second and peak memory.

    python -m benchmarks.manifest --rows 1000000 --kind jsonl

One kind in each process, as memory that the reader gave back would hide what the next one takes.
"""

import json
import resource
import tempfile
from pathlib import Path
from typing import Literal

import pyarrow.json
import pyarrow.parquet as pq
import tyro

from pipeline.manifest import cut_clips, load_manifest


def write_rows(path: Path, rows: int) -> None:
    """Multiple choice with four options and four questions a video."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            record = {
                "sample_id": f"q{i}",
                "video": f"videos/v{i // 4}.mp4",
                "question": f"What happens at moment {i} of the video?",
                "options": [f"A. red {i}", "B. blue", "C. green", "D. none"],
                "answer": "ABCD"[i % 4],
                "category": f"c{i % 7}",
            }
            file.write(json.dumps(record) + "\n")


def main(rows: int = 1_000_000, kind: Literal["jsonl", "parquet"] = "jsonl") -> None:
    """Write a manifest, read it, and say what that took.

    Args:
        rows: of the manifest.
        kind: of file.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "manifest.jsonl")
        write_rows(path, rows)
        if kind == "parquet":
            lines, path = path, path.with_suffix(".parquet")
            pq.write_table(pyarrow.json.read_json(lines), path)
            lines.unlink()
        before = resource.getrusage(resource.RUSAGE_SELF)
        clips = cut_clips(load_manifest(str(path)).rows, 1000)
        after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime - before.ru_utime
    print(f"{kind}: {rows:,} rows, {len(clips):,} clips, {seconds:.1f} CPU s, {rows / seconds:,.0f} rows/s")
    grown = (after.ru_maxrss - before.ru_maxrss) / 1024
    print(f"peak {after.ru_maxrss / 1024:.0f} MiB, {grown:.0f} MiB above the start")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
