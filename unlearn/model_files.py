"""The weights in a model's folder: which files transformers would read, and reading a few rows of their tensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from unlearn.distributed import main_first
from unlearn.errors import UserError
from unlearn.files import check_file, hub_error, local_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

READ_BYTES = 16 << 20  # what is read of a tensor at once
DTYPES = ("F64", "F32", "F16", "BF16")  # of numbers that are weights as they stand, in safetensors' names

# In memory -> on disk, where Hugging Face's own checkpoints differ.
RENAMED = {"gpt_neox": {"lm_head.": "embed_out."}}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model's folder.

    Attributes:
        path: what the user gave. folder: where the files are.
        files: the file of each tensor on disk.
    """

    path: str
    folder: Path
    files: dict[str, str]

    @classmethod
    def open(cls, path: str, *, revision: str | None = None) -> "Checkpoint":
        """Find the tensors of a local folder or hub name, in the files that transformers would read.

        Raises:
            UserError: there is none, one is damaged or may not be read, or the index names a file that is missing.
        """
        return cls._in(_folder(path, revision), path)

    @classmethod
    def at_hand(cls, path: str, *, revision: str | None = None) -> "Checkpoint | None":
        """The same without a download, or waiting for other ranks; None where weights are still to be fetched."""
        folder = Path(path).expanduser()
        if folder.is_dir():
            present = any((folder / name).is_file() for name in (SINGLE, INDEX))
            return cls._in(folder, path) if present else None
        try:
            folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return None
        # A download that was interrupted is gone on with when the weights are wanted.
        return cls._in(folder, path) if _is_whole(folder, path) else None

    @classmethod
    def _in(cls, folder: Path, path: str) -> "Checkpoint":
        files: dict[str, str] = {}
        for name in _weight_files(folder, path):
            files |= dict.fromkeys(_keys(folder / name, path), name)
        return cls(path, folder, files)

    def paths(self) -> list[Path]:
        """The files that the tensors are in."""
        return sorted({self.folder / name for name in self.files.values()})

    def key(self, name: str, config: PretrainedConfig) -> str | None:
        """The name on disk of the tensor called `name` in memory, None if it is not there."""
        bare = name.partition(".")[2]  # some checkpoints were saved from the base model alone
        return next((key for key in (disk_key(name, config), name, bare) if key in self.files), None)

    def read_into(self, tensor: Tensor, key: str, first: int, shape: torch.Size) -> None:
        """Copy rows `first`, `first` + 1, ... of the tensor `key`, whose whole shape must be `shape`, into `tensor`.

        The file is opened anew for every few rows: what it maps into memory is then given back at once.
        """
        rows = tensor.shape[0] if tensor.ndim > 0 else 1
        step = max(1, READ_BYTES * rows // max(1, tensor.numel() * 4))
        try:
            for start in range(0, max(1, rows), step):
                with safe_open(self.folder / self.files[key], framework="pt") as tensors:
                    stored = tensors.get_slice(key)
                    self._check(key, stored, tuple(shape))
                    if tensor.ndim == 0:
                        tensor.copy_(stored[:])
                    elif rows > 0:
                        part = tensor[start : start + step]
                        part.copy_(stored[first + start : first + start + part.shape[0]])
        except (OSError, SafetensorError) as error:
            raise hub_error(self.path, "model", error) from error

    def _check(self, key: str, stored: Any, expected: tuple[int, ...]) -> None:
        found = tuple(stored.get_shape())
        if found != expected:
            raise UserError(
                f"expected {key} of shape {expected} in {self.path}; found {found}: "
                "the files are not of this model, fetch them again"
            )
        if stored.get_dtype() not in DTYPES:
            raise UserError(
                f"expected weights in {', '.join(DTYPES)} in {self.path}; found {key} in {stored.get_dtype()}, as in a "
                "quantised model: give the model before quantisation, or save it dequantised"
            )

    def same(self, one: str, other: str) -> bool:
        """Whether two matrices of the files are equal, number for number."""
        try:
            with (
                safe_open(self.folder / self.files[one], framework="pt") as ours,
                safe_open(self.folder / self.files[other], framework="pt") as theirs,
            ):
                mine, yours = ours.get_slice(one), theirs.get_slice(other)
                if mine.get_shape() != yours.get_shape() or mine.get_dtype() != yours.get_dtype():
                    return False
                rows, width = mine.get_shape()
                step = max(1, READ_BYTES // (4 * max(1, width)))
                starts = range(0, rows, step)
                return all(torch.equal(mine[start : start + step], yours[start : start + step]) for start in starts)
        except (OSError, SafetensorError) as error:
            raise hub_error(self.path, "model", error) from error


def disk_key(name: str, config: PretrainedConfig) -> str:
    """The name under which Hugging Face's checkpoints store the parameter `name`."""
    for ours, theirs in RENAMED.get(config.model_type, {}).items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _folder(path: str, revision: str | None) -> Path:
    source = local_folder(path, "model", "config.json")
    if Path(source).is_dir():
        return Path(source)
    try:
        with main_first():
            return Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        raise hub_error(path, "model", error) from error


def _weight_files(folder: Path, path: str) -> list[str]:
    """The names of the files that `from_pretrained` reads: the single one, or else those of the index, and no others.

    Whatever else ends in .safetensors there (an earlier copy, an average, an optimizer's state) is not the model.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not (folder / INDEX).is_file():
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        found = f"{others[0]}, which transformers does not read either" if others else "none"
        remedy = "fetch the model again" if others else "convert its weights to safetensors"
        raise UserError(f"expected {SINGLE} or {INDEX} in the model folder {path}; found {found}: {remedy}")
    names = _indexed(folder, path)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"expected the file {missing[0]} in {path}, as its index says; found {len(missing)} file(s) missing: "
            "fetch the model again"
        )
    return names


def _is_whole(folder: Path, path: str) -> bool:
    """Whether the single file is there, or the index and all files that it names."""
    if (folder / SINGLE).is_file():
        return True
    return (folder / INDEX).is_file() and all((folder / name).is_file() for name in _indexed(folder, path))


def _indexed(folder: Path, path: str) -> list[str]:
    """The files that the index names."""
    check_file(folder / INDEX, "model")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except ValueError as error:
        raise hub_error(path, "model", error) from error
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise UserError(
            f"expected a weight_map from tensors to files in {folder / INDEX}; found something else: fetch the model "
            "again"
        )
    return sorted(set(named.values()))


def _keys(file: Path, path: str) -> list[str]:
    check_file(file, "model")
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise hub_error(path, "model", error) from error
