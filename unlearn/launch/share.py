"""What is given away of a run, and what its files say of the model that it began with."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn.files import is_hub_name
from unlearn.launch.push_config import PushConfig
from unlearn.launch.report.record import Measurement, Record, Tasks, merged

LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Share:
    """A run as it is given away.

    Attributes:
        base: hub name of the model that the run began with; None where that is not known.
        license: the base's, as a card's header has it; {} where nothing says which.
        results: content of the files of results that go along, by name; without places of this machine.
        weights: digest of the weights that go along.
    """

    record: Record
    config: PushConfig
    base: str | None
    license: dict[str, str]
    results: dict[str, dict[str, Any]]
    weights: str

    @property
    def title(self) -> str:
        """The repository's name, or the run's."""
        return (self.config.repo or self.record.folder.resolve().name).rpartition("/")[2]

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.record.config.get("method", "lens"))

    def tasks(self, measurements: Iterable[Measurement]) -> Tasks:
        """What was measured, without the members of groups and the parts of tasks."""
        found = merged(measurements)
        return {name: one for name, one in found.items() if "/" not in name and name not in self.record.members}

    def cut_short(self) -> dict[str, tuple[int, int]]:
        """(asked, all of them) of each task of which not every question was asked, as far as results tell."""
        found: dict[str, tuple[int, int]] = {}
        for result in self.results.values():
            for task, counts in (result.get("n-samples") or {}).items():
                if isinstance(counts, dict) and counts.get("effective", 0) < counts.get("original", 0):
                    found[task] = (counts["effective"], counts["original"])
        return found


def base_of(record: Record, given: str | None) -> str | None:
    """The hub name of the model that a run began with, None where it was a folder or nobody can say.

    A relative path looks like a hub's name where it leads nowhere: it counts as one only if the hub's cache has it.
    """
    name = str(record.config["model"])
    if given is not None or Path(name).expanduser().exists() or not is_hub_name(name):
        return given
    return name if _cached(name, "config.json") is not None else None


def license_of(record: Record, base: str | None) -> dict[str, str]:
    """What the base model's README.md or config.json, as they lie on this machine, say of its license."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    folder = Path(str(record.config["model"])).expanduser()
    for name in ("README.md", "config.json"):
        file = folder / name if folder.is_dir() else _cached(base, name) if base else None
        if file is None or not file.is_file():
            continue
        try:
            found = metadata_load(file) if name == "README.md" else json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, YAMLError):
            continue  # a README.md of another form says nothing
        if isinstance(found, dict) and isinstance(found.get("license"), str):
            return {key: found[key] for key in LICENSE if isinstance(found.get(key), str)}
    return {}


def _cached(repo: str, name: str) -> Path | None:
    """A file of a repository in the hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, name)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
