"""Question files under `--data-dir`, laid out as on the hub: `DIR/<dataset_path>/<dataset_name>/<split>-*.parquet`.

They are read with pyarrow. `datasets.load_dataset` on a local folder caches by the folder's base name: two folders of
the same name shared one entry, and a replaced file still gave the old rows.
"""

import hashlib
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
        """The Parquet files of one split, in order; empty if there are none."""
        folder = self.root / path / name if name else self.root / path
        for place in (folder, folder / "data"):
            found = sorted(place.glob(f"{split}-*.parquet")) or sorted(place.glob(f"{split}.parquet"))
            if found:
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


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
