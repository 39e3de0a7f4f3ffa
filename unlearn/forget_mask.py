"""Which tokens of forget text count: those of words that a regular expression finds, and some around them."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from unlearn.errors import UserError
from unlearn.progress import progress

Mask = NDArray[np.bool_]


def token_masks(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, pattern: str, context: int, source: str
) -> list[Mask]:
    """Of each text, which of its tokens count: bool [tokens], as many as `token_cache.tokenise` gives.

    A token counts if it shares a character with a match, or is at most `context` tokens from one that does.

    Raises:
        UserError: the pattern is none, or the tokenizer does not know where its tokens lie in the text.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"expected --forget-mask to be a regular expression; found {pattern!r}: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"expected a tokenizer that says where its tokens lie in the text, for --forget-mask; found "
            f"{type(tokenizer).__name__}: convert it to a tokenizer.json"
        )
    found: list[Mask] = []
    with progress(len(texts), f"masking {source}", "text") as bar:
        for text in texts:
            places = tokenizer(text, verbose=False, return_offsets_mapping=True)["offset_mapping"] if text else []
            found.append(_mask(text, places, compiled, context))
            bar.update()
    return found


def _mask(text: str, places: Sequence[tuple[int, int]], pattern: "re.Pattern[str]", context: int) -> Mask:
    spans = np.array(places, dtype=np.int64).reshape(-1, 2)
    counts = np.zeros(len(spans), dtype=bool)
    for match in pattern.finditer(text):
        touched = np.flatnonzero((spans[:, 0] < match.end()) & (spans[:, 1] > match.start()))
        if len(touched):
            counts[max(0, touched[0] - context) : touched[-1] + 1 + context] = True
    return counts
