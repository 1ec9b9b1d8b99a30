"""Questions from JSONL, Parquet or CSV files, checked in full before anything starts.

Columns: `video` (a relative path starts at the manifest's own folder), `question`, and optionally `sample_id`,
`options`, `answer`, `answer_index`, `start` and `end` (seconds). Every other column is carried through to the output
untouched. In CSV files `options` is a JSON list, and further columns are text.

What is wrong with a file ends the job before it starts. A row that can't be asked is kept with what is wrong with it.
"""

from __future__ import annotations

import csv
import functools
import gc
import glob
import hashlib
import io
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, RowError
from pipeline.manifest import fields
from pipeline.manifest.rows import INPUT_SCHEMA, ROW_SCHEMA, Manifest, Row

_NUMBER = "__number__"
_KNOWN = frozenset(INPUT_SCHEMA.names)
_BATCH_ROWS = 10_000
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
    present: set[str]
    """The known columns that any record has."""
    rows: list[Row]
    """The rows below the limit, with an empty `sample_id` where the file has none."""
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
    files: list[_File] = []
    with _collector_paused():
        for path in find_files(source):
            first = sum(len(file.numbers) for file in files)
            files.append(_READERS[path.suffix](path, first, limit))
        rows = _identified(source, files, reserved)
    # Extras stay an Arrow table, row for row beside `rows`, with types as they were read.
    manifest = Manifest(rows, _join_extras(source, files).slice(0, len(rows)))
    problems = manifest.problems
    if problems and bad_rows == "refuse":
        more = f" ({len(problems) - 1} more rows can't be asked)" if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0].message}{more}; with --bad-rows error such rows become rows with an error")
    return manifest


def _identified(source: str, files: Sequence[_File], reserved: Iterable[str]) -> list[Row]:
    """The rows of all files, each with an id of its own."""
    for file in files:
        # Columns that the output writes itself can't be carried through; the input columns it repeats may be.
        _check_columns(file, {*reserved, *ROW_SCHEMA.names} - {*INPUT_SCHEMA.names})
    if not any(file.numbers for file in files):
        raise ConfigError(f"{source}: the manifest has no rows")
    rows = [row for file in files for row in file.rows]
    seen: dict[str, int] = {}
    copies: Counter[str] = Counter()
    # Ids are unique over all files, since the output and its resumption go by them.
    for index, row in enumerate(rows):
        # From the content, so that a row keeps its id when the manifest is reordered or grows.
        if not row.sample_id:
            rows[index] = row = replace(row, sample_id=_content_id(row, copies))
        other = seen.setdefault(row.sample_id, index)
        if other != index:
            there, where = _place(files, other), _place(files, index)
            raise ConfigError(f"{where}: sample_id {row.sample_id!r} is already used by {there}")
    return rows


def _place(files: Sequence[_File], index: int) -> str:
    """Where the row with this index in the manifest stands."""
    for file in files:
        if index < len(file.numbers):
            return f"{file.path}, row {file.numbers[index]}"
        index -= len(file.numbers)
    raise IndexError(index)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection: it would walk through all rows again and again, and none of them is in a cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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


@functools.lru_cache(maxsize=4096)
def _video_path(folder: Path, video: str) -> str:
    return str(folder.absolute() / video)


def _read_row(index: int, record: fields.Record, file: Path, number: int) -> Row:
    """One row with its known columns checked; without `sample_id` it gets an empty one."""
    try:
        return _sound_row(index, record, file)
    except RowError as error:
        return _bad_row(index, record, file, RowError(error.error_type, f"{file}, row {number}: {error.message}"))


def _sound_row(index: int, record: fields.Record, file: Path) -> Row:
    video, question = (fields.required_text(record, name) for name in REQUIRED)
    start, end = fields.span(record)
    options, labelled = fields.options(record)
    answer, answer_index = fields.answer(record, options, typed=file.suffix != ".csv")
    return Row(
        index=index,
        sample_id=fields.optional_text(record, "sample_id") or "",
        video=video,
        path=_video_path(file.parent, video),
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
        path=_video_path(file.parent, video),
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
    present = file.present if file.numbers else set(REQUIRED)
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


def _read_parquet(path: Path, first: int, limit: int | None) -> _File:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path}: not readable as Parquet: {error}") from error
    known = [name for name in table.column_names if name in INPUT_SCHEMA.names]
    for name in known:
        _check_type(path, name, table.schema.field(name).type)
    numbers = range(1, table.num_rows + 1)
    # The number column keeps the row count when no column is carried through.
    numbered = table.replace_schema_metadata().add_column(0, _NUMBER, [pa.array(numbers, pa.int64())])
    extras = numbered.drop_columns(known)
    wanted = table.num_rows if limit is None else max(limit - first, 0)
    # Python objects of one batch at a time.
    batches = table.select(known).slice(0, wanted).to_batches(max_chunksize=_BATCH_ROWS)
    records = enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
    rows = [_read_row(first + number - 1, record, path, number) for number, record in records]
    return _File(path, numbers, set(known), rows, extras)


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


def _read_jsonl(path: Path, first: int, limit: int | None) -> _File:
    return _collect(path, _json_records(path), first, limit)


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Each line's number and record."""
    # Split at "\n" only: other line separators may stand inside a JSON string.
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse_json_object(line.removesuffix("\n"), f"{path}, row {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as text: {error}") from error


def _parse_json_object(line: str, where: str) -> dict[str, object]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error}): {line[:80]!r}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {line[:80]!r}")
    return value


def _read_csv(path: Path, first: int, limit: int | None) -> _File:
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
    return _collect(path, enumerate(records, start=1), first, limit)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as text: {error}") from error


def _collect(path: Path, records: Iterable[tuple[int, dict[str, object]]], first: int, limit: int | None) -> _File:
    """Makes rows of numbered records while they are read, and a table of the carried-through columns."""
    numbers, rows, present = array("q"), [], set[str]()
    carried: dict[str, list[object]] = {}
    for number, record in records:
        # A column that begins here is empty before.
        for name in [name for name in record if name not in _KNOWN and name not in carried]:
            carried[name] = [None] * len(numbers)
        for name, values in carried.items():
            values.append(record.pop(name, None))
        present.update(record)
        # Rows beyond the limit are read, since a file must be sound, but not checked.
        if limit is None or first + len(numbers) < limit:
            rows.append(_read_row(first + len(numbers), record, path, number))
        numbers.append(number)
    columns = {name: _to_array(name, values, path, numbers) for name, values in carried.items()}
    return _File(path, numbers, present, rows, pa.table({_NUMBER: pa.array(numbers, pa.int64()), **columns}))


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
