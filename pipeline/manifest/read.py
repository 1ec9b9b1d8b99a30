"""Questions from JSONL, Parquet or CSV files, checked in full before anything starts.

Columns: `video` (a relative path starts at the manifest's own folder), `question`, and optionally `sample_id`,
`options`, `answer`, `answer_index`, `start` and `end` (seconds). Every other column is carried through to the output
untouched. In CSV files `options` is a JSON list, and further columns are text.

What is wrong with a file ends the job before it starts. A row that can't be asked is kept with what is wrong with it.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, RowError
from pipeline.manifest import fields
from pipeline.manifest.rows import INPUT_SCHEMA, ROW_SCHEMA, Manifest, Row

_NUMBER = "__number__"
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
_WORDS = (*_TEXT, pa.types.is_integer)
_LIST = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
REQUIRED = ("video", "question")
SUFFIXES = (".jsonl", ".parquet", ".csv")


class _File(NamedTuple):
    """The rows of one manifest file."""

    path: Path
    numbers: Sequence[int]
    """Where each record stands: its line in JSONL, its row (from 1) elsewhere."""
    records: list[dict[str, object]]
    """The known columns of each row."""
    extras: pa.Table
    """The other columns of all rows, after the column `_NUMBER` (a table without columns would have no rows)."""


def load_manifest(
    source: str,
    *,
    reserved: Iterable[str] = (),
    limit: int | None = None,
    bad_rows: Literal["error", "refuse"] = "error",
) -> Manifest:
    """Reads and checks every row of a file, a glob or a folder of shards.

    Args:
        reserved: column names that the output writes itself, so that the manifest can't carry them.
        limit: only the first so many rows.
        bad_rows: whether a row that can't be asked is kept with its `problem`, or refused.

    Raises:
        ConfigError: the first thing that is wrong with a file (not readable, a column that is missing or of the wrong
            type, an id that stands there twice), or with `refuse` with a row. It names file, row and value.
    """
    # A folder or glob of shards is one manifest, in order of file names.
    files = [_READERS[path.suffix](path) for path in find_files(source)]
    for file in files:
        # Columns that the output writes itself can't be carried through; the input columns it repeats may be.
        _check_columns(file, {*reserved, *ROW_SCHEMA.names} - {*INPUT_SCHEMA.names})
    # (file, row number in it, record) for every row of all files
    places = [
        (file, number, record) for file in files for number, record in zip(file.numbers, file.records, strict=True)
    ]
    if not places:
        raise ConfigError(f"{source}: the manifest has no rows")
    rows: list[Row] = []
    seen: dict[str, str] = {}
    copies: Counter[str] = Counter()
    # Ids are unique over all files, since the output and its resumption go by them.
    for index, (file, number, record) in enumerate(places[:limit]):
        where = f"{file.path}, row {number}"
        row = _read_row(index, record, file.path, where)
        # From the content, so that a row keeps its id when the manifest is reordered or grows.
        if not row.sample_id:
            row = replace(row, sample_id=_content_id(row, copies))
        if row.sample_id in seen:
            raise ConfigError(f"{where}: sample_id {row.sample_id!r} is already used by {seen[row.sample_id]}")
        seen[row.sample_id] = where
        rows.append(row)
    # Extras stay an Arrow table, row for row beside `rows`, with types as they were read.
    manifest = Manifest(rows, _join_extras(source, files).slice(0, len(rows)))
    problems = manifest.problems
    if problems and bad_rows == "refuse":
        more = f" ({len(problems) - 1} more rows can't be asked)" if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0].message}{more}; with --bad-rows error such rows become rows with an error")
    return manifest


def find_files(source: str) -> list[Path]:
    """The manifest files that `source` means, in order of their names.

    Raises:
        ConfigError: there is none, or a file of another kind is named.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
    elif path.exists():
        files = [path]
    else:
        files = sorted(Path(match) for match in glob.glob(source))  # noqa: PTH207 (a Path does not expand absolute patterns)
    if not files:
        raise ConfigError(f"{source}: no manifest there; give a {', '.join(SUFFIXES)} file, a folder or a glob of them")
    for file in files:
        if file.suffix not in SUFFIXES or not file.is_file():
            raise ConfigError(f"{file}: not a manifest; give a {', '.join(SUFFIXES)} file")
    return files


def _read_row(index: int, record: fields.Record, file: Path, where: str) -> Row:
    """One row with its known columns checked; without `sample_id` it gets an empty one."""
    try:
        return _sound_row(index, record, file)
    except RowError as error:
        return _bad_row(index, record, file, RowError(error.error_type, f"{where}: {error.message}"))


def _sound_row(index: int, record: fields.Record, file: Path) -> Row:
    video, question = (fields.required_text(record, name) for name in REQUIRED)
    start, end = fields.span(record)
    options, labelled = fields.options(record)
    answer, answer_index = fields.answer(record, options, typed=file.suffix != ".csv")
    return Row(
        index=index,
        sample_id=fields.optional_text(record, "sample_id") or "",
        video=video,
        path=str(file.parent.absolute() / video),
        question=question,
        options=options,
        options_labelled=labelled,
        answer=answer,
        answer_index=answer_index,
        start=start,
        end=end,
    )


def _bad_row(index: int, record: fields.Record, file: Path, problem: RowError) -> Row:
    """A row that can't be asked, with its values as text where that says what they are."""
    video, options = fields.as_text(record.get("video")) or "", record.get("options")
    return Row(
        index=index,
        sample_id=fields.as_text(record.get("sample_id")) or "",
        video=video,
        path=str(file.parent.absolute() / video),
        question=fields.as_text(record.get("question")) or "",
        options=tuple(fields.as_text(option) or "" for option in options) if isinstance(options, list) else None,
        answer=fields.as_text(record.get("answer")),
        problem=problem,
    )


