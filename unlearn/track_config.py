"""Flags of experiment trackers, of train.py and of `unlearn track`. Nothing here imports a tracker."""

import importlib.util
from dataclasses import dataclass
from typing import Literal

import tyro

from unlearn.errors import UserError
from unlearn.flags import Only, flag

TRACKED = Only(lambda config: config.track is not None, "without --track")
Name = Literal["trackio", "wandb", "tensorboard"]


@dataclass(frozen=True, kw_only=True)
class TrackFlags:
    """Where a run's numbers go beside metrics.jsonl."""

    track: Name | None = None
    """Also send the lines of metrics.jsonl to this tracker. A process of its own does it: if the tracker fails, the run
    goes on, and `unlearn track` sends the rest later. tensorboard: files in the run's folder tracking/."""
    track_project: str = flag("unlearn", only=TRACKED)
    """The tracker's project."""

    def check_track(self) -> None:
        """Raise if the tracker's package is missing."""
        if self.track is not None:
            check_installed(self.track)


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Send a run's metrics to an experiment tracker: what it has written, and, while it works, what it writes. The same
    command again sends only what is new."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    to: Name
    """The tracker; tensorboard: files in the run's folder tracking/."""
    project: str = "unlearn"
    """The tracker's project."""
    follow: bool = True
    """Go on until no process works on the run any more; --no-follow: end with what is there."""

    def __post_init__(self) -> None:
        check_installed(self.to)


def check_installed(tracker: str) -> None:
    """Raise `UserError` if a tracker's package is missing."""
    if importlib.util.find_spec(tracker) is None:
        raise UserError(f"expected the package {tracker} to track with; found none: pip install 'unlearn[{tracker}]'")
