"""The rows of a corpus: a file, a folder of files, a data set that `datasets` saved, or one on the hub."""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets.exceptions import DatasetNotFoundError

from unlearn.errors import UserError
from unlearn.files import check_file, hub_error, is_hub_name, kind_of, unique_keys

KINDS = (".jsonl", ".json", ".parquet", ".csv", ".txt")
IN_FOLDERS = (".jsonl", ".parquet")  # what a folder of files may consist of
PACKED = (".gz", ".zst")
SHARD = re.compile(r"^(.*)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.")  # older ones of the hub have a hash behind
SPLIT = re.compile(r"^(train|validation|valid|val|dev|test)(?:[-_.]?\d+)?\.", re.IGNORECASE)
SAVED = ("state.json", "dataset_dict.json")  # one of them is in a folder that `datasets` saved
ROWS = 1000  # of a table that are Python's objects at once


@dataclass(frozen=True)
class Part:
    """The rows of one file or data set.

    Attributes:
        name: for messages. columns: in their order.
        read: the values of some columns, row by row. place: where a row stands, by its number from 0.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[tuple[Any, ...]]]
    place: Callable[[int], str]


def read_parts(source: str) -> list[Part]:
    """The files of a corpus, or its one data set.

    Raises:
        UserError: nothing there, not readable, damaged, or of a kind that is not read.
    """
    path = Path(source).expanduser()
    kind = kind_of(path, "corpus")
    if kind == "folder":
        return _folder(path)
    if kind == "file":
        return [_file(path)]
    name, _, config = source.partition(":")
    if _suffix(path)[0] in KINDS or not is_hub_name(name):
        raise UserError(f"expected a corpus file, folder or hub name; found nothing at {source}: check the path")
    return [_data_set(_from_hub(name, config), source)]


def _suffix(path: Path) -> tuple[str, str]:
    """(".jsonl", ".gz") of `x.JSONL.gz`, (".txt", "") of `x.txt`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        return (suffixes[0] if len(suffixes) == 2 else ""), suffixes[-1]
    return (suffixes[-1] if suffixes else ""), ""


def _from_hub(name: str, config: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, config or None, split="train")
    except (DatasetNotFoundError, ConnectionError, OSError) as error:
        raise hub_error(name, "corpus", error) from error
    except (ValueError, RuntimeError) as error:  # another configuration or split is wanted; or it is a script
        reason = " ".join(str(error).split())
        raise UserError(
            f"expected the split `train` of the data set {name}; found {reason[:200]!r}: name a configuration as "
            "NAME:CONFIG, or give its files"
        ) from error


def _folder(folder: Path) -> list[Part]:
    """A data set that `datasets` saved, or all JSONL or all Parquet files of a folder."""
    if any((folder / name).is_file() for name in SAVED):
        return [_data_set(_saved(folder), str(folder))]
    files = sorted(file for file in folder.iterdir() if _suffix(file)[0] in IN_FOLDERS and file.is_file())
    kinds = {_suffix(file)[0] for file in files}
    if len(kinds) != 1:
        found = "both" if kinds else "none"
        raise UserError(
            f"expected .jsonl or .parquet files in {folder}, or what `Dataset.save_to_disk` wrote; found {found}: give "
            "the file inside it"
        )
    return [_file(file) for file in _one_set(folder, files)]


def _one_set(folder: Path, files: list[Path]) -> list[Path]:
    """The files, or of several splits those of `train`; `UserError` unless of a set in numbered parts all are there."""
    shards = {file: match for file in files if (match := SHARD.match(file.name))}
    named = shards or {file: match for file in files if (match := SPLIT.match(file.name))}
    if not named:
        return files
    splits = {match[1].lower() for match in named.values()}
    split = "train" if "train" in splits else next(iter(splits))
    chosen = [file for file, match in named.items() if match[1].lower() == split]
    numbered = sorted((int(shards[file][3]), int(shards[file][2])) for file in chosen if file in shards)
    whole = not numbered or ({count for count, _ in numbered} == {len(chosen)} and len(set(numbered)) == len(chosen))
    if len(named) < len(files) or (len(splits) > 1 and split != "train") or not whole:
        raise UserError(
            f"expected all files of one set in {folder}; found {', '.join(file.name for file in files[:6])}: fetch "
            "what is missing, or give the file that is meant"
        )
    return chosen


def _saved(folder: Path) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
        raise hub_error(str(folder), "corpus", error) from error
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            raise UserError(f"expected a split `train` in {folder}; found {', '.join(saved)}: give the split's folder")
        return saved["train"]
    return saved