def _content_id(row: Row, copies: Counter[str]) -> str:
    """An id that stays the same wherever the row stands; equal rows are told apart by a number."""
    digest = hashlib.sha256(json.dumps(row.content).encode()).hexdigest()[:16]
    copies[digest] += 1
    return digest if copies[digest] == 1 else f"{digest}-{copies[digest]}"


def _check_columns(file: _File, reserved: set[str]) -> None:
    present = set().union(*file.records) if file.records else set(REQUIRED)
    for name in REQUIRED:
        if name not in present:
            known = ", ".join([*sorted(present), *file.extras.column_names[1:]])
            raise ConfigError(f"{file.path}: there is no column {name!r}; the columns are {known}")
    for name in file.extras.column_names[1:]:
        if name in reserved:
            raise ConfigError(f"{file.path}: column {name!r} is one that the output writes; rename it")


def _join_extras(source: str, files: Sequence[_File]) -> pa.Table:
    """The carried-through columns of all files under one schema; a column without any value is text."""
    try:
        table = pa.concat_tables([file.extras for file in files], promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise ConfigError(f"{source}: the files disagree on the type of a column: {error}") from error
    # A column of nulls has no type of its own, and all parts must share one schema.
    schema = pa.schema(
        [field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in table.schema]
    )
    return table.cast(schema).combine_chunks().drop_columns(_NUMBER)


def _read_parquet(path: Path) -> _File:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path}: not readable as Parquet: {error}") from error
    known = [name for name in table.column_names if name in INPUT_SCHEMA.names]
    for name in known:
        _check_type(path, name, table.schema.field(name).type)
    records = table.select(known).to_pylist()
    numbers = range(1, len(records) + 1)
    # The number column keeps the row count when no column is carried through.
    numbered = table.replace_schema_metadata().add_column(0, _NUMBER, [pa.array(numbers, pa.int64())])
    return _File(path, numbers, records, numbered.drop_columns(known))


def _check_type(path: Path, name: str, kind: pa.DataType) -> None:
    """Refuses a column none of whose values could be read; numbers may stand for texts, and texts for numbers."""
    # Dictionary-encoded columns (pandas categories) are read by the type of their values.
    item = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = any(is_kind(item) for is_kind in _TEXT)
    if name == "options":
        fits = text or (any(is_kind(kind) for is_kind in _LIST) and any(is_kind(kind.value_type) for is_kind in _WORDS))
    elif name in ("video", "question", "sample_id"):
        fits = text or pa.types.is_integer(item)
    else:
        fits = text or pa.types.is_integer(item) or pa.types.is_floating(item) or pa.types.is_decimal(item)
    if not fits:
        needed = {"options": "lists of texts", "start": "seconds", "end": "seconds", "answer_index": "whole numbers"}
        raise ConfigError(f"{path}: column {name!r} is of type {kind}; it must hold {needed.get(name, 'texts')}")


def _read_jsonl(path: Path) -> _File:
    numbers, records = [], []
    # Split at "\n" only: other line separators may stand inside a JSON string.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            numbers.append(number)
            records.append(_parse_json_object(line, f"{path}, row {number}"))
    return _split(path, numbers, records)


def _parse_json_object(line: str, where: str) -> dict[str, object]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error}): {line[:80]!r}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {line[:80]!r}")
    return value


def _read_csv(path: Path) -> _File:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    records = []
    try:
        repeated = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
        if repeated:
            raise ConfigError(f"{path}: column {repeated[0]!r} stands twice in the header")
        for number, record in enumerate(reader, start=1):
            # DictReader files surplus fields under None, and missing ones as the value None.
            if None in record or None in record.values():
                raise ConfigError(f"{path}, row {number}: expected {len(reader.fieldnames or ())} fields: {record!r}")
            records.append(
                {key: value or None if key in INPUT_SCHEMA.names else value for key, value in record.items()}
            )
    except csv.Error as error:
        raise ConfigError(f"{path}, row {len(records) + 1}: {error}") from error
    return _split(path, range(1, len(records) + 1), records)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as text: {error}") from error


def _split(path: Path, numbers: Sequence[int], records: list[dict[str, object]]) -> _File:
    """Takes the carried-through columns out of the records and into a table."""
    names = dict.fromkeys(name for record in records for name in record if name not in INPUT_SCHEMA.names)
    columns = {_NUMBER: pa.array(numbers, pa.int64())}
    for name in names:
        values = [record.pop(name, None) for record in records]
        columns[name] = _to_array(name, values, path, numbers)
    return _File(path, numbers, records, pa.table(columns))


def _to_array(name: str, values: list[object], path: Path, numbers: Sequence[int]) -> pa.Array:
    try:
        return pa.array(values)
    except (OverflowError, UnicodeEncodeError) as error:
        raise ConfigError(f"{path}: column {name!r} holds a value that Parquet can't: {error}") from error
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        # For the message: each Python type in the column, with a row that has it.
        kinds = {type(value): number for value, number in zip(values, numbers, strict=True) if value is not None}
        seen = ", ".join(f"{kind.__name__} (row {number})" for kind, number in kinds.items())
        raise ConfigError(f"{path}: column {name!r} mixes types: {seen}; {error}") from error


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}
