"""From the command line and a YAML file to settings, and from settings to an exit code.

A YAML file holds the groups of the settings as mappings::

    input: {manifest: clips.jsonl}
    model: {model: embedded}
    prune: {method: vitcop, keep_ratio: 0.25}

What the command line says wins over the file.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from pipeline.config import Options
from pipeline.errors import ConfigError

JobT = TypeVar("JobT")

WRONG_SETTINGS = 1


def main(
    config_type: type[JobT], run: Callable[[JobT], int], arguments: Sequence[str] | None, description: str | None
) -> int:
    """Run what the command line describes.

    Args:
        run: takes the settings; its result is the exit code.
        arguments: None: those of this process.

    Returns the exit code of `run`, or 1 when a setting is wrong, which is told on stderr.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return run(parse(config_type, arguments, description))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_SETTINGS


def parse(config_type: type[JobT], arguments: Sequence[str] | None = None, description: str | None = None) -> JobT:
    """The settings that `arguments` (default: the command line) and their `--config FILE.yaml` give.

    Args:
        config_type: a dataclass of setting groups, such as `JobConfig`.

    Raises:
        ConfigError: a file that can't be read, an unknown key, or a value out of range.
        SystemExit: 0 after `--help`; 1 for an argument the parser rejects, already reported on stderr.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    file, words = _take_config_flag(words)
    # The file's values become the defaults, so a flag beside it wins.
    default = config_type() if file is None else from_mapping(config_type, _read_yaml(file))
    note = "--config FILE.yaml reads settings from a file; flags given beside it win."
    try:
        return tyro.cli(
            config_type,
            args=words,
            default=default,
            description=f"{description or config_type.__doc__}\n\n{note}",
            config=(tyro.conf.OmitArgPrefixes,),
        )
    # argparse's own code for a wrong argument, 2, means "too many errors" here.
    except SystemExit as exit:
        raise SystemExit(1 if exit.code else 0) from exit


def from_mapping(config_type: type[JobT], values: object, path: str = "") -> JobT:
    """A config from nested mappings as YAML gives them; keys left out keep their defaults.

    Raises:
        ConfigError: an unknown key or a value of the wrong type, with its path (`prune.keep_ratio`).
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'configuration'}: expected a mapping, got {values!r}")
    hints = get_type_hints(config_type, include_extras=True)
    arguments = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(f"{where}: unknown setting; known here are {', '.join(sorted(hints))}")
        # A group of settings is a dataclass of its own, and is read by this function again.
        read = from_mapping if isinstance(hints[key], type) and dataclasses.is_dataclass(hints[key]) else _coerce
        arguments[key] = read(hints[key], value, where)
    return config_type(**arguments)


def _coerce(hint: Any, value: object, where: str) -> object:
    """`value` as the type a setting is declared with: an int may stand for a float and text for a path."""
    if hint is Options:
        hint = Mapping
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    # The first alternative that takes the value wins, in the order of the declaration.
    for alternative in alternatives:
        if get_origin(alternative) is tuple and isinstance(value, list | tuple):
            return tuple(_coerce(get_args(alternative)[0], item, where) for item in value)
        if get_origin(alternative) is Literal and value in get_args(alternative):
            return value
        if alternative is Path and isinstance(value, str):
            return Path(value)
        if alternative is float and type(value) is int:
            return float(value)
        if alternative is Mapping and isinstance(value, Mapping):
            return dict(value)
        # Exact types: in Python True is an int, and a yes in a file is no number.
        if type(value) is alternative:
            return value
    expected = " or ".join(getattr(alternative, "__name__", str(alternative)) for alternative in alternatives)
    raise ConfigError(f"{where} is {value!r}; it must be {expected}")


def _take_config_flag(words: list[str]) -> tuple[str | None, list[str]]:
    """Splits `--config FILE` or `--config=FILE` off the command line."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--config":
            if not equals and index + 1 == len(words):
                raise ConfigError("--config needs a YAML file")
            taken = 1 if equals else 2
            return (value if equals else words[index + 1]), words[:index] + words[index + taken :]
    return None, words


def _read_yaml(file: str) -> object:
    try:
        return yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: {error}") from error
