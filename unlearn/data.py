"""Text -> token windows -> one seeded global order -> global batches -> this rank's rows.

A corpus is read whole, tokenised once and cached by `datasets` under a name made of the text's and the tokenizer's
hashes. A document longer than a window becomes several windows of nearly equal length, and none of it is dropped. The
order of the windows, and which of them form a global batch, depend on the seed and not on the number of ranks.
"""

import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet
import torch
from datasets.exceptions import DatasetNotFoundError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unlearn.distributed import main_first, rank, world_size
from unlearn.errors import UserError
from unlearn.files import hub_error, is_hub_name, writing
from unlearn.seeding import derive, generator

MOST = 10**8  # windows of a run, whose order is held in memory: no run of years has more
JOINED = ("title", "abstract", "text")


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


@dataclass(frozen=True)
class Rows:
    """Some windows, padded on the right.

    Attributes:
        input_ids: int64 [B, S].
        real: int64 [N], where the real tokens are among the B S. leading: int64 [M], where those are that have a next
            token. As positions, not as masks, whose use would make the CPU wait for the GPU.
        keys: int64 [B], one number in 0..2**31-1 for each row, from (seed, step, window).
    """

    input_ids: Tensor
    real: Tensor
    leading: Tensor
    keys: Tensor

    @property
    def tokens(self) -> int:
        """N, the number of real tokens."""
        return self.real.shape[0]

    def at_real(self, values: Tensor) -> Tensor:
        """[B, S, ..] -> [N, ..]: the values at real tokens."""
        return values.flatten(0, 1).index_select(0, self.real)

    def at_leading(self, values: Tensor) -> Tensor:
        """[B, S, ..] -> [M, ..]: the values at tokens that have a next one."""
        return values.flatten(0, 1).index_select(0, self.leading)

    def next_ids(self) -> Tensor:
        """int64 [M]: the next tokens of those."""
        return self.input_ids.flatten().index_select(0, self.leading + 1)


def read_corpus(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    column: str | None = None,
    template: str | None = None,
) -> Corpus:
    """Read and tokenise a corpus.

    Args:
        source: a .jsonl, .parquet or .txt file (a document a line), a folder that `datasets` saved, or a hub name,
            NAME or NAME:CONFIG, of which the split `train` is read.
        seq_len: the longest window, in tokens.
        column, template: which text of a row counts (see `config.TrainConfig`).

    Raises:
        UserError: nothing there, not readable, no such column, no text, or a document of one token.
    """
    with main_first():
        table = _read_rows(source)
        texts = _texts(table, source, column, template)
        tokens = _tokenise(texts, tokenizer, source)
    lengths = [len(document) for document in tokens]
    if 1 in lengths:
        raise UserError(
            f"expected documents of two tokens or more in {source}; found one of a single token "
            f"({texts[lengths.index(1)]!r}): there is nothing to predict in it, remove it"
        )
    documents = [document for document in tokens if len(document) > 0]
    windows = [window for document in documents for window in split_windows(document, seq_len)]
    return Corpus(source, len(documents), windows)


