"""Text -> token ids, kept on disk under a name made of the text's and the tokenizer's hashes.

Each document is kept with a checksum. A file that is damaged is only a cache: it is made again.
"""

import hashlib
import itertools
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from unlearn.distributed import is_main
from unlearn.errors import UserError
from unlearn.progress import progress

SCHEMA = pa.schema({"tokens": pa.list_(pa.int32()), "crc32": pa.uint32()})
BATCH = 1000  # documents that are written at once


def tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, source: str) -> list[np.ndarray]:
    """Token ids of every text, int32, from the cache where the same text met the same tokenizer before.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = Path(os.environ.get("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)) / "unlearn-tokens"
    file = folder / f"{_fingerprint(texts, tokenizer)}.arrow"
    found = _read(file, len(texts))
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, texts, tokenizer, source)
    except OSError as error:
        raise UserError(
            f"expected to write tokenised text into {folder}; found {error.strerror or str(error)!r}: free some space, "
            "or set HF_DATASETS_CACHE to another folder"
        ) from error
    found = _read(file, len(texts))
    if found is None:
        raise UserError(f"expected {file} as it was just written; found it damaged: check the disk")
    return found


def _write(file: Path, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Under a name of this process's own until it is whole; nothing is left of it otherwise."""
    descriptor, name = tempfile.mkstemp(suffix=".tmp", dir=file.parent)
    os.close(descriptor)
    try:
        with pa.OSFile(name, "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            with progress(len(texts), f"tokenising {source}", "text") as bar:
                for start in range(0, len(texts), BATCH):
                    batch = texts[start : start + BATCH]
                    writer.write_batch(_encoded(batch, tokenizer))
                    bar.update(len(batch))
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


def _encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> pa.RecordBatch:
    ids = [tokenizer(text, verbose=False)["input_ids"] if text else [] for text in texts]
    arrays = [np.array(tokens, dtype=np.int32) for tokens in ids]
    return pa.record_batch(
        [pa.array(arrays, SCHEMA.types[0]), pa.array(_checksums(arrays), SCHEMA.types[1])], schema=SCHEMA
    )


def _read(file: Path, documents: int) -> list[np.ndarray] | None:
    """What the cache has, as views into the file; None if there is nothing, or not what was written."""
    if not file.is_file():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        if table.schema == SCHEMA and table.num_rows == documents:
            found = [array for chunk in table.column("tokens").chunks for array in _arrays(chunk)]
            if _checksums(found) == table.column("crc32").to_pylist():
                return found
    except (pa.ArrowException, OSError):
        pass
    if is_main():
        print(f"warning: tokenised text in {file} is damaged: it is made again", flush=True)
    return None


def _checksums(documents: Sequence[np.ndarray]) -> list[int]:
    return [zlib.crc32(tokens.data) for tokens in documents]


def _arrays(chunk: pa.ListArray) -> Iterator[np.ndarray]:
    """The lists of one Arrow chunk as int32 views, without a copy."""
    values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
    return (values[start:end] for start, end in itertools.pairwise(offsets))


def _fingerprint(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for these texts under this tokenizer, with checksums."""
    fast = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    description = ("crc32", sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs), fast)
    digest = hashlib.sha256(repr(description).encode())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:32]
