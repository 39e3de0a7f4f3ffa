"""The flags of `python evals/pair.py`. Nothing here imports torch: `--help` and a wrong flag answer at once."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from unlearn.errors import UserError


@dataclass(frozen=True)
class PairConfig:
    """Compare two evaluations of the same questions, question by question."""

    base: tyro.conf.Positional[Path]
    """Results of the model before: results_<time>.json or the folder that holds just one."""

    new: tyro.conf.Positional[Path]
    """Results of the model after."""

    margin: float = 0.01
    """How much worse still counts as not inferior, as a fraction."""

    figure: Path = Path("compare.png")
    """Where to draw the accuracies of both with their intervals (.png, .svg or .pdf)."""

    overwrite: bool = False
    """Replace an earlier --figure."""

    def __post_init__(self) -> None:
        if not 0.0 < self.margin < 1.0:
            raise UserError(f"expected --margin as a fraction between 0 and 1; found {self.margin}: 0.01 is one point")
        if self.figure.suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"expected --figure to end in .png, .svg or .pdf; found {self.figure}: rename it")
        if self.figure.exists() and not self.overwrite:
            raise UserError(
                f"expected a new file for --figure; found {self.figure}: choose another name, or give --overwrite"
            )
