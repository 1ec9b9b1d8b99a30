"""The output folder: Parquet parts with one row per question, and `run.json`, which says what made them.

A folder holds the results of one configuration. Its parts appear whole or not at all, and a question that stands in one
of them is done.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.manifest import CONTENT, INPUT_SCHEMA

RUN_FILE = "run.json"
PART_PATTERN = "part-*.parquet"
LOCK_FILE = ".lock"


class Done(NamedTuple):
    """The stored state of a question that is done."""

    status: str
    attempt: int
    content: tuple[object, ...]


class OutputFolder:
    """Results of one configuration; made by `open_output`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._next_part: int | None = None

    @property
    def parts(self) -> list[Path]:
        return sorted(self.path.glob(PART_PATTERN))

    def read_run(self) -> dict[str, Any] | None:
        """`run.json`, or None when there is none.

        Raises:
            ConfigError: parts without a readable `run.json`, or one that no job has written.
        """
        file = self.path / RUN_FILE
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
        # Parts of unknown settings can't be added to; an empty folder is a fresh start.
        except FileNotFoundError:
            if self.parts:
                raise ConfigError(f"{self.path} has parts but no {RUN_FILE}; choose another --output") from None
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not readable: {error}; choose another --output") from error
        if not isinstance(run, dict) or "fingerprint" not in run:
            raise ConfigError(f"{file} is not the record of a job; choose another --output")
        return run

    def write_run(self, run: Mapping[str, object]) -> None:
        with _replacing(self.path / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def copy_run(self, folder: Path) -> None:
        """Puts a copy of `run.json` into another folder, for those who look at results there."""
        with _replacing(folder / RUN_FILE) as temporary:
            temporary.write_bytes((self.path / RUN_FILE).read_bytes())

    def claim(self, fingerprint: Mapping[str, object]) -> None:
        """Makes sure that the results in the folder, if any, were made with this configuration.

        Raises:
            ConfigError: they were not; every setting that differs is named.
        """
        run = self.read_run()
        # A record without parts holds no results, so other settings may take the folder over.
        differences = _differences(run["fingerprint"], fingerprint) if run and self.parts else []
        if differences:
            raise ConfigError(
                f"{self.path} holds results of another configuration: {'; '.join(differences)}. "
                "Choose another --output, or --overwrite to delete them"
            )

    def clear(self) -> None:
        """Deletes all results."""
        for file in [*self.parts, self.path / RUN_FILE]:
            file.unlink(missing_ok=True)
        self._next_part = None

    def read(self, columns: Sequence[str]) -> pa.Table:
        """These columns of all parts.

        Raises:
            ConfigError: a part that is not readable.
        """
        columns = list(columns)
        empty = pa.table({name: [] for name in columns})
        # The empty table gives a folder without parts its columns; its null types take those of the parts.
        return pa.concat_tables([empty, *(_read_part(part, columns) for part in self.parts)], promote_options="default")

    def done(self) -> dict[str, Done]:
        """The questions that are done, by `sample_id`; with an error where any row of that id has one."""
        table = self.read([*INPUT_SCHEMA.names, "status", "attempt"])
        done: dict[str, Done] = {}
        for record in table.to_pylist():
            known = done.get(record["sample_id"])
            # A sweep has several rows for an id; one with an error makes the question undone.
            if known is None or known.status != "error":
                done[record["sample_id"]] = Done(record["status"], record["attempt"], _content(record))
        return done

    def drop(self, ids: Iterable[str]) -> None:
        """Takes the rows with these `sample_id`s out of the parts."""
        gone = pa.array(list(ids), pa.string())
        self._next_part = None
        for part in self.parts:
            table = _read_part(part)
            # Parts are replaced one after the other, each whole; a part without rows would have no use.
            kept = table.filter(pc.invert(pc.is_in(table["sample_id"], gone)))
            if not kept.num_rows:
                part.unlink()
            elif kept.num_rows < table.num_rows:
                write_table(kept, part)

    def write(self, table: pa.Table) -> str:
        """Add a part; returns its name."""
        # Counted once from what is there, as a resumed run adds to the parts of the one before; the folder is locked.
        if self._next_part is None:
            self._next_part = 1 + max((int(part.stem.removeprefix("part-")) for part in self.parts), default=-1)
        name = f"part-{self._next_part:05d}.parquet"
        write_table(table, self.path / name)
        self._next_part += 1
        return name


@contextmanager
def open_output(path: Path) -> Iterator[OutputFolder]:
    """The folder, made when it is missing, for this process alone.

    Raises:
        ConfigError: it can't be written, or another job is writing to it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK_FILE).open("w")
    except OSError as error:
        raise ConfigError(f"--output {path} can't be written: {error}") from error
    # The lock belongs to the open file, so it goes with the process, however that ends.
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another job is writing to {path}") from None
        except OSError as error:
            raise ConfigError(f"--output {path} is on a file system without locks: {error}") from error
        # Temporary files of a run that was killed while it wrote.
        for leftover in path.glob("*.tmp"):
            leftover.unlink()
        yield OutputFolder(path)


def _content(record: Mapping[str, Any]) -> tuple[object, ...]:
    """A stored row's `Row.content`."""
    options = record["options"]
    plain = {**record, "options": None if options is None else tuple(options)}
    return tuple(plain[name] for name in CONTENT)


def _read_part(part: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(part, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{part} is not readable: {error}; delete it to have its rows done again") from error


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that is there whole or not at all."""
    with _replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` at once when the block ends well."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    # On disk before the rename, or a crash could leave a complete name with half a file.
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _differences(there: object, here: object, path: str = "") -> list[str]:
    """Every leaf at which two nested mappings differ, as `prune.keep_ratio is 0.25 there and 0.5 here`."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        # Keys of both sides: a setting that only one of them knows differs, too.
        return [
            difference
            for key in [*there, *(key for key in here if key not in there)]
            for difference in _differences(there.get(key), here.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if there == here else [f"{path} is {there!r} there and {here!r} here"]
