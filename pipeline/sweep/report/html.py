"""HTML from values: text is escaped unless it is `Html` already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | bool | float | None) -> Html:
    """`<tag attributes>children</tag>`; `class_` stands for class, `data_x` for data-x; None and False are left out."""
    words = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        words.append(name if value is True else f'{name}="{escape(str(value))}"')
    inside = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    return Html(f"<{' '.join(words)}>{inside}</{tag}>")


def join(parts: Iterable[str]) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def table(head: Sequence[str], rows: Iterable[Html], **attributes: str | bool | None) -> Html:
    """A table that scrolls by itself where the page is too narrow for it."""
    header = element(
        "thead", element("tr", *(title if isinstance(title, Html) else element("th", title) for title in head))
    )
    body = element("tbody", *rows)
    return element("div", element("table", header, body, **attributes), class_="scroll")
