"""Questions in every cyclic order of their choices, and which ones make no sense in another order."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from unlearn.errors import UserError

Document = dict[str, Any]

_LETTER = r"\(?[A-J]\)?\.?"
_JOINED = r"(?:\s*[,&/]\s*(?:and\s+|or\s+)?|\s+(?:and|or|nor|to|&)\s+|(?<=\))\s+)"
_LEAD = r"(?:(?:both|either|neither|nor|all of|any of|only|options?|choices?|answers?|statements?)\s+)*"
_TAIL = r"(?:\s+(?:only|both|above|alone|is|are|may|could|can)\b.*)?"
# "A and D", "both a and b.", "neither (A) nor (B)", "(A), (B), and (C) are part of it"; not "vitamins A and C"
_LETTERS = re.compile(rf"\s*{_LEAD}{_LETTER}(?:{_JOINED}{_LETTER})+{_TAIL}[\s.;]*", re.IGNORECASE | re.DOTALL)
_ALL = r"(?:all|none|both|either|ni?either|any|some|each|one|two)"
# "all of the above", "none of above; this is why", "All of these options. ..."
_ABOVE = re.compile(rf"\b{_ALL} (?:of )?(?:the )?above\b|\bof the above\b", re.IGNORECASE)
_THESE = re.compile(
    rf"\s*{_ALL} of (?:these|those|them|the (?:options|choices|answers|other\w*|alternatives|statements|listed))\b",
    re.IGNORECASE,
)


def depends_on_order(choices: Sequence[Any]) -> bool:
    """Whether a choice speaks of the others by their letters or their places, so that moving it changes its meaning."""
    texts = [str(choice) for choice in choices]
    return any(_LETTERS.fullmatch(text) or _ABOVE.search(text) or _THESE.match(text) for text in texts)


def check_columns(document: Document, orders: int, task: str) -> None:
    """Raise `UserError` unless a question can be asked in other orders."""
    choices, answer = document.get("choices"), document.get("answer")
    if not isinstance(choices, list) or len(choices) != orders or not str(answer).isdigit():
        raise UserError(
            f"expected columns choices (of {orders}) and answer (a number) for --permute-choices in task {task}; found "
            f"{', '.join(document)}: leave --permute-choices out"
        )


def in_every_order(document: Document) -> Iterator[Document]:
    """The question with its choices moved up by 0, 1, ... places; the first is the question itself."""
    choices, answer = document["choices"], document["answer"]
    for shift in range(len(choices)):
        place = (int(str(answer)) - shift) % len(choices)
        yield document | {
            "choices": choices[shift:] + choices[:shift],
            "answer": str(place) if isinstance(answer, str) else place,
        }
