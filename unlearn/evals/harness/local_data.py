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

from unlearn.errors import UserError
from unlearn.evals.harness.question_files import read_questions, suffix_of
from unlearn.files import file_hash

_SHARD = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?")  # older ones of the hub have a hash behind
_SET = re.compile(rf"|{_SHARD.pattern}")  # what stands between a split's name and a file's suffix


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
        """The files of one split, in order; empty if there are none; `UserError` if some are missing, or too many."""
        folder = self.root / path / name if name else self.root / path
        found = [file for place in (folder, folder / "data") for file in sorted(place.glob(f"{split}[-.]*"))]
        found = [file for file in found if suffix_of(file) is not None]
        # Where there is nothing else, the split may be in one file with any name behind its own, as the hub has some.
        files = [file for file in found if _SET.fullmatch(_behind(file, split))]
        files = files or [file for file in found if file.name.startswith(f"{split}-")]
        _check_set(files, split)
        return files

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
        return _read(files, {str(file.relative_to(self.root)): file_hash(file) for file in files})


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
    return _read(files, {str(file): file_hash(file) for file in files})


def _glob(place: Path) -> Iterable[Path]:
    return [place] if place.is_file() else place.parent.glob(place.name) if "*" in place.name else []


def _read(files: Sequence[Path], digests: dict[str, str]) -> tuple[datasets.Dataset, dict[str, str]]:
    table = read_questions(files)
    if table.num_rows == 0:
        raise UserError(f"expected questions in {files[0]}; found no rows: fetch the file again")
    fingerprint = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    return datasets.Dataset(table, fingerprint=fingerprint), digests


def _behind(file: Path, split: str) -> str:
    """`-00000-of-00002` of `test-00000-of-00002.parquet`, nothing of `test.parquet`."""
    return file.name[len(split) :].lower().removesuffix(suffix_of(file) or "")


def _check_set(files: Sequence[Path], split: str) -> None:
    """Raise unless these are one file, or `split-00000-of-00002.parquet` and its like, all there and of one set."""
    if len(files) <= 1 and not any(_SHARD.fullmatch(_behind(file, split)) for file in files):
        return
    numbered = [match for file in files if (match := _SHARD.fullmatch(_behind(file, split)))]
    places = sorted(int(match[1]) for match in numbered)
    kinds = {(file.parent, suffix_of(file), match[2]) for file, match in zip(files, numbered, strict=False)}
    if len(numbered) < len(files) or len(kinds) > 1 or places != list(range(int(numbered[0][2]))):
        raise UserError(
            f"expected one file or all parts of one split in {files[0].parent}; found "
            f"{', '.join(file.name for file in files)}: remove what is not meant, or fetch the data set again into an "
            "empty folder"
        )
