"""Helpers of the job's tests: manifests, runs in this process, and what a run has left."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cluster import ClipResult, Engine
from pipeline.cluster.engine import ClipT
from pipeline.errors import RowError

ROOT = Path(__file__).parents[2]


def write_manifest(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(output: Path) -> dict[str, dict[str, Any]]:
    """All rows by `sample_id`; fails when one stands there twice."""
    parts = [pq.read_table(part) for part in sorted(output.glob("part-*.parquet"))]
    assert all(part.schema.equals(parts[0].schema) for part in parts)
    rows = pa.concat_tables(parts).to_pylist() if parts else []
    by_id = {row["sample_id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


def read_run(output: Path) -> dict[str, Any]:
    return json.loads((output / "run.json").read_text())


def stamps(output: Path) -> dict[str, int]:
    """When each part was last changed."""
    return {part.name: part.stat().st_mtime_ns for part in output.glob("part-*.parquet")}


class InProcessEngine(Engine[ClipT]):
    """An engine without Ray: one worker in this process, which answers a clip after the other.

    For tests of what a job makes of results. A worker process takes seconds to load its libraries.
    """

    def __enter__(self) -> "InProcessEngine[ClipT]":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, clips: Iterable[ClipT], tick: Callable[[], None] = lambda: None) -> Iterator[ClipResult[ClipT]]:
        answerer = self.build(1)
        for number, clip in enumerate(clips):
            tick()
            results: list[Any] = []
            try:
                answerer.add(number, clip, answerer.decode(clip, again=False))
            except RowError as error:
                results.append(error)
            while answerer.busy:
                results += [result for _, result in answerer.step()]
            (result,) = results
            if isinstance(result, RowError):
                yield ClipResult(clip=clip, attempt=1, error=result)
            else:
                yield ClipResult(clip=clip, attempt=1, answers=result)
