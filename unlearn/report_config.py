"""The flags of `python -m unlearn report`. Nothing here imports torch or matplotlib."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from unlearn.errors import UserError


@dataclass(frozen=True)
class ReportConfig:
    """Write RUN/report.html: one self-contained page with what a run did and what was measured. Replaces an earlier
    report."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder that train.py wrote."""
    evals: tuple[str, ...] = ()
    """Folders with results of evals/run.py for the original or the unlearned model, beside RUN/evals."""
    attacks: tuple[str, ...] = ()
    """Folders that evals/tamper.py wrote, beside those next to RUN that attacked its model."""
    prompts: tuple[str, ...] = ()
    """Texts to read with the lens at every layer, before and after: loads both models and writes RUN/lens.json, which
    later reports show too."""

    def __post_init__(self) -> None:
        if not all(prompt.strip() for prompt in self.prompts):
            raise UserError("expected text in every one of --prompts; found an empty one: leave it out")
