"""The flags of `unlearn push`. Nothing here imports torch."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from unlearn.errors import UserError

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # OWNER/NAME on the hub


@dataclass(frozen=True)
class PushConfig:
    """Make a finished run into a folder for the Hugging Face hub: weights, results and a model card written from the
    run's own files. With --repo, send it there."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder that train.py wrote, with model/."""
    what: Literal["model", "adapter"] = "model"
    """The whole model, or a LoRA run's adapter alone."""
    repo: str | None = None
    """Where to send it, OWNER/NAME; made if it is not there. Default: make the folder, and print the command that
    sends it."""
    public: bool = False
    """Make the repository readable for everyone. Default: private."""
    base: str | None = None
    """Hub name of the model that the run began with, for the card. Default: the run's --model, where that is a hub
    name and no local folder."""
    lens: bool = False
    """Also give away the local tuned lens that the run used."""
    output: str | None = None
    """New folder to make. Default: RUN/hub."""
    overwrite: bool = False
    """Replace an earlier folder of this command in --output."""
    evals: tuple[str, ...] = ()
    """Folders with results of evals/run.py for the original or the unlearned model, beside RUN/evals."""
    attacks: tuple[str, ...] = ()
    """Folders that evals/tamper.py wrote, beside those next to RUN that attacked its model."""

    def __post_init__(self) -> None:
        if self.repo is not None and not REPO.fullmatch(self.repo):
            raise UserError(f"expected --repo as OWNER/NAME; found {self.repo!r}: give both, as on the hub")
        if self.base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.base):
            raise UserError(f"expected --base as a name on the hub, OWNER/NAME; found {self.base!r}: check it")
        if self.public and self.repo is None:
            raise UserError("--public has no effect without --repo: leave it out")
