"""Where a report's numbers come from: commands, flags, versions and digests."""

import dataclasses
import importlib.metadata
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from unlearn.config import config_of
from unlearn.launch.report.record import Record

PACKAGES = ("unlearn", "torch", "transformers", "lm-eval", "datasets", "matplotlib")


def commands(record: Record) -> list[tuple[str, str]]:
    """(what it did, the exact command line) of everything that a report shows, as far as it was written down.

    A command that was not is put together from its flags.
    """
    found = [("training", typed(record.recorded) or command(record.config))]
    for label, measurements in (("before", record.before), ("after", record.after)):
        found += [(label, measurement.command) for measurement in measurements if measurement.command]
    for attack in record.attacks:
        found.append((attack.folder.name, typed(attack.recorded) or _joined("evals/tamper.py", attack.config, {})))
    return list(dict.fromkeys(found))


def typed(recorded: Mapping[str, Any]) -> str | None:
    """The command of the last attempt that run.json tells of."""
    attempts = recorded.get("attempts") or [{}]
    return attempts[-1].get("command")


def command(config: Mapping[str, Any]) -> str:
    """The command line of train.py that gives these flags: every one that differs from its default."""
    fields = dataclasses.fields(config_of(config.get("method", "lens")))
    return _joined("train.py", config, {item.name: item.default for item in fields} | {"method": "lens"})


def _joined(script: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    words = ["python", script]
    for name, value in config.items():
        value = tuple(value) if isinstance(value, list) else value
        if value is None or value == defaults.get(name, False) or value == ():
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def files(record: Record) -> Iterator[dict[str, Any]]:
    """The files that were read, with the versions and digests that they hold."""
    if record.recorded:
        yield {"label": "training", "file": record.folder / "run.json", "facts": dict(_run_facts(record.recorded))}
    for label, measurements in (("before", record.before), ("after", record.after)):
        for measurement in measurements:
            yield {"label": label, "file": measurement.file, "facts": dict(_flat(measurement.details))}
    for attack in record.attacks:
        facts = dict(_flat(attack.config)) | dict(_run_facts(attack.recorded))
        yield {"label": "attack", "file": attack.folder / "attack.json", "facts": facts}


def _run_facts(recorded: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What run.json says: the digests of all that was read, and every attempt's code, versions and ranks."""
    yield from _flat(recorded.get("identity", {}), "sha256")
    attempts = recorded.get("attempts", [])
    for number, attempt in enumerate(attempts, start=1):
        yield from _flat(attempt, f"attempt {number}" if len(attempts) > 1 else "")


def given(config: Mapping[str, Any]) -> dict[str, str]:
    """The flags that have a value."""
    return {name: value for name, value in _flat(config) if value != ""}


def versions() -> dict[str, str]:
    """What is installed where the report is made."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested dictionaries, by their dotted names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, " ".join(map(str, value)) if isinstance(value, list) else str(value)
