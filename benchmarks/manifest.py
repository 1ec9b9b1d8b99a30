"""Reading a manifest: rows per CPU second and peak memory.

    python -m benchmarks.manifest --rows 1000000 --kind jsonl

One kind in each process, as memory that the reader gave back would hide what the next one takes.
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path

import pyarrow.json
import pyarrow.parquet as pq

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=("jsonl", "parquet"), default="jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "manifest.jsonl")
        write_rows(path, args.rows)
        if args.kind == "parquet":
            table, lines = pyarrow.json.read_json(path), path
            path = path.with_suffix(".parquet")
            pq.write_table(table, path)
            lines.unlink()
            del table
        before = resource.getrusage(resource.RUSAGE_SELF)
        clips = cut_clips(load_manifest(str(path)).rows, 1000)
        after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime - before.ru_utime
    print(
        f"{args.kind}: {args.rows:,} rows, {len(clips):,} clips, {seconds:.1f} CPU s, {args.rows / seconds:,.0f} rows/s"
    )
    print(
        f"peak {after.ru_maxrss / 1024:.0f} MiB, {(after.ru_maxrss - before.ru_maxrss) / 1024:.0f} MiB above the start"
    )


if __name__ == "__main__":
    main()