def split_windows(document: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Cut a document into the fewest windows of at most `seq_len` (3 or more) tokens, nearly equal in length.

    All of it is kept, and no window has a single token if the document has two or more.
    """
    return np.array_split(document, math.ceil(len(document) / seq_len))


def _read_rows(source: str) -> datasets.Dataset:
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_saved(path)
    if path.is_file():
        return _read_file(path)
    name, _, config = source.partition(":")
    if Path(source).suffix in (".jsonl", ".json", ".parquet", ".txt") or not is_hub_name(name):
        raise UserError(f"expected a corpus file, folder or hub name; found nothing at {source}: check the path")
    try:
        return datasets.load_dataset(name, config or None, split="train")
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        raise hub_error(name, "corpus", error) from error


def _read_saved(folder: Path) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, pa.ArrowInvalid) as error:
        raise UserError(
            f"expected a folder written by `Dataset.save_to_disk` at {folder}; found another folder: give "
            "the file inside it"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            raise UserError(f"expected a split `train` in {folder}; found {', '.join(saved)}: give the split's folder")
        return saved["train"]
    return saved


def _read_file(path: Path) -> datasets.Dataset:
    readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".parquet": pyarrow.parquet.read_table, ".txt": _read_text}
    if path.suffix not in readers:
        raise UserError(f"expected a corpus ending in .jsonl, .parquet or .txt; found {path}: convert it")
    if path.stat().st_size == 0:
        raise UserError(f"expected text in {path}; found an empty file: choose another corpus")
    try:
        return datasets.Dataset(readers[path.suffix](path))
    except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"expected a whole {path.suffix} file at {path}; found a damaged one "
            f"({str(error).splitlines()[0]}): fetch it again"
        ) from error


def _read_jsonl(path: Path) -> pa.Table:
    # One block for the whole file, so that a long document never straddles two blocks.
    block = pyarrow.json.ReadOptions(block_size=max(1 << 20, min(path.stat().st_size + 1, 2**31 - 1)))
    return pyarrow.json.read_json(path, read_options=block)


def _read_text(path: Path) -> pa.Table:
    return pa.table({"text": [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]})


def _texts(table: datasets.Dataset, source: str, column: str | None, template: str | None) -> list[str]:
    """The text of every row."""
    found = table.column_names
    if template is not None:
        try:
            return [template.format(**{key: _string(value) for key, value in row.items()}) for row in table]
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"expected a template over the columns {', '.join(found)} of {source}; found {error} in "
                f"{template!r}: write a column as {{name}}"
            ) from error
    if column is None:
        columns = [name for name in JOINED if name in found] if "text" in found else ["page"]
    else:
        columns = [column]
    for name in columns:
        if name not in found:
            raise UserError(
                f"expected the text column {name!r} in {source}; found {', '.join(found)}: name the column, or give a "
                "template"
            )
    parts = [table[name] for name in columns]
    return ["\n\n".join(text for text in map(_string, row) if text) for row in zip(*parts, strict=True)]


def _string(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase, source: str) -> list[np.ndarray]:
    """Token ids of every text, from the cache where the same text met the same tokenizer before."""
    if not any(texts):
        raise UserError(f"expected text in {source}; found none: choose another corpus or column")
    key = _fingerprint(texts, tokenizer)
    folder = Path(os.environ.get("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)) / "unlearn-tokens"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    dataset = datasets.Dataset(pa.table({"text": texts}), fingerprint=key)

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"tokens": [tokenizer(text, verbose=False)["input_ids"] if text else [] for text in rows["text"]]}

    mapped = dataset.map(
        encode,
        batched=True,
        remove_columns=["text"],
        features=datasets.Features({"tokens": datasets.Sequence(datasets.Value("int32"))}),
        cache_file_name=str(folder / f"{key}.arrow"),
        new_fingerprint=key,
        desc=f"tokenising {source}",
    )
    return [array for chunk in mapped.data.column("tokens").chunks for array in _arrays(chunk)]


def _arrays(chunk: pa.ListArray) -> list[np.ndarray]:
    """The lists of one Arrow chunk as int32 views, without a copy."""
    values, offsets = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
    return [values[start:end] for start, end in itertools.pairwise(offsets)]


def _fingerprint(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for these texts under this tokenizer."""
    fast = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    description = (sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs), fast)
    digest = hashlib.sha256(repr(description).encode())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:32]


