"""README and docs in plain English: short sentences, counted."""

import re
import statistics
from pathlib import Path

import pytest
from prose import sentences, words

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_how_sentences_are_counted(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading that is none\n\nOne `python -m x --y z` here. Two\nlines: [of a link](http://x/y).\n\n- A bullet\n"
        "  of five words.\n\n| a | table |\n\n```\ncode of many words. More.\n```\n"
    )
    assert [(words(one), one) for one in sentences(page)] == [
        (3, "One `python -m x --y z` here."),
        (5, "Two lines: of a link."),
        (5, "A bullet of five words."),
    ]


def test_most_sentences_are_short() -> None:
    """At most 8 % have more than 30 words, and half of them at most 16."""
    lengths = [words(sentence) for page in PAGES for sentence in sentences(page)]
    assert len(lengths) > 400 and statistics.median(lengths) <= 16
    assert sum(length > 30 for length in lengths) <= 0.08 * len(lengths)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_is_a_paragraph(page: Path) -> None:
    longest = max(sentences(page), key=words)
    assert words(longest) <= 60, longest


def anchors(page: Path) -> set[str]:
    """The names under which GitHub links to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
