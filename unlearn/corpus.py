"""Text -> token windows.

A corpus is read whole (`corpus_texts.py`) and tokenised once (`token_cache.py`). A document longer than a window
becomes several windows of nearly equal length, and none of it is dropped.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from unlearn.corpus_texts import read_texts
from unlearn.distributed import is_main, main_first
from unlearn.errors import UserError
from unlearn.forget_mask import token_masks
from unlearn.token_cache import tokenise


@dataclass(frozen=True)
class Corpus:
    """The windows of a corpus.

    Attributes:
        name: where the text came from.
        documents: how many documents with any text there are.
        windows: int32 token ids of each window.
        masks: which tokens of each window count, bool; None: all of them. One after the first of a window does.
    """

    name: str
    documents: int
    windows: list[np.ndarray]
    masks: list[np.ndarray] | None = None

    def mask(self, index: int) -> np.ndarray:
        """Which tokens of a window count."""
        return np.ones(len(self.windows[index]), dtype=bool) if self.masks is None else self.masks[index]

    def counted(self, index: int) -> int:
        """How many tokens of a window count."""
        return int(self.mask(index).sum())

    def predicted(self, index: int) -> int:
        """How many of those have a token before them, which predicts them."""
        return int(self.mask(index)[1:].sum())

    def keys(self) -> set[bytes]:
        """A digest of each window's token ids."""
        return {
            hashlib.blake2b(np.ascontiguousarray(w, dtype="<i4").data, digest_size=16).digest() for w in self.windows
        }

    def sha256(self) -> str:
        """Digest of every window's length and token ids, in their order, and of which count."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(len(window).to_bytes(8, "little") + np.ascontiguousarray(window, dtype="<i4").tobytes())
        for mask in self.masks or ():
            digest.update(np.packbits(mask).tobytes())
        return digest.hexdigest()


def read_corpus(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    column: str | None = None,
    template: str | None = None,
    column_flag: str = "--column",
    mask: str | None = None,
    context: int = 0,
) -> Corpus:
    """Read and tokenise a corpus. Documents of a single token, which have nothing to predict, are left out and counted.

    Args:
        source: a .jsonl, .json, .csv, .parquet or .txt file (a document a line), text also as .gz or .zst; a folder of
            .jsonl or .parquet files, or one that `datasets` saved; or a hub name, NAME or NAME:CONFIG, of which the
            split `train` is read.
        seq_len: the longest window, in tokens.
        column, template: which text of a row counts (see `config.TrainConfig`).
        column_flag: what the command calls `column` of this corpus, for messages.
        mask, context: which tokens count, see `forget_mask.token_masks`; windows without any are left out.

    Raises:
        UserError: nothing there, not readable, no such column, something else than text, no document with two tokens,
            or none that the mask keeps.
    """
    with main_first():
        found = read_texts(source, column=column, template=template, column_flag=column_flag)
        if not any(found.texts):
            raise UserError(f"expected text in {source}; found none: choose another corpus or column")
        tokens = tokenise(found.texts, tokenizer, source)
    documents = [document for document in tokens if len(document) > 1]
    single = [index for index, document in enumerate(tokens) if len(document) == 1]
    if not documents:
        raise UserError(
            f"expected documents of two tokens or more in {source}; found {len(single)} of a single token: there is "
            "nothing to predict in them, choose another corpus or column"
        )
    if single and is_main():
        print(
            f"warning: left out {len(single)} of the documents in {source}: they have a single token, and nothing to "
            f"predict (the first is {found.texts[single[0]]!r}, {found.place(single[0])})",
            flush=True,
        )
    windows = [window for document in documents for window in split_windows(document, seq_len)]
    if mask is None:
        return Corpus(source, len(documents), windows)
    found_masks = token_masks(found.texts, tokenizer, mask, context, source)
    masks = [part for one in found_masks if len(one) > 1 for part in split_windows(one, seq_len)]
    return _masked(Corpus(source, len(documents), windows, masks), mask)


def _masked(corpus: Corpus, mask: str) -> Corpus:
    """The windows of which a token counts that can be predicted; says how many tokens that are."""
    kept = [index for index in range(len(corpus.windows)) if corpus.predicted(index) > 0]
    if not kept:
        raise UserError(
            f"expected --forget-mask to be found in {corpus.name}; found {mask!r} nowhere: change it, or leave it out"
        )
    masks = [corpus.masks[index] for index in kept] if corpus.masks is not None else None
    found = Corpus(corpus.name, corpus.documents, [corpus.windows[index] for index in kept], masks)
    if is_main():
        counted, whole = sum(map(found.counted, range(len(kept)))), sum(map(len, found.windows))
        print(
            f"--forget-mask keeps {counted:,} of the {whole:,} tokens in {len(kept):,} of {len(corpus.windows):,} "
            f"windows of {corpus.name}",
            flush=True,
        )
    return found


def split_windows(document: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Cut a document into the fewest windows of at most `seq_len` (3 or more) tokens, nearly equal in length.

    All of it is kept, and no window has a single token if the document has two or more.
    """
    return np.array_split(document, math.ceil(len(document) / seq_len))
