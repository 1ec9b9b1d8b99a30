"""The report in Markdown."""

from pathlib import Path

from pipeline.sweep.report.markdown import plain


def test_text_means_nothing_in_markdown() -> None:
    assert plain("a|b *c* <d>\n# `e`_[f]") == r"a\|b \*c\* \<d\> \# \`e\`\_\[f\]"


def test_the_table_of_methods_comes_first_and_cautions_have_their_details(folder: Path) -> None:
    text = (folder / "report.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    title, blank, head, *_ = text.splitlines()
    assert title.startswith("# ViTCoP and its rivals at equal budget: tiny") and not blank
    assert head == "| accuracy, % | 50 % | 25 % | 15 % | 10 % | 5 % | 2 % |"
    assert "\n  * fastv at 10 %, 5 % and 2 %: layers before 1" in text
