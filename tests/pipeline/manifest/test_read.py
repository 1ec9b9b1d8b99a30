"""Manifests are read alike from every format, and whatever is wrong with one is named before anything starts."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from pipeline.manifest import cut_clips, group_clips, load_manifest

ROWS: list[dict[str, Any]] = [
    {"video": "a.mp4", "question": "what ?", "options": ["x", "y"], "answer": "x", "end": 2.5, "kind": "color"},
    {"video": "sub/b.mp4", "question": 'he said "hi",\nthen', "sample_id": "b1", "start": 1, "kind": "007"},
    {"video": "a.mp4", "question": "who ?", "answer": "3", "end": 2.5, "kind": ""},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A manifest in the format that the suffix says."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
                )
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    manifest = load_manifest(str(write(tmp_path / f"m{suffix}", ROWS)))
    first, second, third = manifest.rows
    assert (first.options, first.answer, first.start, first.end) == (("x", "y"), "x", None, 2.5)
    assert first.path == str(tmp_path / "a.mp4")
    assert (second.sample_id, second.question, second.start) == ("b1", ROWS[1]["question"], 1.0)
    assert second.path == str(tmp_path / "sub" / "b.mp4")
    assert third.options is None
    assert manifest.extras["kind"].to_pylist() == ["color", "007", ""]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_ids_come_from_the_content(tmp_path: Path, suffix: str) -> None:
    """The same row has the same id in any format and place, equal rows have different ones."""
    ids = [row.sample_id for row in load_manifest(str(write(tmp_path / f"m{suffix}", ROWS))).rows]
    reference = [row.sample_id for row in load_manifest(str(write(tmp_path / "r.jsonl", ROWS[::-1]))).rows]
    assert ids == reference[::-1]
    twice = [row.sample_id for row in load_manifest(str(write(tmp_path / f"t{suffix}", [ROWS[0], ROWS[0]]))).rows]
    assert twice == [ids[0], f"{ids[0]}-2"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_nothing_has_to_be_carried_through(tmp_path: Path, suffix: str) -> None:
    rows = [{"video": "a", "question": "q"}, {"video": "b", "question": "r"}]
    manifest = load_manifest(str(write(tmp_path / f"m{suffix}", rows)))
    assert [row.video for row in manifest.rows] == ["a", "b"]
    assert manifest.input_columns(manifest.rows)["question"].to_pylist() == ["q", "r"]


def test_carried_columns_keep_their_types(tmp_path: Path) -> None:
    extras = {
        "stamp": pa.array([1, 2], pa.timestamp("ns", "UTC")),
        "nested": pa.array([{"a": [1]}, None]),
        "empty": pa.nulls(2),
    }
    pq.write_table(pa.table({"video": ["a", "b"], "question": ["q", "r"], **extras}), tmp_path / "m.parquet")
    manifest = load_manifest(str(tmp_path / "m.parquet"))
    columns = manifest.input_columns(manifest.rows[::-1])
    assert columns["video"].to_pylist() == ["b", "a"]
    assert columns["stamp"].combine_chunks().equals(extras["stamp"].take(pa.array([1, 0])))
    assert columns["nested"].to_pylist() == [None, {"a": [1]}]
    assert columns.schema.field("empty").type == pa.string()
    assert columns.schema.field("options").type == pa.list_(pa.string())


def test_shards_of_a_folder_and_a_glob_are_joined_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", [{"video": "b.mp4", "question": "q", "only_b": "1"}])
    write(tmp_path / "a.jsonl", [{"video": "a.mp4", "question": "q"}, {"video": "a.mp4", "question": "r"}])
    (tmp_path / "README.txt").write_text("not a manifest")
    for source in (str(tmp_path), f"{tmp_path}/*.[cj]s*"):
        manifest = load_manifest(source)
        assert [row.video for row in manifest.rows] == ["a.mp4", "a.mp4", "b.mp4"]
        assert manifest.extras["only_b"].to_pylist() == [None, None, "1"]
    assert len(load_manifest(str(tmp_path), limit=2).rows) == 2


def test_line_separators_inside_texts_are_no_line_ends(tmp_path: Path) -> None:
    question = "one\u2028two\x85three"
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"video": "a", "question": question}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert load_manifest(str(path)).rows[0].question == question


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": ""}, "question is ''; it must be a text that is not empty"),
        ({"question": " \t"}, "question is ' \\t'"),
        ({"question": None}, "question is None"),
        ({"question": 1.5}, "question is 1.5; it must be a text"),
        ({"video": ""}, "video is ''"),
        ({"start": 2, "end": 2}, "end is 2, not after start, 2"),
        ({"start": 3.5, "end": 2}, "end is 2, not after start, 3.5"),
        ({"end": 0}, "end is 0, not after start, 0"),
        ({"start": -1}, "start is -1; it must be a number of seconds, 0 or more"),
        ({"start": "soon"}, "start is 'soon'"),
        ({"start": True}, "start is True"),
        ({"end": float("nan")}, "end is nan"),
        ({"options": "red"}, "options is 'red', not a JSON list"),
        ({"options": ["red"]}, "options is ['red']; it must be a list of at least two texts"),
        ({"options": {"a": 1}}, "options is {'a': 1}; it must be a list"),
        ({"options": ["red", " "]}, "options is ['red', ' ']; no option may be empty"),
        ({"options": ["red", 1.5]}, "options is 1.5; it must be a text"),
        ({"answer": ["x"]}, "answer is ['x']; it must be a text"),
        ({"end": 10**400}, "end is 1000"),
        ({"question": "half \ud83d"}, "question is 'half \\ud83d'; it holds half of a surrogate pair"),
        ({"options": ["A. red", "B. "]}, "options is ['A. red', 'B. ']; no option may be empty"),
        ({"options": ["A. red", "B. red"]}, "options is ['A. red', 'B. red']; 'red' stands there twice"),
        ({"options": [" red", "blue", "red"]}, "options is [' red', 'blue', 'red']; 'red' stands there twice"),
        ({"sample_id": 1.5}, "sample_id is 1.5; it must be a text"),
    ],
)
def test_wrong_value_is_a_row_with_a_problem_or_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"video": "a.mp4", "question": "what ?"}
    path = write(tmp_path / "m.jsonl", [good, good, good | row, good])
    manifest = load_manifest(str(path))
    assert [row.index for row in manifest.sound] == [0, 1, 3]
    (problem,) = manifest.problems
    assert problem.error_type == "bad_row"
    assert problem.message.startswith(f"{path}, row 3: {message}")
    assert len({row.sample_id for row in manifest.rows}) == 4
    assert manifest.input_columns(manifest.rows).num_rows == 4
    with pytest.raises(ConfigError, match=re.escape(f"{path}, row 3: {message}")):
        load_manifest(str(path), bad_rows="refuse")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "yellow"}, "answer 'yellow' is none of the options ['red', '1', '2']"),
        ({"answer": 1, "options": ["1", "2", "3"]}, "answer 1 can be the option '1' or the index of '2'"),
        ({"answer": 1.0, "options": ["1", "2", "3"]}, "answer 1 can be the option '1' or the index of '2'"),
        ({"answer_index": 3}, "answer_index is 3; for 3 options it must be below that"),
        ({"answer_index": 1.5}, "answer_index is 1.5; it must be a whole number"),
        ({"answer_index": "first"}, "answer_index is 'first'; it must be a whole number"),
        ({"answer": "red", "answer_index": 2}, "answer_index is 2, which is '2', but answer is 'red'"),
        ({"answer_index": 0, "options": None}, "answer_index is 0, but the row has no options"),
    ],
)
def test_an_answer_that_names_no_option_is_a_problem_of_its_row(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    good = {"video": "a.mp4", "question": "what ?", "options": ["red", "1", "2"]}
    manifest = load_manifest(str(write(tmp_path / "m.jsonl", [good, good | row])))
    (problem,) = manifest.problems
    assert problem.error_type == "bad_answer"
    assert f"row 2: {message}" in problem.message


def test_duplicate_id_in_another_shard_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.csv", [{"video": "v", "question": name, "sample_id": "7"}])
    message = f"{tmp_path}/b.csv, row 1: sample_id '7' is already used by {tmp_path}/a.csv, row 1"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", '{"video": "a", "question": "q"}\n{"video": "b"', "m.jsonl, row 2: not JSON"),
        ("m.jsonl", '["a"]', "m.jsonl, row 1: expected a JSON object"),
        ("m.jsonl", "[" * 100_000, "m.jsonl, row 1: not JSON"),
        (
            "m.jsonl",
            '{"video": "a", "question": "q", "x": 1' + "0" * 40 + "}",
            "m.jsonl: column 'x' holds a value that Parquet can't",
        ),
        (
            "m.jsonl",
            '{"video": "a", "text": "q"}',
            "m.jsonl: there is no column 'question'; the columns are video, text",
        ),
        ("m.jsonl", "", "the manifest has no rows"),
        ("m.jsonl", '{"video": "a", "question": "q", "status": 1}', "column 'status' is one that the output writes"),
        (
            "m.jsonl",
            '{"video": "a", "question": "q", "x": 1}\n{"video": "a", "question": "r", "x": "1"}',
            "column 'x' mixes types: int (row 1), str (row 2)",
        ),
        ("m.csv", "video,text\na,q\n", "m.csv: there is no column 'question'; the columns are video, text"),
        ("m.csv", "video,question\na\n", "m.csv, row 1: expected 2 fields"),
        ("m.csv", "video,question\na,b,c\n", "m.csv, row 1: expected 2 fields"),
        ("m.csv", "video,question,video\na,b,c\n", "m.csv: column 'video' stands twice"),
        ("m.csv", 'video,question\na,"b', "m.csv, row 1: unexpected end of data"),
        (
            "m.csv",
            "video,question,options_labelled\na,b,c\n",
            "column 'options_labelled' is one that the output writes",
        ),
        ("m.parquet", "no parquet", "m.parquet: not readable as Parquet"),
        ("m.txt", "a", "m.txt: not a manifest"),
    ],
)
def test_unusable_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_manifest(str(tmp_path / name), reserved=["status"])


def test_text_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes("video,question\na,é\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"m\.csv: not readable as text"):
        load_manifest(str(tmp_path / "m.csv"))


@pytest.mark.parametrize("source", ["missing.jsonl", "*.jsonl", "."])
def test_no_manifest_there(tmp_path: Path, source: str) -> None:
    with pytest.raises(ConfigError, match="no manifest there"):
        load_manifest(str(tmp_path / source))


def test_shards_that_disagree_on_a_type_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"video": "a", "question": "q", "x": 1}])
    write(tmp_path / "b.jsonl", [{"video": "a", "question": "r", "x": [1]}])
    with pytest.raises(ConfigError, match="disagree on the type of a column"):
        load_manifest(str(tmp_path))


def test_questions_on_one_span_are_one_clip(tmp_path: Path) -> None:
    rows = [
        {"video": "a", "question": "1"},
        {"video": "b", "question": "2"},
        {"video": "a", "question": "3", "start": 1, "end": 2},
        {"video": "a", "question": "4"},
    ]
    clips = group_clips(load_manifest(str(write(tmp_path / "m.jsonl", rows))).rows)
    assert [[row.question for row in clip.rows] for clip in clips] == [["1", "4"], ["2"], ["3"]]
    assert [clip.name for clip in clips[1:]] == [f"{tmp_path}/b", f"{tmp_path}/a [1s-2s]"]
    cut = cut_clips(load_manifest(str(tmp_path / "m.jsonl")).rows, 2)
    assert [(clip.id, clip.shard, len(clip.rows)) for clip in cut] == [(0, 0, 2), (1, 1, 1), (2, 1, 1)]


LABELLED = ["A. white.", "B. red.", "C. 3"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("answer", ["B", "(B)", "B. red.", "red.", "Red"])
def test_labels_of_options_are_taken_away(tmp_path: Path, suffix: str, answer: str) -> None:
    rows = [
        {"video": "a", "question": "q", "options": LABELLED, "answer": answer},
        {"video": "a", "question": "q", "options": ["white.", "red.", "3"], "answer": answer},
    ]
    manifest = load_manifest(str(write(tmp_path / f"m{suffix}", rows)))
    labelled, plain = manifest.rows
    assert labelled.options == plain.options == ("white.", "red.", "3")
    assert (labelled.answer_index, plain.answer_index, labelled.answer) == (1, 1, answer)
    columns = manifest.input_columns(manifest.rows)
    assert columns["options_labelled"].to_pylist() == [True, False]
    assert columns["options"].to_pylist() == [["white.", "red.", "3"]] * 2


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_number_is_an_index_only_where_it_cannot_be_a_text(tmp_path: Path, suffix: str) -> None:
    """A column of whole numbers with gaps, as pandas writes it, is one of floats."""
    rows: list[dict[str, Any]] = [
        {"options": ["red", "blue"], "answer": 1},
        {"options": ["1", "2", "3"], "answer": 1},
        {"options": ["0", "1", "2"], "answer": 1},
        {"options": ["1", "2", "3"], "answer": 3},
        {"options": ["1", "2", "3"], "answer": 1, "answer_index": 1},
        {"options": ["1", "2", "3"], "answer": None, "answer_index": 0},
        {"options": None, "answer": 4},
    ]
    if suffix == ".parquet":
        rows = [row | {"answer": None if row["answer"] is None else float(row["answer"])} for row in rows]
    rows = [{"video": "a", "question": "q", **row} for row in rows]
    manifest = load_manifest(str(write(tmp_path / f"m{suffix}", rows)))
    assert [row.answer_index for row in manifest.rows] == [1, None, 1, 2, 1, 0, None]
    assert manifest.rows[-1].answer == "4"
    (problem,) = manifest.problems
    assert "row 2: answer 1 can be the option '1' or the index of '2'" in problem.message
    assert "column answer_index" in problem.message


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_text_that_is_an_option_is_that_option(tmp_path: Path, suffix: str) -> None:
    rows = [{"video": "a", "question": "q", "options": ["1", "2", "3"], "answer": "1"}]
    manifest = load_manifest(str(write(tmp_path / f"m{suffix}", rows)))
    assert manifest.rows[0].answer_index == 0


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("question", [1.5], "column 'question' is of type double; it must hold texts"),
        ("video", [["a"]], "column 'video' is of type list<"),
        ("options", [1], "column 'options' is of type int64; it must hold lists of texts"),
        ("answer", [["x"]], "column 'answer' is of type list<"),
        ("answer_index", [True], "column 'answer_index' is of type bool; it must hold whole numbers"),
        ("start", [{"s": 1}], "column 'start' is of type struct<"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused(tmp_path: Path, name: str, values: list[Any], message: str) -> None:
    columns = {"video": ["a"], "question": ["q"]} | {name: values}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_manifest(str(tmp_path / "m.parquet"))


def test_memory_a_row_is_bounded(tmp_path: Path) -> None:
    """100,000 rows take less than 2 KiB each at the peak, options, ids and a carried-through column included."""
    path, rows = tmp_path / "m.jsonl", 100_000
    record = {"options": ["A. red", "B. blue", "C. green"], "answer": "B", "category": "c"}
    with path.open("w") as file:
        for i in range(rows):
            file.write(
                json.dumps({"sample_id": f"q{i}", "video": f"v{i}.mp4", "question": f"What {i}?"} | record) + "\n"
            )
    # Its own process: a peak of this one may lie before the test.
    code = (
        "import resource, sys; from pipeline.manifest import load_manifest\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); manifest = load_manifest(sys.argv[1]); print(len(manifest.rows), peak() - before)"
    )
    output = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True).stdout
    count, grown = map(int, output.split())
    assert count == rows
    assert grown < rows * 2048
