"""The flags of `python -m unlearn watch`. Nothing here imports torch or rich."""

import math
from dataclasses import dataclass
from typing import Annotated

import tyro

from unlearn.errors import UserError

EVERY = 2.0  # seconds between two looks


@dataclass(frozen=True)
class WatchConfig:
    """Watch a run, an attack, a sweep or a comparison on one screen, live, from the files that it writes. Ends when it
    is finished, or with Ctrl-C. Where the output is no terminal, one picture is printed."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder that train.py, evals/tamper.py, launch/sweep.py or launch/compare.py writes."""
    every: float | None = None
    """Seconds between two looks. Default: 2."""
    once: bool = False
    """Print one picture and end."""

    def __post_init__(self) -> None:
        if self.every is not None and self.once:
            raise UserError("--every has no effect beside --once: give one of them")
        if not 0.1 <= self.seconds <= 3600.0 or not math.isfinite(self.seconds):
            raise UserError(f"expected --every from 0.1 to 3600 seconds; found {self.seconds}")

    @property
    def seconds(self) -> float:
        """Between two looks."""
        return EVERY if self.every is None else self.every
