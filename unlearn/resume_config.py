"""Flags of every command whose work can go on after it was stopped or killed. Nothing here imports torch."""

import math
from dataclasses import dataclass
from typing import Literal

from unlearn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ResumeFlags:
    """How a run is saved, and goes on after it was stopped or killed."""

    overwrite: bool = False
    """Replace an earlier run in --output. With --resume auto: only if it is another one."""
    resume: Literal["auto", "never"] | None = None
    """auto: go on with the unfinished run of the same flags in --output, from its newest checkpoint; say so if it is
    finished. never: an earlier run is in the way. Default: auto, or never with --overwrite."""
    save_every: int = 32
    """Optimizer steps between checkpoints; there is one after the last step too. 0: only when told to stop."""
    keep: int = 1
    """Checkpoints to keep while the run lasts; a finished one has none."""
    step_timeout: float = 600.0
    """Seconds that ranks wait for each other, after the first step, before they give up."""

    @property
    def resumes(self) -> bool:
        """Whether an unfinished run of the same flags goes on."""
        return self.resume == "auto" or (self.resume is None and not self.overwrite)

    def check_resume(self) -> None:
        """Raise unless every number is inside its range, and every flag has an effect."""
        if self.save_every < 0 or self.keep < 1 or not 0.0 < self.step_timeout < math.inf:
            raise UserError(
                "expected --save-every of 0 or more, --keep of 1 or more and --step-timeout above 0; found "
                f"{self.save_every}, {self.keep} and {self.step_timeout}"
            )
        if self.save_every == 0 and self.keep != 1:
            raise UserError("--keep has no effect with --save-every 0: leave it out")
