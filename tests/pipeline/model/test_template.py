"""Templates are checked before anything starts, and rows are data to them, never code."""

from pathlib import Path

import pytest

from pipeline.config import AnswerConfig
from pipeline.errors import ConfigError, RowError
from pipeline.model.template import Template, lettered, message_templates, read_text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{category} {{ question }}", r"--prompt holds \{category\}; a column is written \{\{ category \}\}"),
        ("{question}", r"--prompt holds \{question\}; a column is written \{\{ question \}\}"),
        ("{{ question }", "--prompt, line 1: "),
        ("a\n{% if %}{{ question }}", "--prompt, line 2: .* it is read as Jinja2"),
        ("{{ question | shout }}", "--prompt, line 1: .*shout"),
        ("what?", r"--prompt is 'what\?'; it must have \{\{ question \}\} in it, or name a @FILE"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        message_templates(AnswerConfig(prompt=text))


def test_braces_of_other_texts_stay() -> None:
    text = """Reply as {"answer": "..."} or {}. {{ '{name}' }} {% raw %}{{ x }}{% endraw %} {{ question }}"""
    template, system = message_templates(AnswerConfig(prompt=text))
    assert template.render({"question": "Why?"}) == 'Reply as {"answer": "..."} or {}. {name} {{ x }} Why?'
    assert system is None


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    template = Template("system", "{{ category }} {{ kind }} {% for n in range(2) %}{{ n }}{% endfor %}")
    assert template.names == {"category", "kind"}
    template.check(["kind", "category", "question"])
    with pytest.raises(ConfigError, match="--system uses 'category', but there is no such column; known are kind, id"):
        template.check(["kind", "id"])


@pytest.mark.parametrize(
    "text", ["{{ b }}", "{{ a.b.c }}", "{{ a + 1 }}", "{{ row['c d'] }}", "{{ a[5] }}", "{{ 1 / n }}"]
)
def test_values_that_do_not_fit_are_an_error_of_the_row(text: str) -> None:
    with pytest.raises(RowError, match="bad_question: --prompt can't be filled in"):
        Template("prompt", text).render({"a": "text", "n": 0})


@pytest.mark.parametrize("text", ["{{ ''.__class__.__mro__ }}", "{{ row.pop('a') }}", "{{ a.append(1) }}"])
def test_templates_run_in_a_sandbox(text: str) -> None:
    columns = {"a": [0]}
    with pytest.raises(RowError, match="bad_question"):
        Template("prompt", text).render(columns)
    assert columns == {"a": [0]}


def test_values_are_no_templates() -> None:
    assert Template("prompt", "{{ question }}").render({"question": "{{ 7 * 7 }} {x}"}) == "{{ 7 * 7 }} {x}"


def test_a_null_is_written_as_nothing() -> None:
    assert Template("prompt", "[{{ hint }}]{% if hint %}!{% endif %}").render({"hint": None}) == "[]"


def test_a_template_is_a_text_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "say.txt").write_text("Größe: {{ question }}\n", encoding="utf-8")
    (tmp_path / "plain").write_text("{{ question }}?")
    assert read_text("prompt", "@say.txt") == read_text("prompt", "say.txt") == "Größe: {{ question }}\n"
    assert read_text("prompt", f"{tmp_path}/say.txt") == "Größe: {{ question }}\n"
    assert read_text("prompt", "@plain") == "{{ question }}?"
    for text in ("{{ question }}", "plain", "none.txt", "See\nsay.txt", "x" * 5000 + ".txt", ""):
        assert read_text("prompt", text) == text
    with pytest.raises(ConfigError, match=r"--system @none\.txt: .*No such file"):
        read_text("system", "@none.txt")


def test_more_options_than_letters_have_no_labels() -> None:
    assert lettered(["red", "{letter}"], "({letter}) {option}") == "(A) red\n(B) {letter}"
    with pytest.raises(RowError, match="27 options; there are 26 letters"):
        lettered([str(number) for number in range(27)])
