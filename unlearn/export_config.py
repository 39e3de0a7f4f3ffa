"""The flags of `unlearn export`. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from unlearn.config import DeviceFlags
from unlearn.flags import flag, settle


@dataclass(frozen=True)
class ExportConfig(DeviceFlags):
    """Write the model of a stopped run from one of its checkpoints: model/, with LoRA adapter/, and export.json.

    The run's folder stays as it is, and the run can go on afterwards. One process is enough, whatever number of ranks
    wrote the checkpoint; the corpora are not read.
    """

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run, with checkpoints/."""
    step: int | None = flag(least=1)
    """Optimizer steps of the checkpoint. Default: the newest one's."""
    output: str | None = None
    """New folder for model/ and adapter/. Default: beside the run, RUN-step-000032."""
    model: str | None = None
    """The model that the run began with, where it has moved; it must be the same one. Default: the run's --model."""
    overwrite: bool = False
    """Replace an earlier export in --output."""

    def __post_init__(self) -> None:
        settle(self)
