"""The folder that a command fills: checked before any work, claimed before the first step."""

import math
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unlearn.distributed import barrier, fail_together, is_main
from unlearn.errors import UserError
from unlearn.files import write_json, writing

RUN = frozenset(
    ("config.json", "metrics.jsonl", "checkpoints", "model", "adapter", "evals", "lens.json", "report.html")
)
ATTACK = frozenset(("config.json", "metrics.jsonl", "attack.json", "attack.png", "model"))
LENS = frozenset(("params.safetensors", "params.pt", "config.json", "fit.json"))


def check_output(output: str, overwrite: bool, own: Iterable[str] = RUN, inputs: Iterable[str | None] = ()) -> Path:
    """The folder for a command's output; raises `UserError`, without touching anything, if it may not be written.

    An earlier output is only replaced with --overwrite; a folder that holds anything else, or something that this
    command reads, never is.

    Args:
        own: names that this command writes.
        inputs: paths that it reads.
    """
    folder = Path(output).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"expected a folder for --output; found the file {output}: choose another name")
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    strange = [name for name in found if name.removesuffix(".tmp") not in own]
    if strange:
        raise UserError(
            f"expected a new folder for --output, or what this command wrote there earlier; found {strange[0]!r} in "
            f"{output}: choose another name"
        )
    if found and not overwrite:
        raise UserError(
            f"expected a new folder for --output; found an earlier run in {output}: choose another name, "
            "or give --overwrite to replace it"
        )
    for path in inputs:
        if path is not None and Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"expected --output apart from what is read; found {path} inside it: choose another name")
    _try_writing(folder)
    return folder


def _try_writing(folder: Path) -> None:
    """Raise unless a file can be made in `folder`, or in the nearest folder above it that exists."""
    nearest = next(place for place in (folder, *folder.parents) if place.is_dir())
    with writing(folder), tempfile.TemporaryFile(dir=nearest):
        pass


def open_run(folder: Path, config: dict[str, Any]) -> None:
    """Empty or create the folder of a run that passed `check_output`, and write its flags (infinity as the word).

    The folder itself stays, as it may be a mount point. Rank 0 does it for all.
    """
    with fail_together():
        if is_main():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for entry in folder.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            flags = {key: "inf" if value == math.inf else value for key, value in config.items()}
            write_json(folder / "config.json", flags)
    barrier()