def _data_set(found: datasets.Dataset, name: str) -> Part:
    def read(names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for batch in found.select_columns(list(names)).iter(ROWS):
            yield from zip(*(batch[column] for column in names), strict=True)

    return Part(name, tuple(found.column_names), read, _row)


def _row(index: int) -> str:
    return f"row {index + 1}"


def _file(path: Path) -> Part:
    kind, packed = _suffix(path)
    if kind not in KINDS or (packed and kind == ".parquet"):
        raise UserError(
            f"expected a corpus ending in {', '.join(KINDS)} (text also .gz or .zst); found {path}: convert it"
        )
    check_file(path, "corpus")
    if path.stat().st_size == 0:
        raise UserError(f"expected text in {path}; found an empty file: choose another corpus")
    try:
        if kind == ".parquet":
            return _parquet(path)
        with _unpacked(path, packed) as stream:
            return {".csv": _csv, ".txt": _text}.get(kind, _json)(path, stream)
    except UnicodeDecodeError as error:
        raise UserError(
            f"expected UTF-8 in {path}; found a damaged character, or another encoding ({error.reason} at byte "
            f"{error.object[error.start : error.start + 1].hex()}): convert it, e.g. with `iconv -f LATIN1 -t UTF-8`"
        ) from error
    except (pa.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"expected a whole {kind}{packed} file at {path}; found a damaged one ({str(error).splitlines()[0]}): "
            "fetch it again"
        ) from error


def _unpacked(path: Path, packed: str) -> BinaryIO:
    if packed == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if packed == ".zst":
        if not pa.Codec.is_available("zstd"):
            raise UserError(f"expected a pyarrow with zstd for {path}; found one without: unpack it with `zstd -d`")
        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return path.open("rb")


def _parquet(path: Path) -> Part:
    columns = tuple(pyarrow.parquet.read_schema(path).names)

    def read(names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(ROWS, columns=list(names)):
                    yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise hub_error(str(path), "corpus", error) from error

    return Part(str(path), columns, read, _row)


def _table(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]], lines: Sequence[int]) -> Part:
    def read(names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for row in rows:
            yield tuple(row.get(name) for name in names)

    return Part(str(path), tuple(columns), read, lambda index: f"line {lines[index]}")


def _lines(stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, and their numbers; they end at newlines, and at nothing else."""
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n") as text:
        yield from ((number, line) for number, line in enumerate(text, 1) if line.strip())


def _text(path: Path, stream: BinaryIO) -> Part:
    numbered = list(_lines(stream))
    return _table(path, ["text"], [{"text": line} for _, line in numbered], [number for number, _ in numbered])


def _json(path: Path, stream: BinaryIO) -> Part:
    """An object a line, or one array of objects."""
    numbered = list(_lines(stream))
    if numbered and numbered[0][1].lstrip().startswith("["):
        rows = _parsed("".join(line for _, line in numbered), path, "the array")
        places = [f"item {index + 1}" for index in range(len(rows))]
    else:
        places = [f"line {number}" for number, _ in numbered]
        rows = [_parsed(line, path, place) for (_, line), place in zip(numbered, places, strict=True)]
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row, dict):
            raise UserError(
                f'expected objects in {path}, as {{"text": "..."}}; found a {type(row).__name__} in {place}: write '
                "each document as an object"
            )
    columns = dict.fromkeys(name for row in rows for name in row)

    def read(names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for row in rows:
            yield tuple(row.get(name) for name in names)

    return Part(str(path), tuple(columns), read, lambda index: places[index])


def _parsed(text: str, path: Path, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"expected JSON in {path}; found a damaged piece in {place} ({error}): mend or remove it, or fetch the "
            "file again"
        ) from error


def _csv(path: Path, stream: BinaryIO) -> Part:
    """A header and rows; every value is text, as it is written."""
    csv.field_size_limit(sys.maxsize)
    rows, lines = [], []
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, [])
            for values in reader:
                if values and len(values) != len(header):
                    raise csv.Error(f"{len(values)} values under {len(header)} names")
                if values:
                    rows.append(dict(zip(header, values, strict=True)))
                    lines.append(reader.line_num)
        except csv.Error as error:
            raise UserError(
                f"expected comma-separated values in {path}; found a damaged row in line {reader.line_num} ({error}): "
                "mend or remove it"
            ) from error
    return _table(path, header, rows, lines)
