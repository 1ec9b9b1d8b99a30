"""Prompts as Jinja2 templates over the columns of a manifest, from a text or a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.config import AnswerConfig
from pipeline.errors import ConfigError, RowError
from pipeline.manifest.options import LETTERS

TEXT_FILES = (".txt", ".md", ".j2", ".jinja")
ROW = "row"
"""Stands for all columns in a template, for those whose names are no Python names: `row["option 0"]`."""


def lettered(options: Sequence[str], style: str = "{letter}. {option}") -> str:
    """The options one a line, each behind its letter; the filter `lettered` of a template.

    Raises:
        RowError: `bad_question`, more options than letters.
    """
    if len(options) > len(LETTERS):
        raise RowError("bad_question", f"{len(options)} options; there are {len(LETTERS)} letters")
    pairs = zip(LETTERS, options, strict=False)
    # `replace`, not `format`: an option's text may hold braces.
    return "\n".join(style.replace("{letter}", letter).replace("{option}", option) for letter, option in pairs)


def _make_environment() -> ImmutableSandboxedEnvironment:
    """The environment of all templates: a sandbox, as a row's values are not trusted; a null is written as nothing."""
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=lambda value: "" if value is None else value
    )
    environment.filters["lettered"] = lettered
    del environment.globals["lipsum"]  # invents text
    return environment


_ENVIRONMENT = _make_environment()


class Template:
    """One template.

    Args:
        flag: the setting it comes from, for messages: `prompt` or `system`.

    Attributes:
        names: the columns that it uses, and `row` when it uses that.

    Raises:
        ConfigError: it is no Jinja2 template, or has a name in single braces.
    """

    def __init__(self, flag: str, text: str) -> None:
        self.flag, self.text = flag, text
        try:
            tree = _ENVIRONMENT.parse(text)
            self._template = _ENVIRONMENT.from_string(text)
        except TemplateSyntaxError as error:
            raise ConfigError(f"--{flag}, line {error.lineno}: {error.message}; it is read as Jinja2") from error
        except TemplateError as error:
            raise ConfigError(f"--{flag}: {error}; it is read as Jinja2") from error
        # Only the text outside Jinja's own marks is looked through for single braces.
        literal = "\n".join(value for _, kind, value in _ENVIRONMENT.lex(text) if kind == "data")
        if single := re.search(r"(?<!\{)\{[ \t]*([A-Za-z_]\w*)[ \t]*\}(?!\})", literal):
            name = single[1]
            raise ConfigError(
                f"--{flag} holds {single[0]}; a column is written {{{{ {name} }}}}, and braces that the model is to "
                f"read {{{{ '{single[0]}' }}}}"
            )
        # `find_undeclared_variables` counts Jinja's own functions, such as `range`, as well.
        used = meta.find_undeclared_variables(tree) - _ENVIRONMENT.globals.keys()
        self.names = frozenset(used)

    def check(self, columns: Iterable[str]) -> None:
        """
        Raises:
            ConfigError: it uses a name that is none of the columns.
        """
        known = list(columns)
        for name in sorted(self.names - {ROW, *known}):
            raise ConfigError(f"--{self.flag} uses {name!r}, but there is no such column; known are {', '.join(known)}")

    def render(self, columns: Mapping[str, object]) -> str:
        """
        Raises:
            RowError: `bad_question`, the template can't be filled in with these values.
        """
        try:
            return self._template.render({ROW: columns, **columns})
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise RowError("bad_question", f"--{self.flag} can't be filled in: {error}") from error


def message_templates(config: AnswerConfig) -> tuple[Template, Template | None]:
    """The templates of the user's message and, if there is one, the system message.

    Raises:
        ConfigError: one of them can't be used.
    """
    prompt = Template("prompt", config.prompt)
    if "question" not in prompt.names:
        raise ConfigError(f"--prompt is {config.prompt!r}; it must have {{{{ question }}}} in it, or name a @FILE")
    return prompt, Template("system", config.system) if config.system else None


def read_text(flag: str, value: str) -> str:
    """The text that a setting means: itself, or what is in a file, for `@FILE` or the path of a text file.

    Raises:
        ConfigError: a file that can't be read.
    """
    file = value.removeprefix("@")
    if file == value and not (value.endswith(TEXT_FILES) and "\n" not in value and _is_file(value)):
        return value
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--{flag} {value}: {error}") from error


def _is_file(path: str) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except OSError:  # such as one that is too long for a name
        return False