class Batches:
    """Global batches of one corpus: the same windows in the same order at any number of ranks.

    The first `examples` windows of one seeded permutation are those to train on; each pass over them has a permutation
    of its own.

    Args:
        total: windows to train on over the whole run; the last global batch may be short.
        batch: windows of a full global batch.
        tag: sets this corpus's order apart from another's under the same seed.
        micro_batch: most windows of one forward pass on one rank.
        micro_tokens: most tokens, padding included, of one forward pass with more than one window.

    Attributes:
        chosen: how many windows there are to train on. unique: how many of them the whole run comes to.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        examples: int,
        total: int,
        batch: int,
        seed: int,
        tag: str,
        micro_batch: int | None = None,
        micro_tokens: int | None = None,
    ):
        if total > MOST:
            raise UserError(
                f"expected at most {MOST:,} windows to train on; found {total:,}: lower --epochs, --steps or --examples"
            )
        chosen = torch.randperm(len(corpus.windows), generator=generator(seed, tag, "choice"))[:examples].tolist()
        self.corpus, self.chosen, self.total, self.batch = corpus, len(chosen), total, batch
        self.seed, self.tag, self.micro_batch, self.micro_tokens = seed, tag, micro_batch, micro_tokens
        self.order: list[int] = []
        while len(self.order) < total:
            epoch = len(self.order) // self.chosen
            permutation = torch.randperm(self.chosen, generator=generator(seed, tag, "epoch", epoch)).tolist()
            self.order += [chosen[index] for index in permutation]
        del self.order[total:]
        self.unique = len(set(self.order))

    @property
    def steps(self) -> int:
        """Optimizer steps to train on all windows."""
        return math.ceil(self.total / self.batch)

    def indices(self, step: int) -> list[int]:
        """The windows of one global batch, as indices into the corpus."""
        return self.order[step * self.batch : (step + 1) * self.batch]

    def tokens(self, step: int) -> int:
        """Real tokens of one global batch."""
        return sum(len(self.corpus.windows[index]) for index in self.indices(step))

    def targets(self, step: int) -> int:
        """Tokens of one global batch that have a next token."""
        return self.tokens(step) - len(self.indices(step))

    def micro_batches(self, step: int, device: torch.device) -> Iterator[Rows]:
        """This rank's micro-batches of one global batch, equally many on every rank.

        A rank with nothing left gets rows without a real token: their forward and backward passes add zero, and a
        sharded model needs every rank in every pass.
        """
        windows, planned = self.indices(step), self.plan(step)
        for first in range(0, len(planned), world_size()):
            turn = first + rank()
            part = planned[turn] if turn < len(planned) else []
            keys = [derive(self.seed, self.tag, step, position) for position in part]
            yield pad([self.corpus.windows[windows[position]] for position in part], keys, device)

    def plan(self, step: int) -> list[list[int]]:
        """The micro-batches of one global batch, as positions in `indices(step)`; rank r takes numbers r, r + W, ...

        Windows of similar length stand together, so that little is padded. The number of ranks has an effect only
        where some rank would otherwise get nothing.
        """
        lengths = [len(self.corpus.windows[index]) for index in self.indices(step)]
        most = min(self.micro_batch or len(lengths), math.ceil(len(lengths) / world_size()))
        planned: list[list[int]] = []
        for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
            current = planned[-1] if planned else []
            longest = lengths[current[0]] if current else math.inf
            fits = self.micro_tokens is None or (len(current) + 1) * longest <= self.micro_tokens
            if current and len(current) < most and fits:
                current.append(position)
            else:
                planned.append([position])
        return planned


def pad(windows: Sequence[np.ndarray], keys: Sequence[int], device: torch.device) -> Rows:
    """Stack windows of different lengths, padded on the right with token 0; without any, one row of padding alone."""
    longest = max((len(window) for window in windows), default=2)
    input_ids = torch.zeros(max(1, len(windows)), longest, dtype=torch.int64)
    real, leading = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    keys = keys or [0]
    for row, window in enumerate(windows):
        input_ids[row, : len(window)] = torch.tensor(window)
        real.append(torch.arange(row * longest, row * longest + len(window)))
        leading.append(real[-1][:-1])
    everything = (input_ids, torch.cat(real), torch.cat(leading), torch.tensor(keys, dtype=torch.int64))
    return Rows(*(tensor.to(device) for tensor in everything))


def check_examples(corpus: Corpus, examples: int, batch: int) -> None:
    """Raise unless every rank can have at least one example of `corpus`, and one row of a full global batch."""
    available = min(examples, len(corpus.windows))
    if available < world_size():
        raise UserError(
            f"expected at least one example a rank ({world_size()} ranks); found {available} in {corpus.name}: "
            "use fewer ranks or a larger corpus"
        )
    if batch < world_size():
        raise UserError(f"expected --batch of at least one row a rank ({world_size()} ranks); found {batch}: raise it")
