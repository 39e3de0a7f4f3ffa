"""A corpus as text: which of its columns count, and the text of every document. `corpus_files.py` reads the rows.

Only strings are text. A list, a number, a class label or bytes would become what Python prints for them, which no
author wrote; they are refused.
"""

import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from unlearn.corpus_files import Part, read_parts
from unlearn.errors import UserError
from unlearn.progress import progress

JOINED = ("title", "abstract", "text")
Column = Callable[[str], str | None]  # a column's name -> the string that a row has there, None where it has none
Compose = Callable[[Column], str]  # a row -> the text of its document


@dataclass(frozen=True)
class Texts:
    """The text of every row of a corpus, empty where a row has none.

    Attributes:
        parts: where they came from, and how many of each.
    """

    texts: list[str]
    parts: list[tuple[Part, int]]

    def place(self, index: int) -> str:
        """Where a document stands, for a message."""
        for part, count in self.parts:
            if index < count:
                return part.place(index)
            index -= count
        raise IndexError(index)


def read_texts(
    source: str, *, column: str | None = None, template: str | None = None, column_flag: str = "--column"
) -> Texts:
    """Read the text of every document of a corpus.

    Args:
        source, column, template, column_flag: as `corpus.read_corpus` has them.

    Raises:
        UserError: nothing there, not readable, no such column, or a value that is no text.
    """
    parts = read_parts(source)
    wanted, compose = _choice(source, parts, column, template)
    remedy = "give a column of strings, or a template over some"
    if column is None and template is None:
        remedy = f"name the column of strings that counts, as in `{column_flag} text`, or give a template over some"
    texts: list[str] = []
    counts: list[tuple[Part, int]] = []
    with progress(None, f"reading {source}", "text", delay=1.0) as bar:
        for part in parts:
            before = len(texts)
            for text in _part_texts(part, [name for name in wanted if name in part.columns], compose, remedy):
                texts.append(text)
                bar.update()
            counts.append((part, len(texts) - before))
    return Texts(texts, counts)


def _part_texts(part: Part, names: Sequence[str], compose: Compose, remedy: str) -> Iterable[str]:
    for name in names:
        if part.columns.count(name) > 1:
            raise UserError(
                f"expected one column {name!r} in {part.name}; found {part.columns.count(name)}: rename one"
            )
    for index, row in enumerate(part.read(names)):
        yield compose(partial(_string, part, index, dict(zip(names, row, strict=True)), remedy))


def _choice(
    source: str, parts: Sequence[Part], column: str | None, template: str | None
) -> tuple[Sequence[str], Compose]:
    """The columns to read, and how a document is made of them."""
    if template is not None:
        names = _template_columns(template, parts, source)
        return names, lambda of: _substitute(template, {name: of(name) or "" for name in names})
    if column is not None:
        _need(parts, column)
        return [column], lambda of: of(column) or ""
    if not any("text" in part.columns for part in parts):
        _need(parts, "page")
        return ["page"], lambda of: of("page") or ""
    for part in parts:
        if "page" not in part.columns:
            _need([part], "text")
    # Two corpora in one file: where a row has no text, it has a page.
    return [*JOINED, "page"], _joined


def _joined(of: Column) -> str:
    body = of("text")
    if body is None:  # a page beside a text, even an empty one, may be its number
        body = of("page")
    return "\n\n".join(text for text in (of("title"), of("abstract"), body) if text)


def _need(parts: Sequence[Part], name: str) -> None:
    for part in parts:
        if name not in part.columns:
            raise UserError(
                f"expected the text column {name!r} in {part.name}; found {', '.join(part.columns)}: name the column, "
                "or give a template"
            )


def _template_columns(template: str, parts: Sequence[Part], source: str) -> list[str]:
    """The columns that a template names; `UserError` if it names anything else, or nothing."""
    found = ", ".join(dict.fromkeys(name for part in parts for name in part.columns))
    expected = f"expected a template over the columns {found} of {source}"
    try:
        fields = [piece[1:] for piece in string.Formatter().parse(template) if piece[1] is not None]
    except ValueError as error:
        raise UserError(f"{expected}; found {error} in {template!r}: write a column as {{name}}") from error
    if not fields:
        raise UserError(f"{expected}; found none in {template!r}, the same text for every row: write {{name}}")
    for name, form, conversion in fields:
        if form or conversion or not all(name in part.columns for part in parts):
            raise UserError(f"{expected}; found {name!r} in {template!r}: write a column as {{name}}")
    return list(dict.fromkeys(str(name) for name, _, _ in fields))


def _substitute(template: str, row: dict[str, str]) -> str:
    """A template's text with a row's strings in place of their names; nothing for a row that has none of them."""
    if not any(row.values()):
        return ""
    pieces = string.Formatter().parse(template)
    return "".join(literal + (row[name] if name is not None else "") for literal, name, _, _ in pieces)


def _string(part: Part, index: int, values: dict[str, Any], remedy: str, name: str) -> str | None:
    """What one row of `part` has in the column `name`, without the spaces around it."""
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(
            f"expected text in the column {name!r} of {part.name}; found a {type(value).__name__} "
            f"({_short(repr(value))}) in {part.place(index)}: {remedy}"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"expected text in the column {name!r} of {part.name}; found half a character "
                f"({value[error.start]!r}) in {part.place(index)}: mend or remove it"
            ) from error
    return value.strip()


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
