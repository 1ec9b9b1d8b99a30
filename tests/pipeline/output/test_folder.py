"""The folder holds each question once, under one schema, for one configuration, and in whole files only."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, RowError
from pipeline.manifest import Manifest, cut_clips, load_manifest
from pipeline.output import ANSWER_SCHEMA, OutputFolder, ShardWriter, error_columns, open_output

ERROR = error_columns(RowError("some_error", "what happened")) | {"attempt": 1}
OK = {
    "status": "ok",
    "prediction": "red",
    "attempt": 1,
    "visual_tokens_stages": [("deep", 3)],
    "timestamps": [0.0, 0.5],
}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Six questions on three clips, with a carried-through column that has no value."""
    path = tmp_path / "m.jsonl"
    rows = [{"sample_id": f"s{i}", "video": f"{i // 2}.mp4", "question": "q", "note": None} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_manifest(str(path))


def fill(folder: OutputFolder, manifest: Manifest, columns: dict[str, Any], clips: slice = slice(None)) -> ShardWriter:
    """Adds the same answer columns for some clips; shards of two clips."""
    every = cut_clips(manifest.rows, 4)
    writer = ShardWriter(folder, manifest, Counter(clip.shard for clip in every))
    for clip in every[clips]:
        writer.add(clip, [(row, columns) for row in clip.rows])
    return writer


def test_a_part_appears_when_its_shard_is_complete(tmp_path: Path, manifest: Manifest) -> None:
    with open_output(tmp_path / "out") as folder:
        writer = fill(folder, manifest, OK, slice(0, 1))
        assert folder.parts == []
        clip = cut_clips(manifest.rows, 4)[2]
        assert writer.add(clip, [(row, OK) for row in clip.rows]) == ("part-00000.parquet", 2)
        (part,) = folder.parts
        assert pq.read_table(part)["sample_id"].to_pylist() == ["s4", "s5"]
        writer.flush()
        writer.flush()
        assert sorted(folder.done()) == ["s0", "s1", "s4", "s5"]


def test_schema_is_the_same_for_errors_and_answers(tmp_path: Path, manifest: Manifest) -> None:
    schemas = []
    for name, columns in (("errors", ERROR), ("answers", OK)):
        with open_output(tmp_path / name) as folder:
            fill(folder, manifest, columns)
            schemas += [pq.read_schema(part) for part in folder.parts]
    assert len(schemas) == 4
    assert all(schema.equals(schemas[0]) for schema in schemas)
    assert schemas[0].names[-len(ANSWER_SCHEMA) :] == ANSWER_SCHEMA.names
    assert schemas[0].field("note").type == pa.string()


def test_parts_beside_the_record_open_with_pandas_and_duckdb(tmp_path: Path, manifest: Manifest) -> None:
    duckdb, pandas = pytest.importorskip("duckdb"), pytest.importorskip("pandas")
    with open_output(tmp_path / "out") as folder:
        fill(folder, manifest, OK)
        folder.write_run({"state": "finished"})
    assert len(pandas.read_parquet([str(part) for part in folder.parts])) == 6
    rows = duckdb.sql(f"select prediction, visual_tokens_stages from '{tmp_path}/out/part-*.parquet'").fetchall()
    assert rows == [("red", {"deep": 3})] * 6


def test_errors_are_taken_out_to_be_done_again(tmp_path: Path, manifest: Manifest) -> None:
    with open_output(tmp_path / "out") as folder:
        clips = cut_clips(manifest.rows, 4)
        writer = ShardWriter(folder, manifest, {0: 2, 1: 1})
        for clip, columns in zip(clips, ([OK, ERROR], [OK, OK], [ERROR, ERROR]), strict=True):
            writer.add(clip, list(zip(clip.rows, columns, strict=True)))
        assert [folder.done()[f"s{i}"].status for i in range(6)] == ["ok", "error", "ok", "ok", "error", "error"]
        folder.drop(name for name, entry in folder.done().items() if entry.status == "error")
        assert list(folder.done()) == ["s0", "s2", "s3"]
        assert [part.name for part in folder.parts] == ["part-00000.parquet"]
        fill(folder, manifest, OK, slice(2, 3))
        assert [part.name for part in folder.parts] == ["part-00000.parquet", "part-00001.parquet"]


def test_stored_content_is_that_of_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    row = {"video": "a", "question": "q", "options": ["x", "y"], "answer": 1, "start": 1, "end": 2.5}
    path.write_text(json.dumps(row) + "\n" + json.dumps({"video": "a", "question": "q"}))
    manifest = load_manifest(str(path))
    with open_output(tmp_path / "out") as folder:
        fill(folder, manifest, OK)
        done = folder.done()
    assert [done[row.sample_id].content for row in manifest.rows] == [row.content for row in manifest.rows]


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path, manifest: Manifest) -> None:
    there = {"prune": {"keep_ratio": 0.25, "method": "vitcop"}, "columns": {"kind": "string"}}
    here = {"prune": {"keep_ratio": 0.5, "method": "vitcop"}, "columns": {}}
    with open_output(tmp_path / "out") as folder:
        folder.claim(there)
        folder.write_run({"fingerprint": there})
        folder.claim(here)  # nothing has been made with the other one
        fill(folder, manifest, OK)
        folder.claim(there)
        message = r"prune\.keep_ratio is 0\.25 there and 0\.5 here; columns\.kind is 'string' there and None here\."
        with pytest.raises(ConfigError, match=message):
            folder.claim(here)
        folder.clear()
        folder.claim(here)
        assert folder.parts == []


def test_parts_without_a_run_file_are_refused(tmp_path: Path, manifest: Manifest) -> None:
    with open_output(tmp_path / "out") as folder:
        fill(folder, manifest, OK)
        with pytest.raises(ConfigError, match=r"has parts but no run\.json"):
            folder.claim({})
        (folder.path / "run.json").write_text("{")
        with pytest.raises(ConfigError, match=r"run\.json is not readable"):
            folder.claim({})
        for other in ("{}", "[1]"):
            (folder.path / "run.json").write_text(other)
            with pytest.raises(ConfigError, match=r"run\.json is not the record of a job"):
                folder.claim({})


def test_damaged_part_is_named(tmp_path: Path, manifest: Manifest) -> None:
    with open_output(tmp_path / "out") as folder:
        fill(folder, manifest, OK)
        folder.parts[0].write_bytes(b"PAR1")
        with pytest.raises(ConfigError, match=r"part-00000\.parquet is not readable"):
            folder.done()


def test_killed_writer_leaves_no_part(tmp_path: Path) -> None:
    """A process that dies while it writes leaves a temporary file, which the next job removes."""
    code = """if True:
        import os, sys
        from pathlib import Path
        import pyarrow as pa, pyarrow.parquet as pq
        from pipeline.output import open_output
        def die(table, path, **_):
            path.write_bytes(b"half")
            os._exit(9)
        pq.write_table = die
        with open_output(Path(sys.argv[1])) as folder:
            folder.write(pa.table({"sample_id": ["a"]}))
    """
    path = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert [file.name for file in path.glob("*.tmp")] == [".part-00000.parquet.tmp"]
    with open_output(path) as folder:
        assert folder.parts == []
        assert [file.name for file in path.iterdir()] == [".lock"]


def test_two_jobs_do_not_share_a_folder(tmp_path: Path) -> None:
    path, refused = tmp_path / "out", pytest.raises(ConfigError, match="another job is writing")
    with open_output(path), refused, open_output(path):
        pass
    with open_output(tmp_path / "out"):
        pass


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="can't be written"), open_output(tmp_path / "out"):
        pass
