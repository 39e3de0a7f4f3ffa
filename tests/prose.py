"""Sentences of a Markdown page, and how long they are."""

import re
from pathlib import Path

_CODE = re.compile(r"^ {0,3}```.*?^ {0,3}```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_END = re.compile(r"(?<=[.!?])[)\"*_]*\s+(?=[\"(*_`A-Z0-9])")


def sentences(page: Path) -> list[str]:
    """Those of running text: no code blocks, tables, headings; a bullet's is a paragraph of its own."""
    text = _LINK.sub(r"\1", _CODE.sub("\n", page.read_text(encoding="utf-8")))
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        bare = line.strip()
        if not bare or bare.startswith(("|", "#", "<")):
            paragraphs.append([])
        elif re.match(r"([-*]|\d+\.) ", bare):
            paragraphs.append([re.sub(r"^([-*]|\d+\.) ", "", bare)])
        else:
            paragraphs[-1].append(bare)
    joined = (" ".join(lines) for lines in paragraphs)
    return [sentence for one in joined for sentence in _END.split(one) if words(sentence)]


def words(sentence: str) -> int:
    """How many it has; a piece of code in backticks counts as one."""
    plain = re.sub(r"`[^`]*`", "code", sentence)
    return len(re.findall(r"[A-Za-z0-9][\w'.,%/-]*", plain))
