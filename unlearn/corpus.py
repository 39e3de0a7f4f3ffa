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
from unlearn.token_cache import tokenise


@dataclass(frozen=True)
class Corpus:
    """The windows of a corpus.

    Attributes:
        name: where the text came from.
        documents: how many documents with any text there are.
        windows: int32 token ids of each window.
    """

    name: str
    documents: int
    windows: list[np.ndarray]

    def keys(self) -> set[bytes]:
        """A digest of each window's token ids."""
        return {
            hashlib.blake2b(np.ascontiguousarray(w, dtype="<i4").data, digest_size=16).digest() for w in self.windows
        }

    def sha256(self) -> str:
        """Digest of every window's length and token ids, in their order."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(len(window).to_bytes(8, "little") + np.ascontiguousarray(window, dtype="<i4").tobytes())
        return digest.hexdigest()


def read_corpus(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    column: str | None = None,
    template: str | None = None,
    column_flag: str = "--column",
) -> Corpus:
    """Read and tokenise a corpus. Documents of a single token, which have nothing to predict, are left out and counted.

    Args:
        source: a .jsonl, .json, .csv, .parquet or .txt file (a document a line), text also as .gz or .zst; a folder of
            .jsonl or .parquet files, or one that `datasets` saved; or a hub name, NAME or NAME:CONFIG, of which the
            split `train` is read.
        seq_len: the longest window, in tokens.
        column, template: which text of a row counts (see `config.TrainConfig`).
        column_flag: what the command calls `column` of this corpus, for messages.

    Raises:
        UserError: nothing there, not readable, no such column, something else than text, or no document with two
            tokens.
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
    return Corpus(source, len(documents), windows)


def split_windows(document: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Cut a document into the fewest windows of at most `seq_len` (3 or more) tokens, nearly equal in length.

    All of it is kept, and no window has a single token if the document has two or more.
    """
    return np.array_split(document, math.ceil(len(document) / seq_len))
