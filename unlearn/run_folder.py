"""A run's folder: claimed before the work, filled as it goes, exported into at the end."""

import math
import shutil
from pathlib import Path
from typing import Any

from unlearn.distributed import barrier, fail_together, is_main
from unlearn.errors import UserError
from unlearn.files import write_json, writing

OWN = (
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "model",
    "adapter",
    "evals",
    "attack.json",
    "attack.png",
    "report.html",
)


def check_output(output: str, overwrite: bool) -> Path:
    """The folder of a new run; raises `UserError`, without touching anything, if it may not be written.

    An earlier run is only replaced with --overwrite, and a folder that is not a run's never.
    """
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"expected a folder for --output; found the file {output}: choose another name")
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    strange = [name for name in found if name.removesuffix(".tmp") not in OWN]
    if strange:
        raise UserError(
            f"expected a run's folder or a new one for --output; found {strange[0]!r} in {output}: choose another name"
        )
    if found and not overwrite:
        raise UserError(
            f"expected a new folder for --output; found an earlier run in {output}: choose another name, "
            "or give --overwrite to replace it"
        )
    return folder


def open_run(folder: Path, config: dict[str, Any]) -> None:
    """Empty or create the folder of a run that passed `check_output`, and write its flags (infinity as
    the word); rank 0 does it for all."""
    with fail_together():
        if is_main():
            with writing(folder):
                if folder.exists():
                    shutil.rmtree(folder)
                folder.mkdir(parents=True)
            write_json(
                folder / "config.json", {key: "inf" if value == math.inf else value for key, value in config.items()}
            )
    barrier()
