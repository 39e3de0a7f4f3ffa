"""Question files as tables: Parquet, JSON Lines, JSON and CSV. Texts stay as they are written.

pyarrow's and pandas' readers guess: they make a timestamp of "2024-01-02", and nothing of the answers "NA" and "None".
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from unlearn.errors import UserError
from unlearn.files import check_file, unique_keys

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
_WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")


def suffix_of(file: Path) -> str | None:
    """Which of `SUFFIXES` a file's name ends in, whatever its case."""
    return next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)


def read_questions(files: Sequence[Path]) -> pyarrow.Table:
    """The rows of all files of one split; they may differ in the width of a type and in the order of columns.

    Raises:
        UserError: a file is damaged or of another format, or their columns do not fit together.
    """
    tables = [_read(file) for file in files]
    try:
        whole = pyarrow.concat_tables(tables, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise UserError(
            f"expected the same columns in {', '.join(file.name for file in files)}; found {_first_line(error)!r}: "
            "mend the files, or put them into different folders"
        ) from error
    joined = _numbers(whole.schema)
    for file, table in zip(files, tables, strict=True):
        for name, kind in _numbers(table.schema).items():
            if pyarrow.types.is_integer(kind) and not pyarrow.types.is_integer(joined.get(name, kind)):
                raise UserError(
                    f"expected one kind of numbers in the column {name} of {', '.join(file.name for file in files)}; "
                    f"found whole ones in {file.name} and others elsewhere, beside which 1 becomes 1.0: write them as "
                    "texts"
                )
    return whole


def _numbers(schema: pyarrow.Schema) -> dict[str, pyarrow.DataType]:
    """The type of every column, or of what its lists and structures hold, by a name such as `choices.item`."""
    found: dict[str, pyarrow.DataType] = {}
    waiting = [(field.name, field.type) for field in schema]
    while waiting:
        name, kind = waiting.pop()
        found[name] = kind
        if pyarrow.types.is_struct(kind):
            waiting += [(f"{name}.{kind.field(i).name}", kind.field(i).type) for i in range(kind.num_fields)]
        elif hasattr(kind, "value_type"):  # lists; Parquet files name what is in them differently
            waiting.append((f"{name}.item", kind.value_type))
    return found


def _read(file: Path) -> pyarrow.Table:
    suffix = suffix_of(file)
    if suffix is None:
        raise UserError(f"expected questions in a file ending in {', '.join(SUFFIXES)}; found {file}: convert it")
    kind = {".parquet": "Parquet", ".csv": "CSV"}.get(suffix.removesuffix(".gz"), "JSON")
    try:
        check_file(file, "file of questions")
        table = pyarrow.parquet.read_table(file) if kind == "Parquet" else _table(_rows(file, suffix))
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error) as error:
        raise UserError(
            f"expected {kind} in {file}; found {_first_line(error)!r}: mend it or fetch it again"
        ) from error
    return _drop_foreign(table)


def _rows(file: Path, suffix: str) -> list[dict[str, Any]]:
    content = file.read_bytes()
    text = (gzip.decompress(content) if suffix.endswith(".gz") else content).decode("utf-8-sig")
    if suffix.startswith(".csv"):
        return _csv_rows(file, text)
    if suffix.startswith(".jsonl") or not text.lstrip().startswith("["):
        rows = [json.loads(line, object_pairs_hook=unique_keys) for line in text.split("\n") if line.strip()]
    else:
        rows = json.loads(text, object_pairs_hook=unique_keys)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"expected one object with the columns of a question a line in {file}; found {str(row)[:40]!r} as "
                f"number {number}: mend the file"
            )
    return rows


def _csv_rows(file: Path, text: str) -> list[dict[str, Any]]:
    """Rows of texts; a column of nothing but whole numbers holds numbers."""
    csv.field_size_limit(sys.maxsize)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(f"expected as many fields as columns in each row of {file}; found others in row {number}")
    whole = [name for name in (rows[0] if rows else ()) if all(_WHOLE.fullmatch(row[name]) for row in rows)]
    return [row | {name: int(row[name]) for name in whole} for row in rows]


def _table(rows: list[dict[str, Any]]) -> pyarrow.Table:
    """The columns of all rows; what a row lacks is null."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.table({name: pyarrow.array([row.get(name) for row in rows]) for name in names})


def _drop_foreign(table: pyarrow.Table) -> pyarrow.Table:
    """Without columns of types that lm-eval's questions cannot have, such as maps."""
    known = []
    for field in table.schema:
        try:
            datasets.Features.from_arrow_schema(pyarrow.schema([field]))
        except (ValueError, NotImplementedError):
            continue
        known.append(field.name)
    return table.select(known)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
