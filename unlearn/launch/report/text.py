"""Text as it may stand on a page."""

import unicodedata

# Control and format characters (among them those that turn the writing around), surrogates, unassigned.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Cn")


def printable(text: str) -> str:
    """`text` with every character that has no picture of its own replaced; line ends and tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _UNPRINTABLE else "\ufffd" for c in text)
