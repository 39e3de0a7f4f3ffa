"""The experiment trackers: each a function that opens one for a run."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Tracker:
    """An open tracker.

    Attributes:
        log: takes a step and its numbers. close: ends once everything was sent.
    """

    log: Callable[[int, Mapping[str, float]], Any]
    close: Callable[[], Any]


def open_tracker(name: str, run: Path, project: str) -> Tracker:
    """Open the tracker of that name for a run; the run's later attempts come to the same place."""
    file = run / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    (run / "tracking").mkdir(exist_ok=True)
    opened: dict[str, Callable[[Path, str, Any], Tracker]] = {
        "trackio": _trackio,
        "wandb": _wandb,
        "tensorboard": _tensorboard,
    }
    return opened[name](run, project, config)


def _trackio(run: Path, project: str, config: Any) -> Tracker:
    import trackio

    trackio.init(project=project, name=run.name, config=config, resume="allow")
    return Tracker(lambda step, numbers: trackio.log(dict(numbers), step=step), trackio.finish)


def _wandb(run: Path, project: str, config: Any) -> Tracker:
    import wandb

    place = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    opened = wandb.init(
        project=project, name=run.name, id=place, config=config, resume="allow", dir=str(run / "tracking")
    )
    return Tracker(lambda step, numbers: opened.log(dict(numbers), step=step), opened.finish)


def _tensorboard(run: Path, project: str, config: Any) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tracking" / project))
    writer.add_text("config", json.dumps(config, indent=2))

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)
