"""Question files under `--data-dir`, laid out as on the hub: `DIR/<dataset_path>/<dataset_name>/<split>-*.parquet`, or
with one of the other endings of `question_files`; and those that a task's YAML names itself (`data_files`).

They are read here. `datasets.load_dataset` on a local folder caches by the folder's base name: two folders of
the same name shared one entry, and a replaced file still gave the old rows.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets

from evals.question_files import SUFFIXES, read_questions, suffix_of
from unlearn.errors import UserError


class LocalData:
    """The data sets in one folder.

    Attributes:
        root: the folder given with `--data-dir`.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"expected a folder after --data-dir; found none at {root}: check the path")

    def files(self, path: str, name: str | None, split: str) -> list[Path]:
        """The files of one split, in order; empty if there are none; `UserError` if some are missing."""
        folder = self.root / path / name if name else self.root / path
        for place in (folder, folder / "data"):
            for suffix in SUFFIXES:
                found = [file for file in place.glob(f"{split}[-.]*") if suffix_of(file) == suffix]
                shards = sorted(file for file in found if file.name.startswith(f"{split}-"))
                if found := shards or [file for file in found if file.name.lower() == f"{split}{suffix}".lower()]:
                    _check_shards(found)
                    return found
        return []

    def expected(self, path: str, name: str | None, split: str) -> Path:
        """Where a missing split should be, for a message."""
        return self.root / path / (name or "") / f"{split}-*.parquet"

    def read(self, path: str, name: str | None, split: str) -> tuple[datasets.Dataset, dict[str, str]]:
        """One split, and the SHA-256 of each of its files, by path below `root`.

        Raises:
            UserError: a file is missing or damaged, or has no rows.
        """
        files = self.files(path, name, split)
        if not files:
            raise UserError(
                f"expected {self.expected(path, name, split)}; found no such file, nor one in .jsonl or .csv: put the "
                f"data set {path} there, for example with `hf download {path} --repo-type dataset --local-dir "
                f"{self.root / path}`"
            )
        return _read(files, {str(file.relative_to(self.root)): sha256(file) for file in files})


def read_named(names: Sequence[str], folders: Sequence[Path], task: str) -> tuple[datasets.Dataset, dict[str, str]]:
    """The files that a task's YAML names, and the SHA-256 of each by its path.

    Args:
        names: paths or patterns. folders: where to look for those that are relative, the first place first.

    Raises:
        UserError: a file is missing or damaged, or there are no rows.
    """
    files: list[Path] = []
    for name in names:
        places = [Path(name).expanduser()] if Path(name).expanduser().is_absolute() else [f / name for f in folders]
        found = next((found for place in places if (found := sorted(_glob(place)))), None)
        if found is None:
            raise UserError(
                f"expected the file {places[0]} of task {task}; found none: check data_files in the task's YAML, whose "
                "paths start from its own folder"
            )
        files += found
    return _read(files, {str(file): sha256(file) for file in files})


def _glob(place: Path) -> Iterable[Path]:
    return [place] if place.is_file() else place.parent.glob(place.name) if "*" in place.name else []


def _read(files: Sequence[Path], digests: dict[str, str]) -> tuple[datasets.Dataset, dict[str, str]]:
    table = read_questions(files)
    if table.num_rows == 0:
        raise UserError(f"expected questions in {files[0]}; found no rows: fetch the file again")
    fingerprint = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    return datasets.Dataset(table, fingerprint=fingerprint), digests


def _check_shards(files: list[Path]) -> None:
    """Raise unless `split-00000-of-00002.parquet` and its like are all there, and of one set."""
    named = [match for file in files if (match := re.search(r"-(\d+)-of-(\d+)\.[a-z.]+$", file.name, re.I))]
    places = sorted(int(match[1]) for match in named)
    totals = {int(match[2]) for match in named}
    if named and (len(named) < len(files) or len(totals) > 1 or places != list(range(totals.pop()))):
        raise UserError(
            f"expected all parts of one split in {files[0].parent}; found {', '.join(file.name for file in files)}: "
            "fetch the data set again into an empty folder"
        )


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
