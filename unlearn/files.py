"""Files and folders: where something is read from, and how it is written whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from unlearn.errors import UserError

SAMPLES, SAMPLE_BYTES = 1024, 1 << 16  # of a large file of weights
# What a full disk, a quota, missing rights, a read-only or a special file system (/proc) answer to a write.
_REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENOENT,
    errno.EFBIG,
    errno.EIO,
    errno.ENAMETOOLONG,
)


def local_folder(path: str, what: str, needed: str) -> str:
    """`path` unchanged if it is a folder that holds `needed`, or looks like a hub name; `UserError` otherwise."""
    folder = Path(path).expanduser()
    kind = kind_of(folder, what)
    if kind == "folder":
        if not (folder / needed).is_file():
            raise UserError(f"expected {needed} in the {what} folder {path}; found none: check the path")
        check_file(folder / needed, what)
        return str(folder)
    if kind == "file":
        raise UserError(f"expected a {what} folder; found the file {path}: give the folder that holds {needed}")
    if not is_hub_name(path):
        raise UserError(f"expected a {what} folder or a hub name OWNER/NAME; found nothing at {path}: check the path")
    return path


def kind_of(path: Path, what: str) -> Literal["folder", "file"] | None:
    """What is at `path`, None for nothing; `UserError` where this may not be known, or no path is of that form."""
    try:
        if not path.exists():
            return None
        if not path.is_dir():
            return "file"
        if not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
            raise no_right(path, f"{what} folder")
        return "folder"
    except PermissionError as error:
        raise no_right(path, what) from error
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"expected the path of a {what}; found {reason!r} at {str(path)[:80]}: check it") from error


def is_hub_name(path: str) -> bool:
    """Whether `path` has the form of a hub name: NAME or OWNER/NAME."""
    return not path.startswith((".", "/", "~")) and path.count("/") <= 1 and not path.endswith("/") and path != ""


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_file(file: Path, what: str) -> None:
    """Raise `UserError` if `file` may not be read, or stands for a file that Git LFS has not fetched.

    Libraries call the first "no such file" and the second damaged.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except PermissionError as error:
        raise no_right(file, what) from error
    if start == LFS_POINTER:
        raise UserError(
            f"expected a {what} in {file}; found a Git LFS pointer, which only names the file: run `git lfs pull` "
            "where it was cloned, or fetch it with `hf download`"
        )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for JSON that raises `ValueError` for a key that is there twice: the last would win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} twice in one object")
    return found


def no_right(path: Path | str, what: str) -> UserError:
    """One sentence for a `what` that belongs to another user."""
    return UserError(
        f"expected a {what} that may be read at {path}; found 'Permission denied': ask its owner for the right to "
        "read it, or copy it"
    )


def absolute_model(path: str) -> str:
    """The path of a local folder in a form that holds from everywhere; a hub name unchanged."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.is_dir() else path


def hub_error(path: str, what: str, error: Exception) -> UserError:
    """One sentence for a `what` that could not be read from `path`, a folder or a hub name."""
    if isinstance(error, PermissionError):
        return no_right(error.filename or path, what)
    if Path(path).expanduser().exists() or isinstance(error, SafetensorError):
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return UserError(f"expected a readable {what} in {path}; found {reason!r}: the files are damaged or incomplete")
    kind = "--repo-type dataset " if what == "corpus" else ""
    return UserError(
        f"expected the {what} {path!r} as a local folder or on the Hugging Face hub; found neither: "
        f"where there is network run `hf download {kind}{path}` (log in first if it is gated), or give a local path"
    )


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `folder` to write into; rename it to `folder` when the block succeeds.

    Whatever ends the block early, nothing new is left under either name. The final name must be free, unless `replace`
    is set: what bears it is then renamed to `<folder>.old.tmp`, and removed after the renaming.

    Raises:
        UserError: the disk is full or the place is not writable.
    """
    temporary, old = temporary_name(folder), folder.with_name(folder.name + ".old.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                sync(file)
            sync(temporary)
            if replace and folder.exists():
                folder.rename(old)
            temporary.rename(folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def temporary_name(folder: Path) -> Path:
    """Where `atomic_folder` writes what will become `folder`."""
    return folder.with_name(folder.name + ".tmp")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to a temporary name and rename it to `path`; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name and rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into a `UserError`."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"expected to write {path}; found {str(error)!r}: free some space or choose another") from error
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise UserError(
            f"expected to write {path}; found {os.strerror(error.errno)!r}: free some space or choose another place"
        ) from error


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk, so that a rename never uncovers an empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_hash(files: Iterable[Path]) -> str:
    """sha256 over the names, the sizes and the contents of files of weights.

    Of a file above 64 MiB, 1,024 evenly spread samples of 64 KiB: of other weights it is another, but a change of a few
    numbers in one matrix may go unseen.
    """
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        add_parts(digest, file.name.encode(), str(size).encode())
        with file.open("rb") as stream:
            if size <= SAMPLES * SAMPLE_BYTES:
                add_parts(digest, stream.read())
                continue
            for sample in range(SAMPLES):
                stream.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                add_parts(digest, stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """sha256 of a whole file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size(count: int) -> str:
    """A number of bytes in words."""
    units = ("bytes", "KiB", "MiB", "GiB")
    power = min(len(units) - 1, max(0, count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.{1 if power else 0}f} {units[power]}"


def add_parts(digest: Any, *parts: bytes) -> None:
    """Add each part with its length, so that no other parts give the same bytes."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
