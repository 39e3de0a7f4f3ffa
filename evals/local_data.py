"""Question files under `--data-dir`, laid out as on the hub: `DIR/<dataset_path>/<dataset_name>/<split>-*.parquet`.

They are read with pyarrow. `datasets.load_dataset` on a local folder caches by the folder's base name: two folders of
the same name shared one entry, and a replaced file still gave the old rows.
"""

import hashlib
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

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
        """The Parquet files of one split, in order; empty if there are none; `UserError` if some are missing."""
        folder = self.root / path / name if name else self.root / path
        for place in (folder, folder / "data"):
            found = sorted(place.glob(f"{split}-*.parquet")) or sorted(place.glob(f"{split}.parquet"))
            if found:
                _check_shards(found)
                return found
        return []

    def expected(self, path: str, name: str | None, split: str) -> Path:
        """Where a missing split should be, for a message."""
        return self.root / path / (name or "") / f"{split}-*.parquet"

    def read(self, path: str, name: str | None, split: str) -> tuple[datasets.Dataset, dict[str, str]]:
        """One split, and the SHA-256 of each of its files, by path below `root`.

        Raises:
            UserError: a file is missing, not Parquet, or has no rows.
        """
        files = self.files(path, name, split)
        if not files:
            raise UserError(
                f"expected {self.expected(path, name, split)}; found no such file: put the data set {path} there, "
                f"for example with `hf download {path} --repo-type dataset --local-dir {self.root / path}`"
            )
        try:
            table = pyarrow.concat_tables([pyarrow.parquet.read_table(file) for file in files])
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"expected Parquet in {files[0]}; found {reason!r}: fetch the file again") from error
        if table.num_rows == 0:
            raise UserError(f"expected questions in {files[0]}; found no rows: fetch the file again")
        digests = {str(file.relative_to(self.root)): sha256(file) for file in files}
        fingerprint = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
        return datasets.Dataset(table, fingerprint=fingerprint), digests


def _check_shards(files: list[Path]) -> None:
    """Raise unless `split-00000-of-00002.parquet` and its like are all there, and of one set."""
    named = [match for file in files if (match := re.search(r"-(\d+)-of-(\d+)\.parquet$", file.name))]
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
