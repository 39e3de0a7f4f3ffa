"""The flags of `python -m unlearn report`. Nothing here imports torch or matplotlib."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from unlearn.config import DeviceFlags
from unlearn.errors import UserError


@dataclass(frozen=True)
class ReportConfig(DeviceFlags):
    """Write FOLDER/report.html: one self-contained page with what a run did and what was measured, or with what a sweep
    tried and its best trial's run. Replaces an earlier report."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder that train.py or launch/sweep.py wrote."""
    evals: tuple[str, ...] = ()
    """Folders with results of evals/run.py for the original or the unlearned model, beside FOLDER/evals."""
    attacks: tuple[str, ...] = ()
    """Folders that evals/tamper.py wrote, beside those next to FOLDER that attacked its model."""
    prompts: tuple[str, ...] = ()
    """Texts to read with a run's lens at every layer, before and after: loads both models and writes FOLDER/lens.json,
    which later reports show too. train.py --prompts reads them on the way, without loading either again."""

    def __post_init__(self) -> None:
        if self.device is not None and not self.prompts:
            raise UserError("--device has no effect without --prompts: leave it out")
        if not all(prompt.strip() for prompt in self.prompts):
            raise UserError("expected text in every one of --prompts; found an empty one: leave it out")
